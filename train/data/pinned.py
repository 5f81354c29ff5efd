"""The samples that a run began with, in its directory: it goes on with these, whatever becomes of the data meanwhile.

The order of the samples is a function of their list, so that a picture more or fewer would make another order of it.
The records of a cache stay where they are; the list of them is all that a run must keep.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_jax.errors import CheckpointError
from sana_jax.weights import checkpoint_steps
from train.data.cache import LATENTS, PROMPTS, CacheIdentity, CacheReader, Place, write_durably
from train.data.cache_plan import NULL_PROMPT

if TYPE_CHECKING:
    from train.data.cached import CachedData

# Names of the files by what the samples are.
DATA, CLASS, PICTURES, PROMPT_LIST = "data.jsonl", "class.jsonl", "pictures.jsonl", "prompts.jsonl"
_SIGNATURES, _IDENTITY = "signatures", "identity"


def pinned(run_dir: str | Path, name: str) -> Path | None:
    """The list of a run that has a checkpoint; None where it begins, or has no list."""
    path = Path(run_dir) / name
    return path if path.is_file() and checkpoint_steps(Path(run_dir) / "checkpoints") else None


def read_pins(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a list, each as in a cache's list of samples, with the signature of each variant's record.

    Raises:
        CheckpointError: the list is damaged.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                sample = json.loads(line)
                sample[_SIGNATURES].keys()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{path} is damaged in line {number}; put it back from a copy, or start a new run"
                ) from error
            yield sample


def pinned_identities(path: Path) -> set[str]:
    """The identities, as ``CacheIdentity.id``, that a list says its samples are of; most lists say nothing."""
    return {sample[_IDENTITY] for sample in read_pins(path) if _IDENTITY in sample}


def pinned_prompts(run_dir: str | Path) -> list[str] | None:
    """The prompts of a run that has a checkpoint, as ``pinned``.

    Raises:
        CheckpointError: the list is damaged.
    """
    if (path := pinned(run_dir, PROMPT_LIST)) is None:
        return None
    try:
        return [str(json.loads(line)["prompt"]) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged; put it back from a copy, or start a new run") from error


def write_pins(dataset: Any, run_dir: Path) -> None:
    """Keeps the lists of a data set that was not opened with them, and its prompts. Process 0 only.

    Raises:
        CheckpointError: its cache has been changed since it was opened.
    """
    for name, part in getattr(dataset, "cached", {}).items():
        if not part.is_pinned:
            write_durably(run_dir / name, (json.dumps(line, separators=(",", ":")) for line in _lines(part)))
    if prompts := getattr(dataset, "prompts", ()):
        write_durably(run_dir / PROMPT_LIST, (json.dumps({"prompt": text}) for text in prompts))


def _lines(data: CachedData) -> Iterator[dict[str, Any]]:
    samples = data.reader.samples()
    own = {_IDENTITY: data.identity.id} if data.pins_identity else {}
    for key, places in data.places():
        sample = next(samples, {})
        if sample.get("key") != key:
            raise CheckpointError(f"the cache {data.directory} was changed while the run began; start it again")
        yield {**sample, _SIGNATURES: {name: data.reader.signature(place) for name, place in places.items()}, **own}


def pinned_places(reader: CacheReader) -> dict[tuple[str, str, str], Place]:
    """Where each record of latents is, by key, variant and signature: also those that later ones stand for."""
    return {
        (*name, signature): Place(index, number)
        for index, shard in enumerate(reader.shards)
        if shard.kind == LATENTS
        for number, (name, signature) in enumerate(zip(shard.names, shard.signatures))
    }


def holds(directory: Path, identity: CacheIdentity, path: Path, prompts: Sequence[str], names: Iterable[str]) -> bool:
    """Whether a cache has all that a list names, and prompts; no data needs to be looked at then.

    Args:
        directory: of the cache.
        identity: that it must have.
        path: of the list.
        prompts: further texts.
        names: of the variants that are trained on.
    """
    try:
        reader = CacheReader(directory, unfinished=True)
    except (FileNotFoundError, CheckpointError):  # what makes the cache mends it, or says what is wrong
        return False
    if reader.identity.differences(identity):
        return False
    places, names = pinned_places(reader), tuple(names)
    encoded = reader.places(PROMPTS)
    texts = set(prompts)
    for sample in read_pins(path):
        if any((sample["key"], name, sample[_SIGNATURES].get(name)) not in places for name in names):
            return False
        texts.update(caption[0] for caption in sample["captions"])
    return NULL_PROMPT in encoded and all(("text", text) in encoded for text in texts if text.strip())
