"""Training data from a cache: records are read when asked for, neither text encoder nor autoencoder is in memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from configs.data import ImageDataConfig
from kernels.typing import Float, Int
from sana_jax.compilation import readable_bytes
from sana_jax.errors import CheckpointError, UserError
from train.batch import Batch
from train.data.cache import LATENTS, PROMPTS, CacheIdentity, CacheReader, Place
from train.data.cache_plan import NULL_PROMPT, variants
from train.data.captions import CaptionRule, caption_ends, check_scores, chosen_index
from train.data.pinned import DATA, pinned_places, read_pins
from train.data.source import Caption, Record
from train.data.splits import split

Shape = tuple[int, ...]


class _Captions(NamedTuple):
    """The captions of a picture: texts by number, and up to where in [0, 1) each is picked."""

    texts: tuple[int, ...]
    ends: tuple[float, ...]


class _Contents:
    """What a cache holds, as columns; shared by the training pictures and the validation pictures.

    Pictures that have the same captions share one entry, and the same group one text.
    """

    def __init__(self, reader: CacheReader, config: ImageDataConfig, pins: Path | None):
        self.reader, self.pins = reader, pins
        self.texts: list[str] = []
        self.records: list[Record] = []
        self.shapes: list[Shape] = []
        self.variants: list[tuple[Place, ...]] = []
        self.captions: list[_Captions] = []
        numbers: dict[str, int] = {}
        shared: dict[Any, _Captions] = {}
        rule = CaptionRule.of(config)
        # The list says which records it is of: later ones of the same names may belong to a list that is not written
        # yet. Those of caches that were made before lists said so are the newest.
        exact, wanted, newest = pinned_places(reader), variants(config), None
        for sample in reader.samples() if pins is None else read_pins(pins):
            key, signatures = sample["key"], sample.get("signatures")
            if missing := [name for name in wanted if name not in sample["variants"]]:
                raise CheckpointError(
                    f"the cache {reader.directory} lacks {', '.join(missing)} of {key}, which --data.crop, "
                    "--data.crops and --data.flip ask for; python -m train.precompute with the same options adds them"
                )
            if signatures is None and newest is None:
                newest = reader.places(LATENTS)
            try:
                own = tuple(
                    newest[key, name] if signatures is None else exact[key, name, signatures[name]] for name in wanted
                )
            except KeyError as error:
                if pins is not None:
                    raise CheckpointError(
                        f"the run began with {key} as it was then ({pins}), and the cache {reader.directory} does not "
                        "have it so; put the picture and its sizes back as they were, name the cache that it began "
                        "with (--data.cache), or start a new run"
                    ) from error
                raise CheckpointError(
                    f"the cache {reader.directory} lists {key}, and no shard has it; python -m train.precompute with "
                    "the same options makes it again"
                ) from error
            captions = tuple(Caption(*each) for each in sample["captions"]) or (Caption(""),)
            if captions not in shared:
                for caption in captions:
                    if caption.text not in numbers:
                        numbers[caption.text] = len(self.texts)
                        self.texts.append(caption.text)
                texts = tuple(numbers[caption.text] for caption in captions)
                shared[captions] = _Captions(texts, caption_ends(captions, rule))
            self.captions.append(shared[captions])
            self.variants.append(own)
            self.shapes.append(_shape(reader, own[0]))
            self.records.append(Record(key, tuple(sample["size"]), group=sample["group"]))
        check_scores(shared, config)
        prompts = reader.places(PROMPTS)
        self.prompts = {text: place for (kind, text), place in prompts.items() if kind == "text"}
        if NULL_PROMPT not in prompts:
            raise CheckpointError(f"the cache {reader.directory} lacks the encoding of no text; make it again")
        self.null = prompts[NULL_PROMPT]


class CachedData:
    """The pictures, or clips, of a cache, as a data set that training reads.

    A picture's caption and its variant (crop, mirror image) are chosen anew for each batch by numbers that the caller
    draws. Any number of threads may ask for batches at once.

    Args:
        directory: a finished cache.
        config: its ``caption_choice`` and what belongs to it, ``crop``, ``crops``, ``flip`` and ``validation_share``
            are used.
        identity: what the cache's numbers must be a function of; None accepts any.
        pins: the list of samples that a run began with (``train.data.pinned``), instead of the cache's own.

    Raises:
        FileNotFoundError: there is no cache, or it is not finished.
        CheckpointError: it is damaged, of another identity, or lacks variants that the configuration asks for.
        UserError: a split or a choice of captions that is not possible.
    """

    pins_identity: ClassVar[bool] = False
    """Whether a run's list of samples says which cache they are of, because the run's configuration does not."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: ImageDataConfig,
        *,
        identity: CacheIdentity | None = None,
        pins: Path | None = None,
        _part: tuple[_Contents, Sequence[int]] | None = None,
    ):
        self.directory, self.config = Path(directory), config
        if _part is not None:
            self._contents, self._rows = _part[0], np.asarray(_part[1], np.int64)
            return
        reader = CacheReader(directory, unfinished=pins is not None)
        if identity is not None:
            reader.identity.require(identity, self.directory)
        self._contents = _Contents(reader, config, pins)
        training, held_out = split(self._contents.records, config.validation_share)
        self._rows, self._held_out = np.asarray(training, np.int64), held_out

    @cached_property
    def validation(self) -> CachedData | None:
        """The pictures that are kept from training; None where there are none."""
        held_out = getattr(self, "_held_out", None)
        return CachedData(self.directory, self.config, _part=(self._contents, held_out)) if held_out else None

    @property
    def identity(self) -> CacheIdentity:
        """What the cache's numbers are a function of."""
        return self._contents.reader.identity

    @property
    def cached(self) -> dict[str, CachedData]:
        """The caches that the data is read from, by the name of a run's list of their samples."""
        return {DATA: self}

    @property
    def is_pinned(self) -> bool:
        """Whether it was opened with a run's list of samples."""
        return self._contents.pins is not None

    @property
    def reader(self) -> CacheReader:
        """The cache."""
        return self._contents.reader

    def places(self) -> Iterator[tuple[str, dict[str, Place]]]:
        """Of all samples, those for validation included: the key, and where the record of each variant is."""
        names = variants(self.config)
        for record, places in zip(self._contents.records, self._contents.variants):
            yield record.key, dict(zip(names, places))

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def buckets(self) -> dict[Shape, Int[np.ndarray, " n"]]:
        """The samples' indices by the shape ([T,] H, W, C) of their latents."""
        by_shape: dict[Shape, list[int]] = {}
        for index, row in enumerate(self._rows.tolist()):
            by_shape.setdefault(self._contents.shapes[row], []).append(index)
        return {shape: np.asarray(by_shape[shape]) for shape in sorted(by_shape)}

    @property
    def preview_shape(self) -> Shape:
        """The commonest of these shapes."""
        return max(self.buckets, key=lambda shape: (len(self.buckets[shape]), shape))

    def condition_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shapes of further inputs, without the batch axis, of samples with latents of this shape."""
        row = int(self._rows[self.buckets[shape][0]])
        layout = self._contents.reader.layout(self._contents.variants[row][0])
        return {name: own for name, _, own in layout.arrays if name != "latents"}

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """(L, C) of an encoded prompt, padding included."""
        layout = self._contents.reader.layout(self._contents.null)
        return int(self.identity.fields["text_encoder.max_length"]), layout.arrays[0][2][-1]

    def batch(self, indices: Int[np.ndarray, " B"], choices: Float[np.ndarray, "B 2"] | None = None) -> Batch:
        """The samples of these indices, which have latents of one shape, as arrays on the host.

        Latents and further inputs are float32; prompts have the dtype that the cache keeps them in.

        Args:
            indices: of samples.
            choices: uniform in [0, 1): the first of each picks a caption, the second a variant. None takes the first.

        Raises:
            CheckpointError: the cache is damaged.
        """
        contents, reader = self._contents, self._contents.reader
        rows = self._rows[np.asarray(indices)].tolist()
        choices = np.zeros((len(rows), 2)) if choices is None else choices
        arrays: dict[str, np.ndarray] = {}
        texts: list[int] = []
        for number, (row, (of_caption, of_variant)) in enumerate(zip(rows, np.asarray(choices).tolist())):
            own = contents.variants[row]
            record = reader.read(own[min(int(of_variant * len(own)), len(own) - 1)])
            for name, array in record.items():
                if name not in arrays:
                    arrays[name] = np.empty((len(rows), *array.shape), np.float32)
                if arrays[name].shape[1:] != array.shape:
                    shapes = f"{arrays[name].shape[1:]} and {array.shape}"
                    raise ValueError(f"one batch has {name} of shapes {shapes}; take its samples from one bucket")
                arrays[name][number] = array
            captions = contents.captions[row]
            texts.append(captions.texts[chosen_index(captions.ends, of_caption)])
        embeds, mask = self._padded([self._place_of(contents.texts[text]) for text in texts])
        return Batch(arrays.pop("latents"), embeds, mask, arrays)

    @cached_property
    def captions(self) -> list[str]:
        """The distinct captions of these samples, the most frequent first; without the empty one."""
        counts: Counter[int] = Counter()
        for row in self._rows.tolist():
            counts.update(self._contents.captions[row].texts)
        ordered = (self._contents.texts[number] for number, _ in counts.most_common())
        return [text for text in ordered if text.strip()]

    def caption_of(self, index: int) -> str:
        """A sample's first caption."""
        return self._contents.texts[self._contents.captions[int(self._rows[index])].texts[0]]

    def encode(self, captions: Sequence[str]) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        """Embeddings and masks of texts that the cache has.

        Raises:
            UserError: a text that it does not have.
        """
        return self._padded([self._place_of(caption) for caption in captions])

    def null_encoding(self) -> tuple[Float[np.ndarray, "1 L C"], Int[np.ndarray, "1 L"]]:
        """The encoding of no text."""
        return self._padded([self._contents.null])

    def describe(self) -> str:
        """One line for the start of a run."""
        shapes = ", ".join(f"{'x'.join(map(str, shape))}: {len(own)}" for shape, own in self.buckets.items())
        size = sum(shard.num_bytes for shard in self._contents.reader.shards)
        held_out = f" and {len(self.validation)} for validation" if self.validation else ""
        count = len(self._contents.variants[0]) if self._contents.variants else 1
        what = "clips" if max(map(len, self.buckets), default=3) > 3 else "pictures"
        each = f" in {count} variants each" if count > 1 else ""
        return (
            f"{len(self):,} {what}{each}{held_out} from the cache {self.directory} ({readable_bytes(size)}), latents "
            f"{shapes}; {len(self.captions):,} captions"
        )

    def _place_of(self, text: str) -> Place:
        if not text.strip():
            return self._contents.null
        try:
            return self._contents.prompts[text]
        except KeyError as error:
            raise UserError(
                f"the prompt {text[:80]!r} is not in the cache {self.directory}, and no text encoder is in memory; "
                "name it in --preview.prompts and run python -m train.precompute again, which adds it"
            ) from error

    def _padded(self, places: Sequence[Place]) -> tuple[Float[np.ndarray, "B L C"], Int[np.ndarray, "B L"]]:
        length, channels = self.prompt_shape
        tokens = {place: self._contents.reader.read(place)["tokens"] for place in set(places)}
        dtype = np.dtype(self._contents.reader.layout(self._contents.null).arrays[0][1])
        embeds = np.zeros((len(places), length, channels), dtype)
        mask = np.zeros((len(places), length), np.int32)
        for row, place in enumerate(places):
            count = len(tokens[place])
            embeds[row, :count] = tokens[place]
            mask[row, :count] = 1
        return embeds, mask


def _shape(reader: CacheReader, place: Place) -> Shape:
    return next(shape for name, _, shape in reader.layout(place).arrays if name == "latents")
