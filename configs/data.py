"""Pictures and clips with captions: where they lie, how they are chosen, cut and described."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from configs.checks import require
from sana_jax.errors import UserError

Format = Literal["auto", "folder", "manifest", "webdataset", "upstream_folder", "huggingface", "features"]
CaptionChoice = Literal["random", "first", "clipscore", "proportion"]
MissingCaptions = Literal["error", "skip", "empty"]
RareBuckets = Literal["merge", "repeat"]


def require_caption(option: str, caption: str | None) -> None:
    """Raises ``UserError`` for a caption of every sample that has no text: it would take their own away.

    Training on samples that have none is ``--data.missing-captions empty``.
    """
    allowed = "a text; pictures and clips without a caption are trained with --data.missing-captions empty"
    require(option, repr(caption), caption is None or bool(caption.strip()), allowed)


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
        require_caption("data.caption", self.caption)
        require("data.clip-temperature", self.clip_temperature, self.clip_temperature > 0, "above 0")
        for name in ("clip_threshold", "clip_temperature"):
            value, own = getattr(self, name), getattr(ImageDataConfig, name)
            read = self.caption_choice == "clipscore" or value == own
            require(f"data.{name}", value, read, f"{own} where --data.caption-choice is not clipscore")
        require("data.resolution", self.resolution, self.resolution is None or self.resolution >= 1, "1 or more")
        require("data.crops", self.crops, self.crops >= 1, "1 or more")
        require("data.crops", self.crops, self.crops == 1 or self.crop == "random", "1 where --data.crop is center")
        require("data.minimum-size", self.minimum_size, self.minimum_size >= 0, "0 (none) or more")
        require("data.max-bad-share", self.max_bad_share, 0 <= self.max_bad_share <= 1, "0 to 1")
        require(
            "data.validation-share", self.validation_share, 0 <= self.validation_share < 1, "0 up to, not including, 1"
        )
        require(
            "data.proportions",
            " ".join(self.proportions) or "(none)",
            bool(self.proportions) == (self.caption_choice == "proportion"),
            "one kind=weight or more where --data.caption-choice is proportion, and none elsewhere",
        )
        self.weights()
        for condition in self.conditions:
            name, equals, kind = condition.partition("=")
            require("data.conditions", condition, bool(name and equals and kind), "name=kind, as in control=picture")

    @property
    def finished_cache(self) -> bool:
        """Whether samples are those of a cache as it is, and no data is looked through."""
        return self.cache is not None and self.path is None

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
            require(
                "data.proportions", proportion, bool(kind) and 0 <= weight < float("inf") and kind not in found, allowed
            )
            found[kind] = weight
        if found:
            require(
                "data.proportions", " ".join(self.proportions), sum(found.values()) > 0, "one weight above 0 or more"
            )
        return found


@dataclass(frozen=True)
class VideoDataConfig(ImageDataConfig):
    """Clips cut out of videos with captions. ``python -m train.inspect_data PATH --clips`` shows what a data set holds
    and how it is read."""

    path: str | None = None
    """A folder of videos and of folders of frames, a manifest (jsonl, csv), or tar files."""
    clip_frames: int = 81
    """Frames of a clip: 1, 5, 9, ... (4k + 1), as video autoencoders take them."""
    clip_fps: float = 16.0
    """Frames per second of a clip; videos of other rates are resampled by the times of their frames."""
    clip_stride: int | None = None
    """Frames (at clip_fps) from one clip's start to the next's in the same video; None: clips lie side by side."""
    clips_per_video: int | None = None
    """The most clips that are cut out of one video, spread evenly over it (a single one lies in its middle); None: as
    many as clip_stride gives."""
    clip_size: tuple[int, int] | None = None
    """Height and width of every clip in pixels, instead of the model's table of sizes."""
    source_fps: float | None = None
    """Frames per second of videos that do not say it, and of folders of frames; None: such videos are unusable."""
    motion_score: str | None = None
    """Appended to captions as ' motion score: N.': a number for all clips, or the name of the data's column that holds
    each video's, of which the whole part is written. None: captions stay as they are."""
    filters: tuple[str, ...] = ()
    """Which videos, or latents of zip files, take part by their scores: each name=low:high, where name is a column of
    the data and either bound may be left out, as in unimatch=1:30 or dover=0.5:."""
    joint_interval: int = 0
    """Every so many steps the batch has pictures, as clips of one frame, instead of clips; 0 for clips alone."""
    joint_pictures: str | None = None
    """Where those pictures are: a folder, a manifest, tar files or a dataset on disk."""
    joint_batch_size: int | None = None
    """How many pictures such a batch has, a multiple of --batch-size; None: as many as a batch of clips."""
    joint_caption: str | None = None
    """One caption for every such picture instead of its own, as --data.caption is for clips."""
    joint_cache: str | None = None
    """Folder of those pictures' prepared latents; None: beside the run."""

    formats: ClassVar[tuple[str, ...]] = ("auto", "folder", "manifest", "webdataset")

    def __post_init__(self):
        super().__post_init__()
        frames, stride, fps = self.clip_frames, self.clip_stride, self.clip_fps
        near = max(0, frames - 1) // 4 * 4 + 1
        allowed = f"4k + 1 frames; the nearest are {near} and {near + 4}"
        require("data.clip-frames", frames, frames >= 1 and frames % 4 == 1, allowed)
        require("data.clip-fps", fps, 0 < fps < float("inf"), "above 0")
        require("data.clip-stride", stride, stride is None or stride >= 1, "1 or more")
        require("data.clips-per-video", self.clips_per_video, (self.clips_per_video or 1) >= 1, "1 or more")
        require("data.clips-per-video", 0, self.clips_per_video != 0, "1 or more")
        size = self.clip_size
        shown = "" if size is None else " ".join(map(str, size))
        require("data.clip-size", shown, size is None or min(size) >= 1, "a height and a width of 1 px or more")
        require(
            "data.resolution", self.resolution, size is None or self.resolution is None, "none beside --data.clip-size"
        )
        rate = self.source_fps
        require("data.source-fps", rate, rate is None or 0 < rate < float("inf"), "above 0")
        formats = self.formats
        require("data.format", self.format, self.format in formats, f"{', '.join(formats)} for clips")
        require("data.conditions", " ".join(self.conditions), not self.conditions, "none for clips")
        every, pictures = self.joint_interval, self.joint_pictures
        require("data.joint-interval", every, every == 0 or every >= 2, "0 (clips alone), or 2 or more")
        both = "--data.joint-interval and --data.joint-pictures together, or neither"
        require("data.joint-interval", every, bool(every) == (pictures is not None), both)
        caption = self.joint_caption
        require("data.joint-caption", caption, caption is None or bool(every), "none without --data.joint-pictures")
        require_caption("data.joint-caption", caption)
        require("data.joint-interval", every, not every or frames > 1, "0 for clips of one frame, which are pictures")
        cache = self.joint_cache
        require("data.joint-cache", cache, cache is None or bool(every), "none without --data.joint-pictures")
        rows = self.joint_batch_size
        require("data.joint-batch-size", rows, rows is None or bool(every), "none without --data.joint-pictures")
        require("data.joint-batch-size", rows, rows is None or rows >= 1, "1 or more, a multiple of --batch-size")
        self.score_limits()
        some, chosen = " ".join(self.filters), self.path is not None or self.cache is None
        require(
            "data.filters", some, chosen or not some, "none where --data.cache is taken as it is, without --data.path"
        )

    def score_limits(self) -> dict[str, tuple[float, float]]:
        """``filters`` by the name of the score: the least and the greatest value.

        Raises:
            UserError: not name=low:high, or a name that comes twice.
        """
        found: dict[str, tuple[float, float]] = {}
        for text in self.filters:
            name, _, bounds = text.partition("=")
            low, colon, high = bounds.partition(":")
            try:
                limits = float(low or -math.inf), float(high or math.inf)
            except ValueError:
                limits = (math.nan, math.nan)
            if not name or not colon or name in found or not limits[0] <= limits[1]:
                raise UserError(
                    f"--data.filters {text} is not allowed; allowed is name=low:high with each name once and either "
                    "bound left out or not, as in dover=0.5: or unimatch=1:30: change it"
                )
            found[name] = limits
        return found

    def pictures(self) -> ClipPicturesConfig | None:
        """The pictures that are trained beside the clips; None where there are none."""
        if self.joint_pictures is None:
            return None
        return ClipPicturesConfig(
            path=self.joint_pictures,
            caption=self.joint_caption,
            caption_choice=self.caption_choice,
            clip_threshold=self.clip_threshold,
            clip_temperature=self.clip_temperature,
            proportions=self.proportions,
            missing_captions=self.missing_captions,
            resolution=self.resolution,
            aspect_buckets=self.aspect_buckets,
            rare_buckets=self.rare_buckets,
            flip=self.flip,
            crop=self.crop,
            crops=self.crops,
            minimum_size=self.minimum_size,
            max_bad_share=self.max_bad_share,
            cache=self.joint_cache,
            latent_dtype=self.latent_dtype,
            clip_size=self.clip_size,
        )


