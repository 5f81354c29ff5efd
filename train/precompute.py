"""Turns pictures and captions into a cache of latents and encoded prompts: ``python -m train.precompute PRESET ...``.

Takes the options of ``python -m train.main``, which does the same by itself before it trains. An interrupted run goes
on where it stopped; pictures that were added are added, and those that are gone are dropped.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before the imports that take seconds, so that a signal finds someone listening
    from train.preemption import StopRequest

    STOP = StopRequest()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs.data import ImageDataConfig
from configs.schema import RunConfig
from sana_jax.compilation import enable_compilation_cache, readable_bytes
from sana_jax.devices import choose_device, prefer_device
from sana_jax.errors import UserError, run_command_line
from sana_jax.pipelines.model_directory import ModelDirectory
from train.data.buckets import Bucket, assign_buckets
from train.data.cache import (
    LATENTS,
    PROMPTS,
    SAMPLES_FILE,
    CacheIdentity,
    CacheWriter,
    Name,
    read_identity,
)
from train.data.cache_plan import NULL_PROMPT, cache_directory, cache_identity, signature, table_of, variants, view_of
from train.data.check_picture import draw_check_picture
from train.data.conditions import Condition, Encoders, Sample, View, make_conditions
from train.data.decoding import BadPicture, decode_picture
from train.data.encoding import (
    PictureEncoder,
    count_tokens,
    encode_prompts,
    latent_dtype,
    latents_of_features,
    prompt_dtype,
    unpadded,
)
from train.data.progress import Meter, Moments
from train.data.shard_filler import ShardFiller, StoppedError
from train.data.source import IndexedSource, Problem, Record, open_source, refuse_too_many_bad
from train.preemption import StopRequest, exit_status

PROG = "python -m train.precompute"
# Batches of pictures that are read and cut ahead of the one that is being encoded.
BATCHES_AHEAD = 2
FEATURES_AT_ONCE = 64

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


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Runs the command; returns its exit status."""
    from train.base_model import open_encoders
    from train.main import read_command_line

    config = read_command_line(sys.argv[1:] if argv is None else argv)
    if not isinstance(config.data, ImageDataConfig):
        raise UserError(
            f"the preset {config.preset} has its data in memory, so there is nothing to prepare; choose one that "
            "trains on pictures, such as finetune"
        )
    if config.model is None and config.encoders is None:
        raise UserError("--model is missing: its autoencoder and text encoder make the cache; name a model's directory")
    with nullcontext(stop) if stop is not None else closing(StopRequest()) as stop:
        prefer_device(config.device)
        choose_device(config.device)
        enable_compilation_cache()
        parts = open_encoders(config).parts
        directory = precompute(config, parts, say=_print_line, stop=stop, thorough=True)
        stop.nothing_to_lose = True
        if directory is None:
            return exit_status(stop.signal)
    print(f"the cache is ready: {directory}; training takes it with --data.cache {directory}", flush=True)
    return 0


def precompute(
    config: RunConfig,
    model: ModelDirectory,
    *,
    say: Say = print,
    stop: StopRequest | None = None,
    thorough: bool = False,
) -> Path | None:
    """Makes the cache of ``config.data`` with a model's autoencoder and text encoder, or completes one.

    When it returns, neither of the two has its weights in memory. One device of this process computes.

    Args:
        config: its ``data``, ``batch_size``, ``run_dir`` and ``preview.prompts`` are used.
        model: the model.
        say: prints a line.
        stop: a request to stop ends the shard under way and leaves.
        thorough: look for damage inside of the files of a cache that is there, which reads all of it.

    Returns:
        The cache's directory; None if it was asked to stop before the end.

    Raises:
        FileNotFoundError: there is no data.
        CheckpointError: the directory holds a cache of another identity.
        UserError: what is wrong with data, settings or disk.
    """
    # Whatever mesh a run has set, other processes do not take part in this.
    with jax.set_mesh(Mesh(np.asarray(jax.local_devices()[:1]), ("encoders",))):
        return _precompute(config, model, say, stop, thorough)


