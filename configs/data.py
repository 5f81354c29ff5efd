"""Pictures with captions: where they lie, how they are chosen, cut and described."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sana_jax.errors import UserError

Format = Literal["auto", "folder", "manifest", "webdataset", "upstream_folder", "huggingface", "features"]
CaptionChoice = Literal["random", "first", "clipscore", "proportion"]
MissingCaptions = Literal["error", "skip", "empty"]
RareBuckets = Literal["merge", "repeat"]


@dataclass(frozen=True)
class ImageDataConfig:
    """Pictures with captions. ``python -m train.inspect_data PATH`` shows what a data set holds and how it is read."""

    path: str | None = None
    """A folder of pictures, a manifest (jsonl, csv), tar files, or a Hugging Face dataset on disk."""
    format: Format = "auto"
    """How the data is stored; auto finds out by looking, and says what it found."""
    caption: str | None = None
    """One caption for every picture instead of its own. {caption} in it becomes the picture's own caption, and the
    name of a column in braces becomes that column's value, as in 'a photo of {name}'."""
    caption_choice: CaptionChoice = "random"
    """Which of a picture's captions is taken, anew in each epoch: any, always the first, by CLIP score, or by the
    proportions of their kinds."""
    clip_threshold: float = 25.0
    """With clipscore: captions of this score or more take part; if there is none, the best one is taken."""
    clip_temperature: float = 0.1
    """With clipscore: captions are drawn in proportion to score^(1/temperature), so that less is greedier."""
    proportions: tuple[str, ...] = ()
    """With proportion: weights of the kinds of caption, each written kind=weight, as in prompt=1 llava=3."""
    missing_captions: MissingCaptions = "error"
    """Pictures without a caption: an error that lists them, leave them out, or train them with an empty caption."""
    resolution: int | None = None
    """Pixels along the side of a square picture; other shapes have about as many in all. None: the model's own."""
    aspect_buckets: bool = True
    """Keep each picture's shape as nearly as the model's table of sizes allows; False cuts all to squares."""
    rare_buckets: RareBuckets = "merge"
    """Sizes with fewer pictures than a batch: move the pictures to the size of the nearest shape, or repeat them."""
    flip: bool = False
    """Also train on each picture's mirror image; not for pictures with text, or where left and right differ."""
    crop: Literal["center", "random"] = "center"
    """Which part of a picture is kept where its shape does not fit."""
    crops: int = 1
    """How many random crops are kept of each picture."""
    minimum_size: int = 0
    """Pictures with a shorter side below this many pixels are left out; 0 keeps and enlarges them, which is said."""
    max_bad_share: float = 0.1
    """Largest share of files that may be unusable; more of them mean that something is wrong with all of the data."""
    validation_share: float = 0.0
    """Share of the groups (or pictures) that is kept from training and used to measure."""
    group_column: str | None = None
    """Column whose equal values never fall on both sides of the split. 'folder' is the picture's folder. None: the
    column 'group' where there is one, else each picture by itself."""
    conditions: tuple[str, ...] = ()
    """Further inputs of the model, each written name=kind, where name is a column of the data."""
    cache: str | None = None
    """Folder of the prepared latents and prompt embeddings; None: beside the run."""
    latent_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What latents are kept in there; auto: bfloat16, or float32 where latents are the pixels themselves."""

    def __post_init__(self):
        _require("clip-temperature", self.clip_temperature, self.clip_temperature > 0, "above 0")
        _require("resolution", self.resolution, self.resolution is None or self.resolution >= 1, "1 or more")
        _require("crops", self.crops, self.crops >= 1, "1 or more")
        _require("crops", self.crops, self.crops == 1 or self.crop == "random", "1 where --data.crop is center")
        _require("minimum-size", self.minimum_size, self.minimum_size >= 0, "0 (none) or more")
        _require("max-bad-share", self.max_bad_share, 0 <= self.max_bad_share <= 1, "0 to 1")
        _require("validation-share", self.validation_share, 0 <= self.validation_share < 1, "0 up to, not including, 1")
        _require(
            "proportions",
            " ".join(self.proportions) or "(none)",
            bool(self.proportions) == (self.caption_choice == "proportion"),
            "one kind=weight or more where --data.caption-choice is proportion, and none elsewhere",
        )
        self.weights()
        for condition in self.conditions:
            name, equals, kind = condition.partition("=")
            _require("conditions", condition, bool(name and equals and kind), "name=kind, as in control=image")

    def weights(self) -> dict[str, float]:
        """``proportions`` by kind of caption.

        Raises:
            UserError: not kind=weight, a weight below 0, no weight above 0, or a kind that comes twice.
        """
        found: dict[str, float] = {}
        for proportion in self.proportions:
            kind, _, text = proportion.rpartition("=")
            try:
                weight = float(text)
            except ValueError:
                weight = -1.0
            allowed = "kind=weight with each kind once and weights of 0 or more, as in prompt=1 llava=3"
            _require(
                "proportions", proportion, bool(kind) and 0 <= weight < float("inf") and kind not in found, allowed
            )
            found[kind] = weight
        if found:
            _require("proportions", " ".join(self.proportions), sum(found.values()) > 0, "one weight above 0 or more")
        return found


def _require(option: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise UserError(f"--data.{option} {value} is not allowed; choose {allowed}")