@dataclass(frozen=True)
class ClipPicturesConfig(ImageDataConfig):
    """Pictures that are trained beside clips, as clips of one frame: ``VideoDataConfig.pictures`` makes it."""

    clip_size: tuple[int, int] | None = None
    """As of the clips."""


@dataclass(frozen=True)
class MovingDigitsDataConfig:
    """The handwritten digits of scikit-learn, each moving across a small black canvas and coming back on its other
    side: clips whose digit and direction can be measured."""

    caption: str = "a {digit} moving {direction}"
    """The caption of each clip; {digit} becomes zero, one, ... nine, {direction} right, left, up, down, up left, ..."""
    embedding_dim: int = 32
    """Size of a word's vector; the transformer's caption_channels."""
    max_words: int = 7
    """Words that a prompt may have."""
    digits: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """Which digits to train on."""
    frames: int = 5
    """Frames of a clip."""
    canvas: int = 12
    """Pixels along each side of a frame; digits have 8."""
    directions: Literal[4, 8] = 4
    """Right, left, up, down alone, or the diagonals too."""
    speed: int = 2
    """Pixels that a digit moves from one frame to the next."""
    held_out: float = 0.2
    """Share of the digits' pictures that no training clip has; clips of them are for measuring."""
    seed: int = 0
    """Of the split, and of where a digit starts."""

    def __post_init__(self):
        require("data.frames", self.frames, self.frames >= 2, "2 or more, since a single frame does not move")
        require("data.canvas", self.canvas, self.canvas >= 10, "10 or more, so that a digit of 8 px has room to move")
        most = (self.canvas - 1) // 2
        require("data.speed", self.speed, 1 <= self.speed <= most, f"1 to {most}, below half the canvas's side")
        require("data.held-out", self.held_out, 0 <= self.held_out < 1, "0 up to, not including, 1")
        require("data.seed", self.seed, self.seed >= 0, "0 or more")
