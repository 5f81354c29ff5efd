"""Which parameters a setting means, by patterns of their paths, and what kind of parameter each is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from configs.optimizer import OptimizerConfig, own_learning_rates
from kernels.typing import PyTree
from sana_jax.errors import UserError
from train.sharding import parameter_paths, path_name

# A part of a path below which parameters are stacked over layers on their first axis.
_STACK = re.compile(r"(.*_)?blocks|heads")
# The last part of the path of what may be a matrix: a dense layer's kernel, or a factor of a LoRA.
_MATRIX_NAMES = ("kernel", "down", "up")


class Layout(NamedTuple):
    """What the axes of a parameter are."""

    layers: int
    """Leading axes that number layers (0 or 1): every layer is a parameter of its own to the optimizer."""
    is_matrix: bool
    """Whether the last two axes, (in, out), are those of a matrix: dense kernels, 1x1 convolutions, LoRA factors. Not
    depthwise or larger kernels, biases, scales of norms and tables."""


def parameter_layout(path: str, shape: tuple[int, ...]) -> Layout:
    """The layout of the parameter at a path."""
    *parents, name = path.split("/")
    layers = int(len(shape) > 0 and any(_STACK.fullmatch(part) for part in parents))
    own = shape[layers:]
    return Layout(layers, name in _MATRIX_NAMES and (len(own) == 2 or (len(own) == 4 and own[:2] == (1, 1))))


def layer_size(path: str, shape: tuple[int, ...]) -> int:
    """Values of one layer's part of a parameter."""
    return math.prod(shape[parameter_layout(path, shape).layers :])


def map_with_names(function: Callable, tree: PyTree, *rest: PyTree) -> PyTree:
    """``function(path, leaf, ...)`` over a tree; further trees may have subtrees where the first has a leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)


def path_mask(params: PyTree, patterns: tuple[str, ...], option: str, may_be_absent: tuple[str, ...] = ()) -> PyTree:
    """True for every parameter whose whole path matches one of the patterns.

    Raises:
        UserError: a pattern that is not a regular expression, or that matches nothing and is not in ``may_be_absent``.
    """
    paths = parameter_paths(params)
    for pattern in patterns:
        if not matching_paths(paths, pattern, option) and pattern not in may_be_absent:
            raise UserError(
                f"--{option} {pattern!r} matches no parameter; paths look like {', '.join(list(paths)[:3])}: patterns "
                "must match a whole path, so begin with .* to match an ending"
            )
    return map_with_names(lambda path, _: any(re.fullmatch(pattern, path) for pattern in patterns), params)


def matching_paths(paths: Mapping[str, Any], pattern: str, option: str) -> list[str]:
    """Those of the paths that match a pattern as a whole.

    Raises:
        UserError: the pattern is not a regular expression.
    """
    try:
        return [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
        raise UserError(f"--{option} {pattern!r} is not a regular expression: {error}; mend it") from error


def frozen_mask(params: PyTree, frozen: tuple[str, ...], trained: tuple[str, ...] = ()) -> PyTree:
    """True for every parameter that is not trained.

    Raises:
        UserError: a pattern does not fit, both kinds are given, or nothing is left to train.
    """
    if frozen and trained:
        raise UserError(
            f"--optimizer.trained {' '.join(trained)} and --optimizer.frozen {' '.join(frozen)} say the opposite; "
            "give one of them"
        )
    if trained:
        return jax.tree.map(lambda is_trained: not is_trained, path_mask(params, trained, "optimizer.trained"))
    mask = path_mask(params, frozen, "optimizer.frozen")
    if all(jax.tree.leaves(mask)):
        raise UserError(f"--optimizer.frozen {' '.join(frozen)} leaves nothing to train; freeze less")
    return mask


def stop_frozen(params: PyTree, frozen: tuple[str, ...], trained: tuple[str, ...] = ()) -> PyTree:
    """The same parameters, without gradients for those that are frozen: none is computed, none counts in the norm."""
    if not frozen and not trained:
        return params
    mask = frozen_mask(params, frozen, trained)
    return jax.tree.map(lambda leaf, stop: jax.lax.stop_gradient(leaf) if stop else leaf, params, mask)


def peak_learning_rates(config: OptimizerConfig, params: PyTree) -> dict[str, float]:
    """The peak learning rate of every trained parameter, by path.

    Raises:
        UserError: a pattern of ``learning_rates`` that matches no trained parameter, or a parameter that two match.
    """
    frozen = parameter_paths(frozen_mask(params, config.frozen, config.trained))
    rates = {path: config.learning_rate for path, is_frozen in frozen.items() if not is_frozen}
    by_path: dict[str, str] = {}
    for pattern, rate in own_learning_rates(config).items():
        matched = matching_paths(rates, pattern, "optimizer.learning-rates")
        if not matched:
            raise UserError(
                f"--optimizer.learning-rates {pattern!r} matches no trained parameter; paths look like "
                f"{', '.join(list(rates)[:3])}: patterns must match a whole path, so begin with .* to match an ending"
            )
        for path in matched:
            if path in by_path:
                raise UserError(
                    f"--optimizer.learning-rates {by_path[path]!r} and {pattern!r} both match {path}; a parameter has "
                    "one learning rate: make the patterns exclude each other"
                )
            by_path[path] = pattern
            rates[path] = rate
    return rates
