"""The part of ``train.precompute`` that is about clips with a camera: its path becomes part of each record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.world_data import WorldDataConfig
from kernels.typing import Float
from train.data.conditions import Sample
from train.data.decoding import BadPicture
from train.data.records import Record
from train.data.world.paths import FRAMES_SHOWN, INTRINSICS, POSES, clip_path, frames_shown
from train.data.world.source import WorldSource
from train.precompute_clips import ClipRun
from train.precompute_pictures import Item


class PathCondition:
    """An array of a clip's path, (F, 4, 4) or (F, 4) in float32, as it goes into the cache."""

    of_one_shape = True

    def __init__(self, name: str, data: WorldDataConfig):
        self.name = name
        self.identity: Mapping[str, Any] = {
            "kind": "camera",
            "axes": data.axes,
            "field_of_view": data.field_of_view,
            "frames": FRAMES_SHOWN,
        }

    def missing(self, record: Record) -> str | None:
        """Videos without a path are left out before."""
        return None

    def reads_file(self, record: Record) -> bool:
        """The path's stamp is in the record."""
        return False

    def width(self, source: WorldSource, record: Record) -> int | None:
        """It is no vector."""
        return None

    def prepare(self, sample: Sample) -> np.ndarray:
        """``WorldRun`` makes it with the clip."""
        raise NotImplementedError

    def encode(self, prepared: np.ndarray) -> Float[np.ndarray, "B F *X"]:
        """As it is."""
        return prepared

    def free(self) -> None:
        """There is nothing to let go of."""


def path_conditions(data: WorldDataConfig) -> tuple[PathCondition, ...]:
    """What a record has beside its latents."""
    return PathCondition(POSES, data), PathCondition(INTRINSICS, data)


@dataclass
class WorldRun(ClipRun):
    """One pass over videos with a camera."""

    source: WorldSource

    def prepare(self, items: Sequence[Item]) -> list[dict[str, np.ndarray] | BadPicture]:
        """Pixels of some clips of one video, and their part of the camera's path."""
        first = items[0].record
        video, data = self.source.cuts[first.key].video, self.config.data
        try:
            seconds = self.source.seconds_of(first)
            path = self.source.path_of(first)
        except BadPicture as error:
            return [error] * len(items)
        prepared = super().prepare(items)
        found: list[dict[str, np.ndarray] | BadPicture] = []
        for item, inputs in zip(items, prepared):
            if isinstance(inputs, BadPicture):
                found.append(inputs)
                continue
            start = self.source.cuts[item.record.key].start
            shown = frames_shown(start, data.clip_frames, data.clip_fps, seconds, video.video.fps)
            own = clip_path(path, shown, video.size, item.view)
            found.append({**inputs, POSES: own.c2w, INTRINSICS: own.intrinsics})
        return found
