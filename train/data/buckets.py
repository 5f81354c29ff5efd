"""Sizes that pictures are trained at: each picture goes to the size of the model's table whose shape is nearest.

The tables are those that the pipelines sample at (``sana_jax.pipelines.resolution``), so that a model is trained at the
sizes that it is asked for later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from kernels.typing import Int
from sana_jax.errors import UserError
from sana_jax.pipelines.resolution import BINNED_FACTOR, BINS, Bin, nearest_bin
from train.data.decoding import covering_size


class Bucket(NamedTuple):
    """A size in pixels that batches are made at."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class BucketPlan:
    """Which picture is trained at which size.

    Attributes:
        buckets: the sizes in use, from wide to tall.
        bucket_of: for each picture the index of its size in ``buckets``.
        counts: pictures of each size.
        merged: (from, to, pictures) for each rare size whose pictures went to another.
        repeated: (size, pictures, at least) for each size whose pictures are to be repeated to fill a batch.
        enlarged: pictures that are smaller than their size.
        cropped: pictures of which more than a hundredth lies outside of their size.
        lines: all of it in words.
    """

    buckets: tuple[Bucket, ...]
    bucket_of: Int[np.ndarray, " N"]
    counts: tuple[int, ...]
    merged: tuple[tuple[Bucket, Bucket, int], ...]
    repeated: tuple[tuple[Bucket, int, int], ...]
    enlarged: int
    cropped: int
    lines: tuple[str, ...]


