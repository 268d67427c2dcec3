"""Rewards on two-tower and BLIP models through stock transformers: clipscore, pickscore, hpsv2, aesthetic, imagereward."""
