"""Compiles for an H100 without one, what is traced and what is jitted alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from sana_jax.gpu_compiler import GPUS, ForGpu

H100 = GPUS["h100"]


def compile_for(device: jax.Device, function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """Compiles a function for shapes: trees of ``jax.ShapeDtypeStruct``, placed on ``device`` where they have no place.

    Args:
        device: of ``Target.devices``.
        function: jitted, or to be jitted.
        arguments: its arguments.
    """
    here = jax.sharding.SingleDeviceSharding(device)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)

    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return ForGpu(jitted, H100).lower(*jax.tree.map(placed, arguments)).compile()
