"""DreamBooth's data: a subject's pictures, and pictures of its class beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from kernels.typing import Float, Int
from sana_jax.errors import UserError
from sana_jax.images import save_png
from train.batch import Batch
from train.data.cached import CachedData, Shape
from train.data.loader import BatchOrder, Plan
from train.data.pinned import CLASS, DATA
from train.data.sources.listing import PICTURE_SUFFIXES

LOSS_WEIGHT = "loss_weight"
_OF_CLASS = 1 << 33  # added to the seed, which is below 2**32: the class has an order of its own


class PriorOrder:
    """Which samples the n-th batch has: those of the subject and those of its class take turns, row by row.

    The shape of a batch is drawn from the subject. Half of every batch is of the subject; where the batch size is odd,
    half of every two, which are of one shape.
    """

    def __init__(self, subject: BatchOrder, prior: BatchOrder, first_of_prior: int, batch_size: int):
        self._subject, self._prior, self._first, self._batch_size = subject, prior, first_of_prior, batch_size

    def plan(self, number: int) -> Plan:
        """The batch of this number, from 0."""
        pair, second = divmod(number, 2)
        shape, turn = self._subject.turn(pair)
        sides = self._subject.samples(shape, turn), self._prior.samples(shape, turn) + self._first
        rows = np.stack(sides, axis=1).ravel()
        first = second * self._batch_size
        return Plan(rows[first : first + self._batch_size], self._subject.choices(number))


class WithPrior:
    """Two data sets as one, in which a sample is as likely to be of the subject as of its class.

    Everything but the samples is the subject's. A sample has its weight in the loss as the condition ``loss_weight``:
    1 for the subject, ``weight`` for its class.

    Raises:
        UserError: the class has no picture of one of the subject's shapes.
    """

    def __init__(self, subject: CachedData, prior: CachedData, weight: float):
        self.subject, self.prior, self.weight = subject, prior, weight
        if missing := [shape for shape in subject.buckets if shape not in prior.buckets]:
            raise UserError(
                f"the class has no picture with latents of {'x'.join(map(str, missing[0]))}, which the subject has, in "
                f"the cache {prior.directory}: raise --prior.pictures, or add pictures to --prior.path"
            )
        self.buckets: dict[Shape, Int[np.ndarray, " n"]] = {
            shape: np.concatenate([own, np.asarray(prior.buckets[shape]) + len(subject)])
            for shape, own in subject.buckets.items()
        }

    def order(self, seed: int, batch_size: int) -> PriorOrder:
        """Which samples the n-th batch has."""
        prior = {shape: self.prior.buckets[shape] for shape in self.subject.buckets}
        orders = BatchOrder(self.subject.buckets, seed, batch_size), BatchOrder(prior, seed + _OF_CLASS, batch_size)
        return PriorOrder(*orders, len(self.subject), batch_size)

    @property
    def cached(self) -> dict[str, CachedData]:
        """The caches that the data is read from, by the name of a run's list of their samples."""
        return {DATA: self.subject, CLASS: self.prior}

    def __len__(self) -> int:
        return len(self.subject) + len(self.prior)

    def __getattr__(self, name: str):
        # captions, encodings, validation and previews are those of the subject
        return getattr(self.subject, name)

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """As ``CachedData.batch``, with the samples' weights."""
        indices = np.asarray(indices)
        choices = np.zeros((len(indices), 2)) if choices is None else np.asarray(choices)
        of_prior = indices >= len(self.subject)
        parts = [
            (np.flatnonzero(~of_prior), self.subject, 0, 1.0),
            (np.flatnonzero(of_prior), self.prior, len(self.subject), self.weight),
        ]
        batches = [
            (rows, source.batch(indices[rows] - first, choices[rows]), weight)
            for rows, source, first, weight in parts
            if len(rows)
        ]
        joined = []
        for field in ("latents", "prompt_embeds", "prompt_attention_mask"):
            first = getattr(batches[0][1], field)
            array = np.empty((len(indices), *first.shape[1:]), first.dtype)
            for rows, batch, _ in batches:
                array[rows] = getattr(batch, field)
            joined.append(array)
        weights = np.empty(len(indices), np.float32)
        for rows, _, weight in batches:
            weights[rows] = weight
        return Batch(*joined, {LOSS_WEIGHT: weights})

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"{self.subject.describe()}; of the class {len(self.prior):,} pictures, of weight {self.weight:g}"


def draw_prior_pictures(
    folder: Path,
    caption: str,
    count: int,
    draw: Callable[[str, int, tuple[int, int]], object],
    say: Callable[[str], None],
    *,
    sizes: Mapping[tuple[int, int], int],
    drawn_by: Mapping[str, object],
) -> int:
    """Fills a folder of pictures of a class up to ``count``; each picture appears whole or not at all.

    Args:
        folder: may be missing; pictures that are there count, whatever they are called.
        caption: of the class.
        count: how many there should be.
        draw: a PIL picture of a caption, a seed and a size (height, width).
        say: prints a line.
        sizes: those of the subject with its pictures of each: the class is drawn in them, in the same proportions.
        drawn_by: what draws them, which is written into each beside the caption: model, steps.

    Returns:
        How many were drawn.

    Raises:
        UserError: pictures there were drawn of another caption.
    """
    found = [path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES] if folder.is_dir() else []
    others = _drawn_otherwise(found, caption, drawn_by)
    note = f"; {others} of them were drawn by another model, or in another number of steps" if others else ""
    missing = count - len(found)
    drawing = f"the base model draws {missing} more" if missing > 0 else "none is drawn"
    say(f"prior: {len(found)} pictures of {caption!r} in {folder}; {drawing}{note}")
    if missing <= 0:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    turns = [size for size, share in sizes.items() for _ in range(share)]
    drawn = seed = 0
    while drawn < missing:
        path = folder / f"drawn_{seed:05d}.png"
        if not path.exists():
            picture = draw(caption, seed, turns[seed * len(turns) // count % len(turns)])
            save_png(path, picture, metadata={"prompt": caption, "seed": seed, **drawn_by})
            drawn += 1
            if drawn % 10 == 0:
                say(f"prior: {drawn} drawn, {missing - drawn} to go")
        seed += 1
    return drawn


def _drawn_otherwise(paths: Sequence[Path], caption: str, drawn_by: Mapping[str, object]) -> int:
    """How many pictures say of themselves that something else drew them.

    Raises:
        UserError: one was drawn of another caption.
    """
    from PIL import Image

    others = 0
    for path in paths:
        if not (path.name.startswith("drawn_") and path.suffix == ".png"):
            continue
        try:
            with Image.open(path) as picture:
                said = dict(picture.info)
        except OSError:  # named where it is read
            continue
        if said.get("prompt", caption) != caption:
            raise UserError(
                f"{path} was drawn of {said['prompt']!r}, and --prior.caption is {caption!r}; name another folder with "
                "--prior.path, or leave it out"
            )
        others += any(str(said.get(name, value)) != str(value) for name, value in drawn_by.items())
    return others
