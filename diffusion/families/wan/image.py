"""What Wan 2.1's image-to-video is given beside the text, as diffusers' `WanImageToVideoPipeline` makes it of a picture.

    image_embeds [257, D]         CLIP's second last hidden states, not normed; none in I2V-A14B, whose folder has no image encoder
    condition [4 + C, f, h, w]    a mask, 1 on the first frame, its four channels a latent frame's four pixel frames; and the latents of the
                                  picture followed by mid-grey

The whole clip is encoded: later latent frames depend on the picture. Source: diffusers 0.42.1, `pipeline_wan_i2v.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from diffusion.families.frozen import frozen_model, load_image_processor
from diffusion.families.wan.codec import ClipCodec

VISION_CLASS = "CLIPVisionModel"


def first_frame_mask(frames: int, height: int, width: int, stride: int = 4) -> Tensor:
    """1 on the first pixel frame, which stands `stride` times, folded to `[stride, f, h, w]`; sizes are those of a latent."""
    mask = torch.zeros(stride, frames, height, width)
    mask[:, 0] = 1
    return mask


class WanImageEncoder:
    """See the module's docstring.

    Args:
        codec: the policy's.
        vision: a `CLIPVisionModel`, None without.
        processor: its image processor.
    """

    def __init__(self, codec: ClipCodec, vision: Any = None, processor: Any = None) -> None:
        self.codec, self.vision, self.processor = codec, vision, processor

    @classmethod
    def load(cls, folder: Path, codec: ClipCodec, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Self:
        """From a pipeline's folder: `image_encoder`, `image_processor`, which may both be absent. Raises ValueError with the folder named."""
        if not (folder / "image_encoder").is_dir():
            return cls(codec)
        vision = frozen_model(folder / "image_encoder", VISION_CLASS, dtype, device)
        return cls(codec, vision, load_image_processor(folder / "image_processor"))

    @torch.no_grad()
    def encode(self, pixels: np.ndarray, frames: int) -> dict[str, Tensor]:
        """See `FrameEncoder.encode`; of the pixels the first frame is used."""
        picture = pixels[0]
        height, width, _ = picture.shape
        _, f, h, w = self.codec.latent_shape(height, width, frames)
        latents = self.codec.encode_first(picture, frames)
        found = {"condition": torch.cat([first_frame_mask(f, h, w, self.codec.stride), latents])}
        if self.vision is not None:
            pixels = self.processor(images=picture, return_tensors="pt").pixel_values.to(self.vision.device, self.vision.dtype)
            found["image_embeds"] = self.vision(pixels, output_hidden_states=True).hidden_states[-2][0].float().cpu()
        return found
