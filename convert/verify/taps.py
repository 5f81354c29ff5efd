"""Listening to both networks at the same places, and giving one's intermediate results to the other.

PyTorch's modules are listened to with forward hooks, ours with ``flax.linen.intercept_methods``: the networks run as
they are, and nothing of them is written down a second time. Either side can be made to go on with given results in
place of its own. If these are PyTorch's float32 results, then what each module gives depends on itself alone (and on
the few operations between it and the modules before it), and a fault shows at one place only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

PARTS, LAYERS = "parts", "layers"
_CHANNELS_FIRST = ("Conv2d", "Conv3d", "BatchNorm2d")


@dataclasses.dataclass(frozen=True)
class Tap:
    """One place in both networks.

    Attributes:
        name: what the table calls it.
        module: PyTorch's module.
        path: our module.
        call: which call of our module, of those with this path: the layer, where layers are stacked.
        their_call: which call of PyTorch's.
        of_input: whether the module's first input is meant, not its result.
        detail: whether it is a layer within a module that has a tap of its own.
        channels_first: whether PyTorch's pictures have (B, C, H, W) here, or its videos (B, C, T, H, W).
        select: the parts of PyTorch's result that ours are, in our order; None where both are one array.
        names: of these parts.
    """

    name: str
    module: str
    path: tuple[str, ...]
    call: int = 0
    their_call: int = 0
    of_input: bool = False
    detail: bool = False
    channels_first: bool = False
    select: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()

    def active(self, depth: str | None) -> bool:
        """Whether results are handed over here."""
        return depth == LAYERS or (depth == PARTS and not self.detail)

    def to_ours(self, values: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """PyTorch's arrays in our layout."""
        out = []
        for value, shape in zip(values, shapes, strict=True):
            if self.channels_first and value.ndim in (4, 5):
                value = np.moveaxis(value, 1, -1)
            # tokens of a picture are its pixels row by row
            out.append(value.reshape(shape) if value.size == np.prod(shape, dtype=np.int64) else value)
        return out


def layer_taps(their_names: Mapping[str, Any], model: Any, inside: tuple[str, ...] = ()) -> Iterator[Tap]:
    """A tap for every layer that has weights, found by the family's table of weights.

    Args:
        their_names: published tensor -> its ``Place`` in our tree.
        model: PyTorch's network.
        inside: the first keys of the tree that stand for the network itself.
    """
    modules = dict(model.named_modules())
    seen = set()
    for tensor, place in their_names.items():
        module, path = tensor.rpartition(".")[0], place.path[:-1]
        if path[: len(inside)] != inside or path == inside or module in seen:
            continue
        if module not in modules or any(True for _ in modules[module].children()):
            continue  # a table of a block's own; the block has a tap
        seen.add(module)
        path = path[len(inside) :]
        if len(path) > 1 and "multiscale" in path[-2] and path[-1] == "proj_out":
            path = path[:-1]  # ours is a bare product there
        first = type(modules[module]).__name__ in _CHANNELS_FIRST
        yield Tap(module, module, path, place.layer or 0, detail=True, channels_first=first)


@dataclasses.dataclass
class Recording:
    """What one run gave: tap -> arrays, in the order of the run, and the network's result."""

    values: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    result: Any = None


