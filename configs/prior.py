"""What DreamBooth's prior preservation can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from configs.checks import require
from configs.data import ImageDataConfig


@dataclass(frozen=True)
class PriorConfig:
    """Half of the samples show the subject's class, so that the class is not forgotten (arXiv 2208.12242)."""

    caption: str | None = None
    """What the class is called, as in 'a photo of a dog'; the caption of all of its pictures. None for no prior
    preservation."""
    path: str | None = None
    """Folder of pictures of the class; where there are too few, the base model draws the rest into it. None: a folder
    beside the run."""
    pictures: int = 100
    """How many pictures of the class there should be at least."""
    weight: float = 1.0
    """Weight of their loss; the subject's is 1."""
    num_inference_steps: int = 20
    """Sampling steps with which the base model draws them."""

    def __post_init__(self):
        given = any(getattr(self, entry.name) != entry.default for entry in fields(self) if entry.name != "caption")
        caption = self.caption
        require("prior.caption", caption, caption is not None or not given, "a text, where other --prior options are")
        require("prior.caption", repr(caption), caption is None or bool(caption.strip()), "a text that is not empty")
        require("prior.pictures", self.pictures, self.pictures >= 1, "1 or more")
        require("prior.weight", self.weight, 0 < self.weight < math.inf, "above 0")
        require("prior.num-inference-steps", self.num_inference_steps, self.num_inference_steps >= 1, "1 or more")


@dataclass(frozen=True)
class ClassPicturesConfig(ImageDataConfig):
    """Pictures of the class, which are cut to the sizes of the subject's."""

    sizes: tuple[tuple[int, int, int], ...] = ()
    """(height, width, pictures of the subject) of each size."""
