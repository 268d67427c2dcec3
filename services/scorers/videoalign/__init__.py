"""VideoAlign: visual quality, motion quality and text alignment of a clip, from the public VideoReward checkpoint."""
