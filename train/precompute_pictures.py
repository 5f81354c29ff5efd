"""The work of ``train.precompute``: what a cache has, what is missing, and how pictures become its records."""

from __future__ import annotations

import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from configs.data import ImageDataConfig
from configs.prior import ClassPicturesConfig
from configs.schema import RunConfig
from sana_jax.compilation import readable_bytes
from sana_jax.errors import UserError
from sana_jax.pipelines.model_directory import ModelDirectory
from sana_jax.pipelines.resolution import Bin
from train.data.buckets import Bucket, BucketPlan, assign_buckets, spread_over
from train.data.cache import LATENTS, PROMPTS, SAMPLES_FILE, CacheWriter, Name
from train.data.cache_plan import signature, table_of, variants, view_of
from train.data.captions import CaptionRule, caption_weights
from train.data.check_picture import draw_check_picture
from train.data.conditions import Condition, Sample, View
from train.data.decoding import BadPicture, decode_picture
from train.data.encoding import (
    PictureEncoder,
    count_tokens,
    latent_dtype,
    latents_of_features,
    prompt_dtype,
)
from train.data.progress import Meter, Moments
from train.data.prompt_records import add_prompts, free
from train.data.shard_filler import ShardFiller
from train.data.source import IndexedSource, Problem, Record, refuse_too_many_bad
from train.data.splits import split
from train.preemption import StopRequest

# Batches of pictures that are read and cut ahead of the one that is being encoded.
BATCHES_AHEAD = 2
FEATURES_AT_ONCE = 64
_THREADS = 8  # that look at files: they wait for the disk

Say = Callable[[str], None]


class Item(NamedTuple):
    """A variant of a picture that is to be encoded."""

    record: Record
    variant: str
    view: View
    signature: str

    @property
    def name(self) -> Name:
        """Of its record in the cache."""
        return self.record.key, self.variant


