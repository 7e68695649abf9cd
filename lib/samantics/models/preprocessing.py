"""How a picture becomes a model's input, and where its pixels land there."""

import dataclasses
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from samantics.errors import StudyError

MEAN, STD = IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LONGEST_SIDE = 100_000  # pixels after resizing: 10,000x1 pixels would become 2,560,000x256 before the crop


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where an image's pixels land in the model's input: at `(x * scale_x + left, y * scale_y + top)`."""

    width: int  # of the image, pixels
    height: int
    size: int  # side of the square input, pixels
    scale_x: float
    scale_y: float
    left: float = 0.0
    top: float = 0.0

    @property
    def seen(self) -> tuple[int, int, int, int]:
        """xyxy of the input's pixels that show the image; the rest is padding."""
        left, top = max(0, round(self.left)), max(0, round(self.top))
        right = min(self.size, round(self.left + self.width * self.scale_x))
        bottom = min(self.size, round(self.top + self.height * self.scale_y))
        return left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model's input; call it with an RGB image.

    `fit` is `squash` (aspect not kept), `crop` (short side to `short`, then the centre) or `pad` (long side to `size`,
    zeros to the right and below, after normalisation).
    """

    size: int  # side of the square input, pixels
    fit: Literal["squash", "crop", "pad"]
    mean: tuple[float, float, float] = MEAN  # of RGB in 0-1
    std: tuple[float, float, float] = STD
    short: int = 0  # short side before the crop; 0 means `size`
    bicubic: bool = False  # else bilinear; both antialiased
    on_floats: bool = False  # resize after the division by 255 (no rounding to 8 bits), as SAM 2 and DINOv3 do

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """`(width, height)` after resizing, before crop or padding."""
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "crop":
            # torchvision's Resize: the long side is cut off, not rounded
            short = self.short or self.size
            return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        scale = self.size / max(width, height)  # segment_anything's ResizeLongestSide rounds half up
        return int(width * scale + 0.5), int(height * scale + 0.5)

    def geometry(self, width: int, height: int) -> Geometry:
        """Pixel geometry of an image of that size."""
        new_width, new_height = self.resized(width, height)
        left = top = 0.0
        if self.fit == "crop":
            left, top = (-float(round((side - self.size) / 2)) for side in (new_width, new_height))
        return Geometry(width, height, self.size, new_width / width, new_height / height, left, top)

    def __call__(self, image: Image.Image) -> Tensor:
        """`(3, size, size)` float32 of an RGB image."""
        _, _, right, bottom = self.geometry(image.width, image.height).seen
        seen = torch.zeros(1, self.size, self.size, dtype=torch.bool)
        seen[:, :bottom, :right] = True
        return self.normalised(self.square(image)[None], seen)[0]

    def normalised(self, pixels: Tensor, seen: Tensor) -> Tensor:
        """The model's input of `(B, 3, size, size)` pixels of `square`; `(B, size, size)` `seen`: not padding."""
        values = pixels / 255 if pixels.dtype == torch.uint8 else pixels
        mean, std = (values.new_tensor(three)[:, None, None] for three in (self.mean, self.std))
        values = (values - mean) / std
        return values * seen[:, None] if self.fit == "pad" else values

    def square(self, image: Image.Image) -> Tensor:
        """`(3, size, size)` of an RGB image before normalisation: uint8, or float32 in 0-1 where resized as that."""
        from torchvision.transforms import functional as TF  # a second to import: not before a picture is read

        new_width, new_height = self.resized(image.width, image.height)
        if min(new_width, new_height) < 1 or max(new_width, new_height) > LONGEST_SIDE:
            raise StudyError(f"an image of {image.width}x{image.height} pixels is too narrow to be resized: remove it")
        mode = TF.InterpolationMode.BICUBIC if self.bicubic else TF.InterpolationMode.BILINEAR
        pixels = TF.resize(TF.to_tensor(image) if self.on_floats else image, [new_height, new_width], mode)
        if not self.on_floats:
            pixels = TF.pil_to_tensor(pixels)
        if self.fit == "crop":
            pixels = TF.center_crop(pixels, [self.size, self.size])
        if self.fit == "pad":
            pixels = F.pad(pixels, (0, self.size - new_width, 0, self.size - new_height))
        return pixels
