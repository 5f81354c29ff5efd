"""The rank and alpha that PEFT writes into a LoRA file's header: the entry ``lora_adapter_metadata``, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from sana_jax.errors import CheckpointError
from sana_jax.weights.safetensors_files import SafetensorsSource

KEY = "lora_adapter_metadata"
PREFIX = "transformer."  # of what is said of the transformer, which is all that there is in SANA's files
# A pattern is a regular expression that comes with the file, so only a part of the language is allowed, in which no
# expression takes long: names, dots, a few ".*" and "\d+".
_ALLOWED = re.compile(r"\^?(?:\w|-|\.|\\\.|\.\*|\.\+|\\d\+?|\[0-9\]\+?)*\$?")
_MOST_WILDCARDS = 4
_LONGEST_PATTERN = 300
# Initialisations that take what the LoRA begins with out of the base model's weights (peft/tuners/lora/layer.py): such
# a file goes with those weights, which it does not hold, and not with the published ones.
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class AdapterMetadata:
    """Rank and alpha of all layers, and of those that a pattern (regular expression on the name's end) names."""

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...] = ()
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()
    rank_stabilised: bool = False

    def of_module(self, module: str, rank: int, location: str) -> float:
        """Alpha of a layer.

        Raises:
            CheckpointError: the header tells of another rank than the layer's tensors have.
        """
        told = next((value for pattern, value in self.rank_pattern if pattern.fullmatch(module)), self.rank)
        if told != rank:
            raise CheckpointError(
                f"{location}: {module} has rank {rank} by its tensors and {told} by the file's header; save it again"
            )
        return next((value for pattern, value in self.alpha_pattern if pattern.fullmatch(module)), self.alpha)


def read_adapter_metadata(source: SafetensorsSource) -> AdapterMetadata | None:
    """What the header says of the transformer; None where it says nothing.

    Raises:
        CheckpointError: an entry that is not what PEFT writes, or a LoRA for other weights than the published ones.
    """
    text = source.metadata.get(KEY)
    if text is None:
        return None
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source.location}: {KEY} in its header is not JSON ({error}); save it again") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{source.location}: {KEY} in its header is not a JSON object; save it again")
    prefixed = {k.removeprefix(PREFIX): v for k, v in entries.items() if k.startswith(PREFIX)}
    entries = prefixed or entries
    begins = entries.get("init_lora_weights")
    if isinstance(begins, str) and begins.lower().startswith(_OTHER_BASES):
        raise CheckpointError(
            f"{source.location}: its header says init_lora_weights {begins!r}, which changes the base model's weights, "
            "so the file does not fit the published ones; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if "r" not in entries and "lora_alpha" not in entries:
        return None
    rank = _number(source, "r", entries.get("r"))
    return AdapterMetadata(
        int(rank),
        _number(source, "lora_alpha", entries.get("lora_alpha")),
        _patterns(source, "rank_pattern", entries),
        _patterns(source, "alpha_pattern", entries),
        entries.get("use_rslora") is True,
    )


def _number(source: SafetensorsSource, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= 1e9 or (name.startswith("r") and value != int(value)):
        kind = "a whole number" if name.startswith("r") else "a number"
        shown = str(value)[:80]
        raise CheckpointError(f"{source.location}: {name} in its header is {shown!r}; allowed is {kind} above 0")
    return value


def _patterns(source: SafetensorsSource, name: str, entries: Mapping[str, Any]) -> tuple:
    given = entries.get(name) or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{source.location}: {name} in its header is not a JSON object; save it again")
    compiled = []
    for pattern, value in given.items():
        wildcards = len(re.findall(r"\*|\+", pattern))
        if len(pattern) > _LONGEST_PATTERN or wildcards > _MOST_WILDCARDS or not _ALLOWED.fullmatch(pattern):
            raise CheckpointError(
                f"{source.location}: the pattern {pattern[:80]!r} of {name} in its header is not supported; allowed "
                "are layers' names, with . * and \\d+ for what differs"
            )
        number = _number(source, name, value)
        # "^" stands for the name's beginning; without it any parts of the name may go before
        body = pattern.removesuffix("$")
        before = "" if body.startswith("^") else r"(?:.*\.)?"
        compiled.append((re.compile(before + body.removeprefix("^")), number))
    assert all(math.isfinite(number) for _, number in compiled)
    return tuple(compiled)
