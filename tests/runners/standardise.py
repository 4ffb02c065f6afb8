"""A plugin: imported by the configs that name it, so that no other test finds its processor."""

from __future__ import annotations

from torch import Tensor

from minigpt4.processors.image import ImageProcessor, ImageSource
from minigpt4.registry import PROCESSORS


@PROCESSORS.register("standardise")
class Standardise(ImageProcessor):
    """Each image divided by its own spread, as some pipelines do; a plain one becomes NaN."""

    def __call__(self, image: ImageSource, name: str = "image") -> Tensor:
        pixels = super().__call__(image, name)
        return (pixels - pixels.mean((1, 2), keepdim=True)) / pixels.std((1, 2), keepdim=True)