def run_theirs(
    model: Any,
    taps: Sequence[Tap],
    call: Callable[[], Any],
    given: Recording | None = None,
    depth: str | None = None,
) -> Recording:
    """Runs PyTorch's network and records, in its own layout, what is at the taps; goes on with ``given`` there."""
    import torch

    found, handles, counts = Recording(), [], {}
    modules = dict(model.named_modules())
    by_module: dict[str, list[Tap]] = {}
    for tap in taps:
        by_module.setdefault(tap.module, []).append(tap)

    def exchange(tap: Tap, value: Any) -> Any:
        parts = [value] if tap.select is None else [value[i] for i in tap.select]
        if tap.select is None and isinstance(value, tuple):
            parts = [value[0]]
        found.values[tap.name] = [part.detach().to(torch.float32).numpy().copy() for part in parts]
        if given is None or not tap.active(depth):
            return None
        new = [torch.from_numpy(kept).to(part.dtype) for kept, part in zip(given.values[tap.name], parts, strict=True)]
        if tap.select is None:
            return (new[0], *value[1:]) if isinstance(value, tuple) else new[0]
        whole = list(value)
        for place, part in zip(tap.select, new, strict=True):
            whole[place] = part
        return tuple(whole)

    def before(name: str, own: list[Tap]) -> Callable:
        def hook(module: Any, args: tuple, kwargs: dict) -> Any:
            number = counts.get(name, 0)
            for tap in own:
                if tap.of_input and tap.their_call == number:
                    new = exchange(tap, args[0] if args else kwargs["hidden_states"])
                    if new is not None:
                        if args:
                            args = (new, *args[1:])
                        else:
                            kwargs = {**kwargs, "hidden_states": new}
            return args, kwargs

        return hook

    def after(name: str, own: list[Tap]) -> Callable:
        def hook(module: Any, args: tuple, output: Any) -> Any:
            number = counts.get(name, 0)
            counts[name] = number + 1
            new = None
            for tap in own:
                if not tap.of_input and tap.their_call == number:
                    new = exchange(tap, output)
            return new

        return hook

    for name, own in by_module.items():
        if name not in modules:
            raise LookupError(f"PyTorch's network has no module {name}")
        handles.append(modules[name].register_forward_pre_hook(before(name, own), with_kwargs=True))
        handles.append(modules[name].register_forward_hook(after(name, own)))
    try:
        with torch.no_grad():
            found.result = call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def run_ours(
    taps: Sequence[Tap],
    call: Callable[[], Any],
    given: Recording | None = None,
    depth: str | None = None,
) -> Recording:
    """Runs our network, layer after layer and uncompiled, and records what is at the taps; as ``run_theirs``.

    ``given`` is in PyTorch's layout.
    """
    found, counts = Recording(), {}
    by_path: dict[tuple[tuple[str, ...], int], list[Tap]] = {}
    for tap in taps:
        by_path.setdefault((tap.path, tap.call), []).append(tap)

    def exchange(tap: Tap, value: Any) -> Any:
        if isinstance(value, tuple) and tap.select is None:
            # what a streaming module passes on beside its result has no counterpart
            return (exchange(tap, value[0]), *value[1:])
        parts = list(value) if isinstance(value, tuple) else [value]
        found.values[tap.name] = [np.asarray(part, np.float32) for part in parts]
        if given is None or not tap.active(depth):
            return value
        kept = tap.to_ours(given.values[tap.name], [part.shape for part in parts])
        # Placed as our own are: operations are compiled by where their arguments are, too.
        pairs = zip(kept, parts, strict=True)
        new = [jax.device_put(array.astype(part.dtype), part.sharding) for array, part in pairs]
        return tuple(new) if isinstance(value, tuple) else new[0]

    def intercept(run: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        path = context.module.path
        # Scanning and mapping over layers also call their body to learn its shapes.
        if context.method_name != "__call__" or not path or _is_traced((args, context.module.variables)):
            return run(*args, **kwargs)
        number = counts.get(path, 0)
        counts[path] = number + 1
        own = by_path.get((path, number), ())
        for tap in own:
            if tap.of_input:
                args = (exchange(tap, args[0]), *args[1:])
        output = run(*args, **kwargs)
        for tap in own:
            if not tap.of_input:
                output = exchange(tap, output)
        return output

    # Uncompiled, a scan is a loop, and what passes through it are numbers.
    with jax.disable_jit(), nn.intercept_methods(intercept):
        found.result = call()
    if missing := [tap.name for tap in taps if tap.name not in found.values]:
        raise LookupError(f"our network has no module for {', '.join(missing[:5])}")
    return found


def _is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
