"""The part of ``train.inspect_data`` that is about videos: lengths, frame rates, damage, and the clips in them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from configs.data import VideoDataConfig
from configs.world_data import WorldDataConfig
from sana_jax.camera import field_of_view, relative_poses, summarize_trajectory
from sana_jax.errors import UserError
from sana_jax.images import image_grid, save_png
from train.data.buckets import BucketPlan, assign_buckets
from train.data.decoding import BadPicture
from train.data.records import Problem, Record
from train.data.source import (
    IndexedSource,
    index_source,
    refuse_missing_captions,
    refuse_no_pictures,
    refuse_too_many_bad,
)
from train.data.video.clips import Examined, examine, first_pixels
from train.data.video.sizes import clip_sizes
from train.data.video.source import ClipSource, refuse_no_clips
from train.data.world.paths import rows_of_intrinsics
from train.data.world.source import WorldSource
from train.inspect_data import (
    check_options,
    describe_captions,
    describe_columns,
    describe_groups,
    describe_sizes,
    picture_cell,
    say_choice,
    say_head,
    say_what_stops_training,
    short,
    spread,
)

_SHEET = 16  # videos of a contact sheet, three frames each
_THREADS = 4
_SHOWN = 3  # names in a line
_SAMPLE_SIZE, _FACTOR, _PATCH = 30, 8, 2  # of the 480p model


@dataclass(frozen=True)
class InspectClipsConfig(VideoDataConfig):
    """Reports what a data set of videos holds. The options are those of --data in training; the path may come first."""

    batch_size: int = 8
    """Sizes with fewer clips than this are rare."""
    check_pixels: bool = True
    """Decode every video, which finds damage and variable frame rates; False reads their headers alone."""
    contact_sheet: str | None = None
    """Also draw the first, the middle and the last frame of some videos into this PNG."""
    clips: bool = True
    """Look for videos."""
    cameras: bool = False
    """Look for the camera's path beside each video, as training of world models does."""
    pose_column: str = WorldDataConfig.pose_column
    """Column of a manifest that names each video's .npz or .npy."""
    axes: Literal["opencv", "opengl"] = "opencv"
    """Which way the cameras look: along z with y down (opencv), or along -z with y up (opengl)."""
    field_of_view: float | None = None
    """Degrees that the cameras span across, where the data has no intrinsics."""
    cache: None = field(default=None, init=False)
    latent_dtype: Literal["auto"] = field(default="auto", init=False)
    joint_interval: int = field(default=0, init=False)
    joint_pictures: None = field(default=None, init=False)
    joint_batch_size: None = field(default=None, init=False)
    joint_caption: None = field(default=None, init=False)
    joint_cache: None = field(default=None, init=False)

    def __post_init__(self):
        super().__post_init__()
        own = ("pose_column", "axes", "field_of_view")
        changed = [name for name in own if getattr(self, name) != getattr(type(self), name)]
        if changed and not self.cameras:
            raise UserError(
                f"--{changed[0].replace('_', '-')} is not read without --cameras; add that, or leave it out"
            )
        check_options(self)
        if not self.clips:
            raise UserError("--no-clips beside options of clips; leave it out")


def inspect_clips(config: InspectClipsConfig, say: Callable[[str], None] = print) -> bool:
    """Reports line by line; returns whether nothing would stop training.

    Raises:
        FileNotFoundError: there is nothing at the path.
        UserError: it is of no known format, or has no video that can be used.
    """
    source = index_source(config)
    looked = _look_inside(source, config) if config.check_pixels else {}
    damaged = [
        Problem(source.name_of(record), looked[record.key].problem)
        for record in source.records
        if record.key in looked and looked[record.key].problem is not None
    ]
    say_head(source, damaged, say)
    clips = WorldSource(source, _as_worlds(config)) if config.cameras else ClipSource(source, config)
    if not source.records:  # none has a camera that can be used
        for note in clips.notes:
            say(note)
        refuse_no_pictures(source)
    for line in (*_describe_times(source, looked), *describe_sizes([record.size for record in source.records])):
        say(line)
    for line in _describe_clips(clips):
        say(line)
    for line in _describe_cameras(clips) if config.cameras else ():
        say(line)
    plan = None
    if clips.records:
        plan = _plan(clips, config)
        for line in plan.lines:
            say(line.replace("pictures", "clips"))
    for line in (*describe_captions(source), *describe_columns(source), *describe_groups(source, config)):
        say(line)
    trains = not say_what_stops_training(
        say,
        lambda: refuse_too_many_bad([*source.problems, *damaged], source.looked_at, config.max_bad_share),
        lambda: refuse_missing_captions(source, config),
        lambda: refuse_no_clips(clips),
        lambda: say_choice(source, config, say),
    )
    if config.contact_sheet is not None:
        _draw_sheet(source, config)
        say(f"contact sheet: {config.contact_sheet}")
    return trains