def size_table(
    sample_size: int, factor: int, resolution: int | None = None, *, aspect_buckets: bool = True
) -> tuple[Bin, ...]:
    """The sizes that a model is trained at.

    A published table where the model has one, the one of ``resolution`` where that is named; a resolution without a
    table has its sizes scaled from the model's own. A model without a table has one square size.

    Args:
        sample_size: the transformer's: latents along the side of a square.
        factor: pixels per latent.
        resolution: pixels along the side of a square; None: the model's own.
        aspect_buckets: False: the square alone.

    Raises:
        UserError: a resolution that is no multiple of ``factor``.
    """
    own = sample_size * factor
    resolution = own if resolution is None else resolution
    if resolution < factor or resolution % factor:
        nearest = max(1, round(resolution / factor)) * factor
        choose = f"choose {nearest}, or leave it out for the model's own, {own}"
        if nearest == own:
            choose = f"leave it out for the model's own, {own}"
        raise UserError(
            f"--data.resolution {resolution} is not allowed; this model needs a multiple of {factor} px: {choose}"
        )
    tables = BINS if factor == BINNED_FACTOR else {}
    if not aspect_buckets or sample_size not in tables:
        return (Bin(1.0, resolution, resolution),)
    if resolution // factor in tables:
        return tables[resolution // factor]
    return scaled_table(tables[sample_size], own, resolution, factor)


def scaled_table(table: Sequence[Bin], own: int, resolution: int, multiple: int) -> tuple[Bin, ...]:
    """A table's sizes for another resolution, each once, from wide to tall.

    Args:
        table: the sizes.
        own: its resolution: pixels along the side of its square.
        resolution: the one wanted.
        multiple: pixels of which every side is a multiple, the nearest one.
    """

    def scaled(side: int) -> int:
        return max(1, round(side * resolution / own / multiple)) * multiple

    sizes = {(scaled(height), scaled(width)) for _, height, width in table}
    return tuple(sorted(Bin(height / width, height, width) for height, width in sizes))


def assign_buckets(
    sizes: Sequence[tuple[int, int]],
    table: Sequence[Bin],
    *,
    minimum: int,
    rare: Literal["merge", "repeat"] = "merge",
) -> BucketPlan:
    """The size of each picture.

    Args:
        sizes: (height, width) of each picture.
        table: the sizes to choose from.
        minimum: pictures that a size needs, which is a batch; sizes with fewer are rare.
        rare: ``merge``: the pictures of a rare size go to the size in use whose shape is nearest, the rarest first,
            until none is rare or one is left; ``repeat``: they stay, and are to be repeated.
    """
    table = tuple(table)
    place = {each: index for index, each in enumerate(table)}
    chosen = np.asarray([place[nearest_bin(*size, table)] for size in sizes], np.int64).reshape(len(sizes))
    original = chosen.copy()
    while rare == "merge":
        used, counts = np.unique(chosen, return_counts=True)
        if len(used) < 2 or counts.min() >= minimum:
            break
        rarest = int(used[counts.argmin()])
        others = [int(index) for index in used if index != rarest]
        into = min(others, key=lambda index: abs(math.log(_shape(table[index]) / _shape(table[rarest]))))
        chosen[chosen == rarest] = into
    return _plan_of(sizes, table, original, chosen, minimum)


def spread_over(sizes: Sequence[tuple[int, int]], shares: Mapping[Bucket, int], *, minimum: int) -> BucketPlan:
    """Spreads pictures over given sizes in given proportions: each goes to the nearest shape that has room left.

    Args:
        sizes: (height, width) of each picture.
        shares: the sizes, and how many pictures each should have relative to the others; each has one at least, where
            there are as many pictures as sizes.
        minimum: pictures of a batch, for what is said.
    """
    table = tuple(sorted(Bin(_shape(each), *each) for each in shares))
    wanted = np.asarray([shares[_bucket(each)] for each in table], np.float64)
    wanted *= len(sizes) / wanted.sum()
    room = np.maximum(np.floor(wanted), 1).astype(np.int64)
    while room.sum() < len(sizes):
        room[(wanted - room).argmax()] += 1
    while room.sum() > max(len(sizes), len(table)):
        room[np.where(room > 1, room - wanted, -np.inf).argmax()] -= 1
    shapes = np.log([height / width for height, width in sizes])
    distances = np.abs(shapes[:, None] - np.log([each.ratio for each in table]))
    chosen = np.full(len(sizes), -1, np.int64)
    for place in distances.ravel().argsort(kind="stable").tolist():
        picture, size = divmod(place, len(table))
        if chosen[picture] < 0 and room[size]:
            chosen[picture] = size
            room[size] -= 1
    return _plan_of(sizes, table, chosen, chosen, minimum)


def _plan_of(
    sizes: Sequence[tuple[int, int]],
    table: Sequence[Bin],
    original: Int[np.ndarray, " N"],
    chosen: Int[np.ndarray, " N"],
    minimum: int,
) -> BucketPlan:
    """The plan of pictures whose sizes, first and last, are these of the table."""
    moves, moved = np.unique(np.stack([original, chosen], -1)[original != chosen], axis=0, return_counts=True)
    merged = tuple((_bucket(table[a]), _bucket(table[b]), int(count)) for (a, b), count in zip(moves, moved))
    used, bucket_of, counts = np.unique(chosen, return_inverse=True, return_counts=True)
    buckets = tuple(_bucket(table[index]) for index in used)
    repeated = tuple((bucket, int(count), minimum) for bucket, count in zip(buckets, counts) if count < minimum)
    targets = [buckets[index] for index in bucket_of.reshape(-1).tolist()]
    scaled = [covering_size(size, *target) for size, target in zip(sizes, targets)]
    enlarged = [height / size[0] for (height, _), size in zip(scaled, sizes) if height > size[0]]
    lost = [1 - math.prod(target) / math.prod(size) for size, target in zip(scaled, targets)]
    lost = [share for share in lost if share > 0.01]  # less is rounding
    fields = (buckets, bucket_of.reshape(-1), tuple(counts.tolist()), merged, repeated, len(enlarged), len(lost))
    return BucketPlan(*fields, _lines(BucketPlan(*fields, ()), max(enlarged, default=1.0), lost))


def _bucket(size: Bin) -> Bucket:
    return Bucket(size.height, size.width)


def _shape(size: Bin | Bucket) -> float:
    return size.height / size.width


def _lines(plan: BucketPlan, most: float, lost: Sequence[float]) -> tuple[str, ...]:
    sizes = ", ".join(f"{bucket}: {count}" for bucket, count in zip(plan.buckets, plan.counts))
    lines = [f"sizes (height x width: pictures): {sizes}" if sizes else "sizes: none, there are no pictures"]
    if plan.merged:
        moves = ", ".join(f"{count} of {rare} to {into}" for rare, into, count in plan.merged)
        lines.append(f"rare sizes merged into their neighbours: {moves}")
    if plan.repeated:
        few = ", ".join(f"{bucket} ({count})" for bucket, count, _ in plan.repeated)
        lines.append(f"sizes with fewer pictures than the {plan.repeated[0][2]} of a batch, to be repeated: {few}")
    if plan.enlarged:
        lines.append(f"{plan.enlarged} pictures are smaller than their size and are enlarged, by up to {most:.2f}")
    if lost:
        mean, most = sum(lost) / len(lost), max(lost)
        lines.append(f"{len(lost)} pictures are cropped: {mean:.0%} of their area on average, {most:.0%} at most")
    return tuple(lines)