def _precompute(
    config: RunConfig, model: ModelDirectory, say: Say, stop: StopRequest | None, thorough: bool
) -> Path | None:
    data = config.data
    encoder = PictureEncoder(model.autoencoder)
    channels = model.autoencoder.image_channels
    conditions = make_conditions(data.conditions, Encoders(encoder, channels, say))
    identity = cache_identity(data, model, conditions)
    directory = cache_directory(config, identity)
    if data.path is None:
        return _finished_cache(directory, identity, say)
    source = open_source(data, say)
    with CacheWriter(directory, identity, thorough=thorough, say=say) as cache:
        run = _Run(config, model, source, encoder, conditions, cache, say, stop)
        try:
            run.plan()
            run.prompts()
            run.pictures()
            run.copy_features()
        except StoppedError:
            say(
                f"stopped by {stop.signal.name}; what was finished is kept in {directory}, the same command continues"
                + (f": {_command_line()}" if sys.argv[0].endswith("precompute.py") else "")
            )
            return None
        finally:
            _free(model.text_encoder)
            encoder.free()
            for condition in conditions:
                condition.free()
        run.finish()
    encoder.free()
    return directory


@dataclass
class _Run:
    """One pass over the data; the methods in their order are what ``precompute`` does."""

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
        table = table_of(data, model)
        pictures = [record for record in records if record.size is not None]
        sizes = assign_buckets(
            [record.size for record in pictures], table, minimum=self.config.batch_size, rare=data.rare_buckets
        )
        for line in sizes.lines if pictures else ():
            self.say(f"data: {line}")
        for record, index in zip(pictures, sizes.bucket_of):
            self.bucket_of[record.key] = bucket = sizes.buckets[index]
            self.signature_of[record.key] = signature(record, bucket, self.conditions)
        present = self.cache.present(LATENTS)
        self.items = self._missing_items(pictures, present)
        self.features = self._missing_features([record for record in records if record.size is None], present)
        wanted = dict.fromkeys(caption.text for record in records for caption in record.captions)
        wanted |= dict.fromkeys(self.config.preview.prompts)
        wanted = [text for text in wanted if text.strip()]
        encoded = self.cache.present(PROMPTS)
        self.texts = [text for text in wanted if ("text", text) not in encoded]
        self._say_plan(records, present, wanted, encoded)
        self._check_room()

    def _usable_records(self) -> list[Record]:
        records = []
        for record in self.source.records:
            reason = next((why for c in self.conditions if (why := c.missing(record)) is not None), None)
            if reason is None:
                records.append(record)
            else:
                self._leave_out(record.key, reason)
        if not records:
            raise UserError(
                f"{self.source.name} has no pictures that can be used; python -m train.inspect_data says why"
            )
        return records

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
        for record in records:
            self.signature_of[record.key] = signature(record, None, self.conditions)
        items = (Item(record, "center", View(0, 0), self.signature_of[record.key]) for record in records)
        return [item for item in items if present.get(item.name) != item.signature]

    def _say_plan(self, records: Sequence[Record], present: Mapping, wanted: Sequence[str], encoded: Mapping) -> None:
        keys = {record.key for record in records}
        dropped = {key for key, _ in present if key not in keys}
        if dropped:
            self.say(
                f"cache: {len(dropped)} pictures in it are no longer in the data and are dropped: {_some(dropped)}"
            )
        changed = sum((item.name in present) for item in [*self.items, *self.features])
        if changed:
            self.say(f"cache: {changed} pictures have changed, or their sizes or inputs have; they are made again")
        count = len(records) * len(variants(self.config.data))
        pictures = (
            f"{count:,} pictures" if count == len(records) else f"{count:,} variants of {len(records):,} pictures"
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
        encoder, dtype = self.model.text_encoder, prompt_dtype(self.model.text_encoder)
        filler = ShardFiller(self.cache, PROMPTS, self.stop)
        meter = Meter("prompts", len(self.texts), self.say)
        with filler:
            if NULL_PROMPT not in self.cache.present(PROMPTS):
                embeds, mask = encoder.null_encoding()
                filler.add(NULL_PROMPT, {"tokens": unpadded(embeds[0], mask[0]).astype(dtype)})
                filler.batch_ends()
            for batch in encode_prompts(encoder, self.texts, self.say):
                for prompt in batch:
                    if not np.isfinite(prompt.tokens).all():
                        raise UserError(
                            f"the prompt {prompt.text[:80]!r} encodes to values that are not finite; see --model"
                        )
                    filler.add(("text", prompt.text), {"tokens": prompt.tokens.astype(dtype)})
                meter.advance(len(batch))
                filler.batch_ends()
        meter.close()
        _free(encoder)

    def pictures(self) -> None:
        """Encodes the pictures that are missing."""
        if not self.items:
            return
        self.has_new = True
        meter = Meter("pictures", len(self.items), self.say)
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
        bad = len(self.problems)
        if bad:
            self.say(f"left out: {bad} pictures, each named above")

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
                    self._leave_out(record.key, str(error))
                    continue
                self._write(*rows, 1, filler, None, meter, ends=number % FEATURES_AT_ONCE == 0)
        meter.close()

    def _read_ahead(self, pool: ThreadPoolExecutor) -> Iterator[tuple[list[Item], int, list[Future]]]:
        """Batches of one size, with the futures of their pictures; the next ones are being read meanwhile."""
        waiting: deque = deque()
        for batch, size in self._batches():
            by_record: dict[str, list[Item]] = {}
            for item in batch:
                by_record.setdefault(item.record.key, []).append(item)
            futures = [pool.submit(self._prepare, items) for items in by_record.values()]
            waiting.append((batch, size, futures))
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

    def _prepare(self, items: Sequence[Item]) -> list[dict[str, np.ndarray] | BadPicture]:
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
                self._leave_out(item.record.key, problem)
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
                self._leave_out(item.record.key, reason)
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

    def _leave_out(self, key: str, reason: str) -> None:
        """Names a picture that can't be used, once, and stops if there are too many of them."""
        if any(problem.name == key for problem in self.problems):
            return
        self.problems.append(Problem(key, reason))
        self.say(f"left out: {reason if reason.startswith(key) else f'{key} {reason}'}")
        every = [*self.source.problems, *self.problems]
        refuse_too_many_bad(every, self.source.looked_at, self.config.data.max_bad_share)

    # -- finish ------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Writes the list of samples, which makes the cache readable, and draws the check picture."""
        lines = list(self._sample_lines())
        if not lines:
            raise UserError(f"no picture of {self.source.name} could be used; each is named above")
        writing = nullcontext() if self.stop is None else self.stop.writing
        path = self.cache.directory / SAMPLES_FILE
        with writing:
            self.cache.write_samples(iter(lines))
        kept = sum(shard.num_bytes for shard in self.cache.shards)
        self.say(f"cache: {len(lines):,} pictures, {readable_bytes(kept)} in {len(self.cache.shards)} files; {path}")
        if self.has_new:
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
                "size": [latents[0] * factor, latents[1] * factor],
                "captions": [[caption.text, caption.kind, caption.score] for caption in record.captions],
                "group": record.group,
                "variants": sorted(there),
            }


def _finished_cache(directory: Path, identity: CacheIdentity, say: Say) -> Path:
    read_identity(directory).require(identity, directory)
    say(f"data: the cache {directory} as it is, since no --data.path is named")
    return directory


def _free(part: Any) -> None:
    if hasattr(part, "weights"):
        part.weights.free()


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _command_line() -> str:
    return f"{PROG} {' '.join(map(shlex.quote, sys.argv[1:]))}"


def _print_line(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command_line(lambda: main(stop=STOP))