def _as_worlds(config: InspectClipsConfig) -> WorldDataConfig:
    """The same options as training of world models takes them."""
    names = {field.name for field in dataclasses.fields(WorldDataConfig)} & {
        field.name for field in dataclasses.fields(config)
    }
    given = {name: getattr(config, name) for name in names - {"clip_size", "resolution"}}
    return WorldDataConfig(**given)


def _describe_cameras(clips: WorldSource) -> list[str]:
    """How far the cameras of the videos move and turn, and what they span."""
    first = {cut.video.key: key for key, cut in reversed(clips.cuts.items())}
    records = {record.key: record for record in clips.records}
    paths = [(clips.path_of(records[key]), records[key].size) for key in first.values()]
    if not paths:
        return ["cameras: none that can be used"]
    summaries = [summarize_trajectory(relative_poses(path.c2w)) for path, _ in paths]
    fields = [float(field_of_view(rows_of_intrinsics(path.intrinsics, 1), *size)[0, 0]) for path, size in paths]
    return [
        f"cameras: {len(paths)}; paths of {spread([each.path_length for each in summaries], '.3g')} units, longest "
        f"step {max(each.longest_step for each in summaries):.3g}",
        f"cameras: turned by {spread([each.turned for each in summaries], '.3g')} degrees, and span "
        f"{spread(fields, '.3g')} degrees across",
    ]


def _look_inside(source: IndexedSource, config: VideoDataConfig) -> dict[str, Examined]:
    """Every video decoded from beginning to end; those that can't be become the source's problems."""
    from tqdm import tqdm

    def look(record: Record) -> Examined | Problem:
        try:
            return examine(source.blob(record), config.source_fps)
        except BadPicture as error:
            return Problem(error.name, error.reason)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(tqdm(pool.map(look, source.records), "decoding", total=len(source), disable=None, leave=False))
    source.problems += [each for each in found if isinstance(each, Problem)]
    good = {record.key: each for record, each in zip(source.records, found) if isinstance(each, Examined)}
    source.records = [record for record in source.records if record.key in good]
    source.without_caption = [key for key in source.without_caption if key in good]
    return good


def _describe_times(source: IndexedSource, looked: dict[str, Examined]) -> list[str]:
    seconds = [record.video.seconds for record in source.records]
    lines = [
        f"duration: {spread(seconds, '.2f')} s, {sum(seconds) / 60:.1f} minutes in all",
        f"frames per second: {spread([record.video.fps for record in source.records], '.4g')}",
    ]
    variable = {key: each.timing for key, each in looked.items() if each.timing.variable}
    for key, timing in variable.items():
        lines.append(
            f"variable frame rate: {key}: {timing.shortest * 1000:.0f} to {timing.longest * 1000:.0f} ms from frame to "
            "frame"
        )
    if looked:
        lines.append(f"with a variable frame rate: {len(variable)} of {len(looked)}; frames are taken by their times")
    codecs = Counter(record.video.codec for record in source.records)
    lines.append("coded as: " + ", ".join(f"{codec} {count}" for codec, count in codecs.most_common()))
    return lines


def _describe_clips(clips: ClipSource) -> list[str]:
    config = clips.config
    of_each = Counter(cut.video.key for cut in clips.cuts.values())
    seconds = config.clip_frames / config.clip_fps
    lines = [
        f"clips of {config.clip_frames} frames at {config.clip_fps:g} per second ({seconds:.2f} s): {len(clips)} in "
        f"{len(of_each)} of {len(clips.videos)} videos"
    ]
    if of_each:
        lines[0] += f", {min(of_each.values())} to {max(of_each.values())} of each, {clips.coverage}"
    return [*lines, *clips.notes]


def _plan(clips: ClipSource, config: InspectClipsConfig) -> BucketPlan:
    table = clip_sizes(config, _SAMPLE_SIZE, _FACTOR, _PATCH)
    sizes = [record.size for record in clips.records]
    return assign_buckets(sizes, table, minimum=config.batch_size, rare=config.rare_buckets)


def _draw_sheet(source: IndexedSource, config: InspectClipsConfig) -> None:
    """First, middle and last frames of videos that are spread evenly over the data."""
    records: Sequence[Record] = source.records
    chosen = np.unique(np.linspace(0, len(records) - 1, min(_SHEET, len(records))).round().astype(int)).tolist()
    cells, labels = [], []
    for index in chosen:
        record = records[index]
        try:
            frames = first_pixels(source.blob(record), (0.0, 0.5, 1.0), config.source_fps)
        except BadPicture:  # named above, if pixels were asked for
            continue
        frames = [*frames, *frames[-1:] * (3 - len(frames))]
        label = short(record.key.rpartition("/")[2], 24).encode("ascii", "replace").decode()
        cells += [picture_cell(frame, *record.size) for frame in frames]
        labels += [label, "middle", f"end, {record.video.seconds:.1f} s"]
    if not cells:
        raise UserError(f"--contact-sheet {config.contact_sheet}: none of the videos can be decoded")
    save_png(config.contact_sheet, image_grid(cells, columns=3 if len(chosen) < 4 else 6, labels=labels))