@dataclass
class PictureRun:
    """One pass over the data; the methods in their order are what ``precompute`` does."""

    many: ClassVar[str] = "pictures"

    config: RunConfig
    model: ModelDirectory
    source: IndexedSource
    encoder: PictureEncoder
    conditions: tuple[Condition, ...]
    cache: CacheWriter
    say: Say
    stop: StopRequest | None
    problems: list[Problem] = field(default_factory=list)
    bucket_of: dict[str, Bucket] = field(default_factory=dict)
    signature_of: dict[str, str] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    features: list[Item] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    has_new: bool = False

    @property
    def latent_dtype(self) -> str:
        """What latents are kept in."""
        return latent_dtype(self.config.data, self.model.autoencoder)

    # -- plan --------------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Finds out what is there, what is missing, and whether there is room for it; says so."""
        data, model = self.config.data, self.model
        records = self._usable_records()
        _refuse_what_training_would(records, data)
        self._check_widths(records)
        table = table_of(data, model)
        pictures = [record for record in records if record.size is not None]
        sizes = self._assigned([record.size for record in pictures], table)
        for line in sizes.lines if pictures else ():
            self.say(f"data: {line}")
        for record, index in zip(pictures, sizes.bucket_of):
            self.bucket_of[record.key] = sizes.buckets[index]
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="stamps") as pool:
            for record, stamps in zip(records, pool.map(self._stamps, records)):
                bucket = self.bucket_of.get(record.key)
                self.signature_of[record.key] = signature(record, bucket, self.conditions, stamps)
        present = self.cache.present(LATENTS)
        self.items = self._missing_items(pictures, present)
        self.features = self._missing_features([record for record in records if record.size is None], present)
        wanted = dict.fromkeys(caption.text for record in records for caption in record.captions)
        wanted |= dict.fromkeys(self.config.preview.prompts)
        wanted = [text for text in wanted if text.strip()]
        encoded = self.cache.present(PROMPTS)
        self.texts = [text for text in wanted if ("text", text) not in encoded]
        self._say_plan(records, present, wanted)
        self._check_room()

    def _usable_records(self) -> list[Record]:
        records = []
        for record in self.source.records:
            reason = next((why for c in self.conditions if (why := c.missing(record)) is not None), None)
            if reason is None:
                records.append(record)
            else:
                self.leave_out(record.key, reason)
        if not records:
            raise UserError(
                f"{self.source.name} has no {self.many} that can be used; python -m train.inspect_data says why"
            )
        return records

    def _check_widths(self, records: Sequence[Record]) -> None:
        """Raises ``UserError`` where encoders of tokens are for vectors of another size than the data has."""
        encoders = {} if self.config.tokens is None else self.config.tokens.encoders
        for condition in self.conditions:
            encoder = encoders.get(condition.name)
            found = None if encoder is None else self._width(condition, records)
            if encoder is not None and found != encoder.width:
                wanted = "a number" if encoder.width is None else f"a vector of {encoder.width} numbers"
                there = "no vector" if found is None else f"a vector of {found} numbers"
                mend = f"--tokens.{condition.name}.kind vector --tokens.{condition.name}.width {found}"
                mend = mend if found else f"--data.conditions {condition.name}=vector, or =siglip:DIRECTORY"
                raise UserError(
                    f"--tokens.{condition.name} reads {wanted}, and the data's {condition.name} is {there}; set {mend}"
                )

    def _width(self, condition: Condition, records: Sequence[Record]) -> int | None:
        """Of the first vector that can be read."""
        for record in records:
            try:
                return condition.width(self.source, record)
            except BadPicture:  # named where it is encoded
                continue
        return None

    def _stamps(self, record: Record) -> dict[str, str]:
        """Of the files that conditions read."""
        read = (condition.name for condition in self.conditions if condition.reads_file(record))
        return {name: self.source.stamp(record, name) for name in read}

    def _assigned(self, sizes: Sequence[tuple[int, int]], table: Sequence[Bin]) -> BucketPlan:
        """The size of each picture."""
        data, batch_size = self.config.data, self.config.batch_size
        if isinstance(data, ClassPicturesConfig):
            shares = {Bucket(height, width): count for height, width, count in data.sizes}
            return spread_over(sizes, shares, minimum=batch_size)
        return assign_buckets(sizes, table, minimum=batch_size, rare=data.rare_buckets)

    def _missing_items(self, records: Sequence[Record], present: Mapping[Name, str]) -> list[Item]:
        """What is to be encoded, by size; within a size in the data's order, what failed before at the end."""
        failed = self.cache.left_out()
        names = variants(self.config.data)
        items = []
        for record in records:
            bucket, current = self.bucket_of[record.key], self.signature_of[record.key]
            for variant in names:
                if present.get((record.key, variant)) != current:
                    items.append(Item(record, variant, view_of(record.key, variant, bucket), current))
        return sorted(items, key=lambda item: (*item.view[:2], item.name in failed))

    def _missing_features(self, records: Sequence[Record], present: Mapping[Name, str]) -> list[Item]:
        """Latents of the data's own that are to be taken over."""
        names = variants(self.config.data)
        if not records:
            return []
        if names != ("center",):
            raise UserError(
                f"{self.source.name} has latents instead of pictures, which can't be cropped or mirrored: leave "
                "--data.crop, --data.crops and --data.flip out"
            )
        self.say(
            f"data: {len(records):,} samples have latents of their own, which are taken as they are; nothing says "
            "whether this model's autoencoder has made and scaled them. Encoded captions beside them are not read"
        )
        items = (Item(record, "center", View(0, 0), self.signature_of[record.key]) for record in records)
        return [item for item in items if present.get(item.name) != item.signature]

    def _say_plan(self, records: Sequence[Record], present: Mapping, wanted: Sequence[str]) -> None:
        keys = {record.key for record in records}
        dropped = {key for key, _ in present if key not in keys}
        if dropped:
            self.say(
                f"cache: {len(dropped)} {self.many} in it are no longer in the data and are dropped: {_some(dropped)}"
            )
        changed = sum((item.name in present) for item in [*self.items, *self.features])
        if changed:
            self.say(f"cache: {changed} {self.many} have changed, or their sizes or inputs have; they are made again")
        count = len(records) * len(variants(self.config.data))
        pictures = (
            f"{count:,} {self.many}" if count == len(records) else f"{count:,} variants of {len(records):,} {self.many}"
        )
        self.say(
            f"cache: {self.cache.directory}: {pictures}, {count - len(self.items):,} of them there; {len(wanted):,} "
            f"distinct prompts, {len(wanted) - len(self.texts):,} of them there"
        )

    def _check_room(self) -> None:
        width = jnp.dtype(self.latent_dtype).itemsize
        pictured = 1 + sum(not condition.of_one_shape for condition in self.conditions)
        latents = sum(
            int(np.prod(self.encoder.latent_shape(*view))) * count * width * pictured
            for view, count in Counter(item.view[:2] for item in self.items).items()
        )
        width = jnp.dtype(prompt_dtype(self.model.text_encoder)).itemsize
        prompts = count_tokens(self.model.text_encoder, self.texts) * self.model.text_encoder.embedding_dim * width
        free = shutil.disk_usage(self.cache.directory).free
        if not latents + prompts:
            return
        self.say(
            f"cache: to be added: {readable_bytes(latents)} of latents and about {readable_bytes(prompts)} of prompts; "
            f"free on the disk: {readable_bytes(free)}"
        )
        if latents + prompts > free:
            raise UserError(
                f"the cache {self.cache.directory} needs about {readable_bytes(latents + prompts)} more, and "
                f"{readable_bytes(free)} are free there: make room, or name a folder on another disk with --data.cache"
            )

    # -- encode ------------------------------------------------------------------------------------------------------

    def prompts(self) -> None:
        """Encodes the prompts that are missing, and then lets go of the text encoder."""
        add_prompts(self.cache, self.model.text_encoder, self.texts, self.say, self.stop)
        free(self.model.text_encoder)

    def pictures(self) -> None:
        """Encodes the pictures that are missing."""
        if not self.items:
            return
        self.has_new = True
        meter = Meter(self.many, len(self.items), self.say)
        moments = Moments()
        filler = ShardFiller(self.cache, LATENTS, self.stop)
        self._known_shapes()
        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="pictures")
        try:
            with filler:
                under_way = None
                for batch in self._read_ahead(pool):
                    computed = self._encode(*batch, filler)
                    if under_way is not None:  # the device works on this batch while the one before is written
                        self._write(*under_way, filler, moments, meter)
                    under_way = computed
                self._write(*under_way, filler, moments, meter)
        finally:
            pool.shutdown(cancel_futures=True)
        meter.close()
        self.say(
            f"latents: mean {moments.mean:.3f}, standard deviation {moments.deviation:.3f} over {moments.count:,} "
            "values (about 0 and 1 are expected)"
        )
        self.say_left_out()

    def say_left_out(self) -> None:
        """How many can't be used."""
        if self.problems:
            self.say(f"left out: {len(self.problems)} pictures, each named above")

    def copy_features(self) -> None:
        """Takes over the latents that the data has."""
        if not self.features:
            return
        meter = Meter("features", len(self.features), self.say)
        channels, factor = self.model.autoencoder.latent_channels, self.model.autoencoder.spatial_factor
        self._known_shapes()
        with ShardFiller(self.cache, LATENTS, self.stop) as filler:
            for number, item in enumerate(self.features, 1):
                record = item.record
                try:
                    latents = latents_of_features(record.key, self.source.features(record), channels)
                    view = View(latents.shape[0] * factor, latents.shape[1] * factor)
                    sample = Sample(self.source, record, view, None)
                    inputs = {condition.name: condition.prepare(sample) for condition in self.conditions}
                    if problem := self._other_shape(inputs):
                        raise BadPicture(record.key, problem)
                    arrays = {c.name: np.asarray(c.encode(np.asarray(inputs[c.name])[None])) for c in self.conditions}
                    rows = [(0, item)], {"latents": latents[None], **arrays}
                except BadPicture as error:
                    filler.leave_out(item.name, str(error))
                    self.leave_out(record.key, str(error))
                    continue
                self._write(*rows, 1, filler, None, meter, ends=number % FEATURES_AT_ONCE == 0)
        meter.close()

    def _read_ahead(self, pool: ThreadPoolExecutor) -> Iterator[tuple[list[Item], int, list[Future]]]:
        """Batches of one size, with the futures of their pictures; the next ones are being read meanwhile."""
        waiting: deque = deque()
        for batch, size in self._batches():
            by_record: dict[str, list[Item]] = {}
            for item in batch:
                by_record.setdefault(self.file_of(item.record), []).append(item)
            futures = [pool.submit(self.prepare, items) for items in by_record.values()]
            # in the futures' order
            waiting.append(([item for items in by_record.values() for item in items], size, futures))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _batches(self) -> Iterator[tuple[list[Item], int]]:
        """Batches of one size, and how many rows they are padded to.

        The same data is always cut into the same batches, also where a run goes on that was interrupted: shards end
        where batches do. A result may depend on its batch in its last bit.
        """
        counts = Counter(self.bucket_of.values())
        by_size: dict[tuple[int, int], list[Item]] = {}
        for item in self.items:
            by_size.setdefault(item.view[:2], []).append(item)
        for (height, width), items in by_size.items():
            everything = counts[Bucket(height, width)] * len(variants(self.config.data))
            size = self.encoder.batch_size(height, width, everything)
            for first in range(0, len(items), size):
                yield items[first : first + size], size

    def file_of(self, record: Record) -> str:
        """The key of the file that a record is read from: what is read from one file is read at once."""
        return record.key

    def prepare(self, items: Sequence[Item]) -> list[dict[str, np.ndarray] | BadPicture]:
        """Pixels, and what conditions need, of some variants of one picture."""
        record = items[0].record
        try:
            data = self.source.read(record)
            whole = decode_picture(data, name=record.key, channels=self.model.autoencoder.image_channels)
            prepared = []
            for item in items:
                sample = Sample(self.source, record, item.view, item.view.of(whole))
                inputs = {condition.name: condition.prepare(sample) for condition in self.conditions}
                prepared.append({"latents": sample.picture, **inputs})
            return prepared
        except BadPicture as error:
            return [error] * len(items)

    def _encode(self, batch: list[Item], size: int, futures: list[Future], filler: ShardFiller) -> tuple:
        """Starts a batch; returns (rows, arrays) to be written."""
        prepared = [each for future in futures for each in future.result()]
        rows: list[tuple[int, Item]] = []
        columns: dict[str, np.ndarray] = {}
        for row, (item, inputs) in enumerate(zip(batch, prepared)):
            problem = str(inputs) if isinstance(inputs, BadPicture) else self._other_shape(inputs)
            if problem is not None:
                filler.leave_out(item.name, problem)
                self.leave_out(item.record.key, problem)
                continue
            for name, array in inputs.items():
                if name not in columns:
                    columns[name] = np.zeros((size, *np.shape(array)), np.asarray(array).dtype)
                columns[name][row] = array
            rows.append((row, item))
        if not rows:
            return [], {}, len(batch)
        arrays = {"latents": self.encoder(columns["latents"])}
        arrays |= {condition.name: condition.encode(columns[condition.name]) for condition in self.conditions}
        return rows, arrays, len(batch)

    def _write(
        self, rows, arrays, count: int, filler: ShardFiller, moments: Moments | None, meter: Meter, *, ends: bool = True
    ) -> None:
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        dtypes = {condition.name: "float32" for condition in self.conditions if condition.of_one_shape}
        for row, item in rows:
            own = {name: array[row] for name, array in arrays.items()}
            if bad := [name for name, array in own.items() if not np.isfinite(array).all()]:
                reason = f"{item.record.key} encodes to {bad[0]} that are not finite"
                filler.leave_out(item.name, reason)
                self.leave_out(item.record.key, reason)
                continue
            if moments is not None:
                moments.add(own["latents"])
            own = {name: array.astype(dtypes.get(name, self.latent_dtype)) for name, array in own.items()}
            filler.add(item.name, own, item.signature)
        meter.advance(count)
        if ends:
            filler.batch_ends()

    def _known_shapes(self) -> None:
        """Shapes that vectors must have, where the cache has some already."""
        for shard in self.cache.shards:
            for layout in shard.layouts if shard.kind == LATENTS else ():
                shapes = {name: shape for name, _, shape in layout.arrays}
                self.shapes = {c.name: shapes[c.name] for c in self.conditions if c.of_one_shape and c.name in shapes}

    def _other_shape(self, inputs: Mapping[str, np.ndarray]) -> str | None:
        for condition in self.conditions:
            shape = np.shape(inputs[condition.name])
            if condition.of_one_shape and shape != (wanted := self.shapes.setdefault(condition.name, shape)):
                return f"has {condition.name} of shape {shape}; the other pictures' have {wanted}"
        return None

    def leave_out(self, key: str, reason: str) -> None:
        """Names a picture that can't be used, once, and stops if there are too many of them."""
        if any(problem.name == key for problem in self.problems):
            return
        reason = reason.removeprefix(f"{key} ")
        self.problems.append(Problem(key, reason))
        self.say(f"left out: {key} {reason}")
        every = [*self.source.problems, *self.problems]
        refuse_too_many_bad(every, self.source.looked_at, self.config.data.max_bad_share)

    # -- finish ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Writes the list of samples, which makes the cache readable, and draws the check picture."""
        lines = list(self._sample_lines())
        if not lines:
            raise UserError(f"none of the {self.many} of {self.source.name} could be used; each is named above")
        writing = nullcontext() if self.stop is None else self.stop.writing
        path = self.cache.directory / SAMPLES_FILE
        with writing:
            self.cache.write_samples(iter(lines))
        kept = sum(shard.num_bytes for shard in self.cache.shards)
        self.say(f"cache: {len(lines):,} {self.many}, {readable_bytes(kept)} in {len(self.cache.shards)} files; {path}")
        if self.has_new:
            self.draw_check(writing)

    def draw_check(self, writing: AbstractContextManager) -> None:
        """Draws what becomes of some of them."""
        draw_check_picture(self.cache.directory, self.source, self.encoder, self.say, writing)

    def _sample_lines(self) -> Iterator[dict[str, Any]]:
        present: dict[str, dict[str, str]] = {}
        for (key, variant), found in self.cache.present(LATENTS).items():
            present.setdefault(key, {})[variant] = found
        wanted, factor = variants(self.config.data), self.model.autoencoder.spatial_factor
        layouts = self.cache.layouts(LATENTS)
        for record in self.source.records:
            current = self.signature_of.get(record.key)
            there = [name for name, found in present.get(record.key, {}).items() if found == current]
            if current is None or not set(wanted) <= set(there):
                continue
            latents = next(shape for name, _, shape in layouts[record.key, there[0]].arrays if name == "latents")
            yield {
                "key": record.key,
                "size": [latents[-3] * factor, latents[-2] * factor],
                "captions": [[caption.text, caption.kind, caption.score] for caption in record.captions],
                "group": record.group,
                "variants": sorted(there),
                "signatures": dict.fromkeys(sorted(there), current),
            }


def _refuse_what_training_would(records: Sequence[Record], data: ImageDataConfig) -> None:
    """Raises ``UserError`` for a split or a choice of captions that is not possible, before hours are spent."""
    split(records, data.validation_share)
    rule = CaptionRule.of(data)
    of_kinds = {tuple(caption.kind for caption in record.captions): record.captions for record in records}
    for captions in of_kinds.values():
        caption_weights(captions, rule)


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
