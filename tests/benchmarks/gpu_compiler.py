"""Compiles for NVIDIA GPUs on a machine that has none, with XLA's own compiler for them.

It comes with JAX's CUDA libraries (``pip install 'jax[cuda12]'`` of the same version), which need no driver for that.
Nothing is tuned on the device: products go to cuBLAS, with its own choice.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from kernels.softmax_attention import cudnn

# What the compiler asks of a device, as NVIDIA's data sheets and CUDA's occupancy tables have it for an H100 SXM.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Of the products' kernels the compiler can write itself it would have to try many on the device.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def devices(count: int = 1) -> list[jax.Device]:
    """H100s of one host, which programs can be compiled for and which cannot run any.

    Raises:
        RuntimeError: JAX's CUDA libraries are not here.
    """
    from jax.experimental import topologies

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it would ask the driver
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x1x{count}")
    except NotImplementedError as error:
        raise RuntimeError(
            f"XLA's compiler for NVIDIA GPUs is not here; pip install 'jax[cuda12]=={jax.__version__}' brings it, and "
            "needs no GPU"
        ) from error
    return list(found.devices)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """What is traced inside may use cuDNN as an H100 has it."""
    with mock.patch.object(cudnn, "largest_size", return_value=cudnn.LARGEST_SIZE_OF_HOPPER):
        yield


def compile_for(device: jax.Device, function: Callable, *arguments: Any) -> jax.stages.Compiled:
    """Compiles a function for shapes: trees of ``jax.ShapeDtypeStruct``, placed on ``device`` where they have no place.

    Args:
        device: of ``devices``.
        function: jitted, or to be jitted.
        arguments: its arguments.
    """
    here = jax.sharding.SingleDeviceSharding(device)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)

    jitted = function if hasattr(function, "trace") else jax.jit(function)
    with tracing():
        lowered = jitted.trace(*jax.tree.map(placed, arguments)).lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options=OPTIONS)
