"""Which layers a LoRA is trained for: named choices, patterns of paths, and the table of what they match.

"All linear layers" has two meanings for SANA. PyTorch's counts ``nn.Linear`` alone, and the feed-forward network of a
SANA block consists of convolutions, of which two are 1x1 and so the same product: those count in
``all_linear_and_pointwise``. The patch embedding is a convolution there too, and in none of the choices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from kernels.typing import PyTree
from sana_jax.errors import UserError
from sana_jax.weights.rules import flatten

_QKV = r"(.*/)?attn\d*/to_(q|k|v|qkv|kv)"
# SANA-WM has queries, keys and values in one layer, and others beside them for the camera's branch and the gates.
_ATTENTION = r"(.*/)?attn\d*/to_((qkv|kv)|(q|k|v|out)(_camera)?)"
_LINEAR = (
    *(_ATTENTION, r"(.*/)?linear(_\d)?", r"(.*/)?proj_out"),
    *(r"(.*/)?attn\d*/to_(gate|beta|decay)", r"(.*/)?plucker_proj", r"(.*/)?ff_\d"),
)
_POINTWISE = r"(.*/)?ff/conv_(inverted|point)"

# name -> patterns of paths in the parameters
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": (_ATTENTION,),
    "qkv": (_QKV,),  # what diffusers' training script trains
    "all_linear": _LINEAR,
    "all_linear_and_pointwise": (*_LINEAR, _POINTWISE),
}
LARGEST_RANK = 2048


class TargetLayer(NamedTuple):
    """A dense layer, or a stack of them, that a LoRA can change.

    Attributes:
        path: of its kernel in our parameters, without the last part.
        layers: how many are stacked; None for a single one.
        inputs: channels in.
        outputs: channels out.
    """

    path: tuple[str, ...]
    layers: int | None
    inputs: int
    outputs: int

    @property
    def name(self) -> str:
        """The path with slashes."""
        return "/".join(self.path)

    def parameters(self, rank: int) -> int:
        """Parameters of a LoRA of this rank."""
        return (self.layers or 1) * rank * (self.inputs + self.outputs)


def dense_layers(abstract: PyTree) -> tuple[TargetLayer, ...]:
    """Every layer of a network that a LoRA can change; ``abstract`` are its parameters, as shapes."""
    return tuple(
        TargetLayer(path[:-1], leaf.shape[0] if leaf.ndim == 3 else None, *leaf.shape[-2:])
        for path, leaf in flatten(abstract).items()
        if path[-1] == "kernel" and leaf.ndim in (2, 3)  # a convolution's has more axes
    )


def match_targets(abstract: PyTree, targets: Sequence[str]) -> tuple[TargetLayer, ...]:
    """The layers that the targets name, in the parameters' order.

    Args:
        abstract: the network's parameters, as shapes.
        targets: names of ``PRESETS``, or regular expressions that match the whole path of at least one layer, as
            ``transformer_blocks/attn1/to_q``.

    Raises:
        UserError: no target, one that is no regular expression, or one that matches no layer.
    """
    layers = dense_layers(abstract)
    examples = ", ".join(_spread([layer.name for layer in layers], 6))
    advice = f"allowed are {', '.join(PRESETS)}, or patterns of paths such as {examples}"
    if not targets:
        raise UserError(f"a LoRA without targets changes nothing; {advice}: name one or more")
    wanted: set[str] = set()
    for target in targets:
        patterns = PRESETS.get(target, (target,))
        try:
            found = {layer.name for layer in layers if any(re.fullmatch(p, layer.name) for p in patterns)}
        except re.error as error:
            raise UserError(f"LoRA target {target!r} is no regular expression ({error}); {advice}: mend it") from None
        if not found:
            near = [layer.name for layer in layers if target not in PRESETS and re.search(target, layer.name)]
            hint = f"; it is found within {near[0]}, and has to match all of it: try '.*{target}.*'" if near else ""
            raise UserError(f"LoRA target {target!r} matches no layer{hint}; {advice}")
        wanted |= found
    return tuple(layer for layer in layers if layer.name in wanted)


def target_table(abstract: PyTree, targets: Sequence[str], rank: int) -> str:
    """What will be trained: a line for each matched layer, then the sum and its share of the network's parameters.

    Raises:
        UserError: as ``match_targets``.
    """
    matched = match_targets(abstract, targets)
    rows = [("layer", "layers", "in x out", "parameters")]
    rows += [
        (layer.name, str(layer.layers or 1), f"{layer.inputs} x {layer.outputs}", f"{layer.parameters(rank):,}")
        for layer in matched
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in rows
    ]
    trained = sum(layer.parameters(rank) for layer in matched)
    total = sum(_size(leaf.shape) for leaf in flatten(abstract).values())
    count = sum(layer.layers or 1 for layer in matched)
    lines.append(
        f"LoRA of rank {rank} on {count} layers: {trained:,} trainable parameters, {100 * trained / total:.3g} % of "
        f"the network's {total:,}"
    )
    return "\n".join(lines)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _spread(names: list[str], count: int) -> list[str]:
    """Some of the names, from all over the list."""
    step = max(1, len(names) // count)
    return names[::step][:count]
