"""What world models are trained on: clips with the camera's path."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from configs.checks import require
from configs.data import MissingCaptions, VideoDataConfig

_NOT_FOR_WORLDS = ("flip", "joint_interval")
# What is said of how clips are cut out of videos: not for latents that are there already.
_OF_VIDEOS = ("clip_stride", "clips_per_video", "clip_size", "source_fps", "motion_score", "pose_column")
# And of how pictures are encoded: not for latents, which have sizes and a dtype of their own.
_OF_ENCODING = ("resolution", "aspect_buckets", "rare_buckets", "minimum_size", "latent_dtype")


@dataclass(frozen=True)
class WorldDataConfig(VideoDataConfig):
    """Clips cut out of videos with captions and a camera's path: beside a.mp4 lies a.npz with c2w, camera-to-world
    matrices (frames, 4, 4), and intrinsics; or a.npy with the matrices alone. Or latents that are there already."""

    path: str | None = None
    """A folder of videos, each with its .npz or .npy; a manifest (jsonl, csv) or tar files; or a folder of zip files of
    latents (zip_latents)."""
    format: Literal["auto", "folder", "manifest", "webdataset", "zip_latents"] = "auto"
    """How the data is stored; auto finds out by looking, and says what it found."""
    clip_frames: int = 161
    """Frames of a clip: 8k + 1, as the published autoencoder takes them."""
    clip_size: tuple[int, int] = (704, 1280)
    """Height and width of every clip in pixels. Latents of zip files have sizes of their own."""
    missing_captions: MissingCaptions = "error"
    """Clips without a caption: an error that lists them, leave them out, or train them with an empty caption. Samples
    of zip files are listed and left out, as long as --data.max-bad-share allows it."""
    pose_column: str = "poses"
    """Column of a manifest that names each video's .npz or .npy."""
    axes: Literal["opencv", "opengl"] = "opencv"
    """Which way the cameras of the data look: along z with y down (opencv), or along -z with y up (opengl, Blender,
    NeRF)."""
    field_of_view: float | None = None
    """Degrees that the cameras span across, where the data has no intrinsics."""
    short_clips: Literal["skip", "pad"] = "skip"
    """Latents of zip files that are shorter than clip_frames: leave them out, or fill them up with frames that are not
    counted."""

    formats: ClassVar[tuple[str, ...]] = ("auto", "folder", "manifest", "webdataset", "zip_latents")

    def __post_init__(self):
        super().__post_init__()
        for name in _NOT_FOR_WORLDS:
            value = getattr(self, name)
            option = f"data.{name.replace('_', '-')}"
            require(option, value, not value, f"{type(value)(0)} for worlds, whose camera it would contradict")
        require("data.crop", self.crop, self.crop == "center", "center for worlds, whose camera looks through it")
        angle = self.field_of_view
        require("data.field-of-view", angle, angle is None or 0 < angle < 180, "above 0 and below 180 degrees")
        require("data.pose-column", repr(self.pose_column), bool(self.pose_column.strip()), "the name of a column")
        latents = self.format == "zip_latents"
        short = self.short_clips
        require("data.short-clips", short, latents or short == "skip", "skip but for --data.format zip_latents")
        if latents:
            self._check_latents()

    def _check_latents(self) -> None:
        """Latents of zip files are clips already, and they are not encoded."""
        standard = {field.name: field.default for field in dataclasses.fields(self)}
        for names, why in (_OF_VIDEOS, "whose clips are cut"), (_OF_ENCODING, "whose clips are encoded"):
            for name in names:
                value, own = getattr(self, name), standard[name]
                allowed = f"{own} with --data.format zip_latents, {why}"
                require(f"data.{name.replace('_', '-')}", value, value == own, allowed)
