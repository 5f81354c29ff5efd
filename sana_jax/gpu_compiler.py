"""Programs compiled for NVIDIA GPUs on machines that have none, by XLA's own compiler for them.

It comes with JAX's CUDA libraries (``pip install 'jax[cuda12]'``), which need neither GPU nor driver for that. Nothing
is tuned on a device: products go to cuBLAS, with its own choice. What comes out tells its memory and cannot run.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

from kernels.softmax_attention.cudnn import on_capability
from sana_jax.errors import UserError

# Kernels for products that the compiler writes itself it would have to try on the device.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
PLATFORM, HOST_DEVICES = "cuda", 8


class Gpu(NamedTuple):
    """What the compiler asks of a device; from NVIDIA's data sheets and CUDA's tables of compute capabilities."""

    kind: str
    capability: tuple[int, int]
    memory: int
    """Bytes."""
    bandwidth: int
    """Bytes per second."""
    cores: int
    clock_ghz: float
    l2_cache: int
    shared_memory: int
    """Bytes per core; a block may have 1 KB less."""
    threads: int
    """Per core."""
    fpus: int
    """For float32, per core."""

    @property
    def description(self) -> str:
        """As XLA's target configuration."""
        major, minor = self.capability
        extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
              threads_per_warp: 32
              threads_per_block_limit: 1024
              threads_per_core_limit: {self.threads}
              core_count: {self.cores}
              fpus_per_core: {self.fpus}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              shared_memory_per_core: {self.shared_memory}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2_cache}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 9 }}
            device_description_str: "{self.kind}"
        """


_KB, _MB, _GB = 2**10, 2**20, 2**30
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79 * _GB, 3352 * 10**9, 132, 1.98, 50 * _MB, 228 * _KB, 2048, 128),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 79 * _GB, 2039 * 10**9, 108, 1.41, 40 * _MB, 164 * _KB, 2048, 64),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 23 * _GB, 1008 * 10**9, 128, 2.52, 72 * _MB, 100 * _KB, 1536, 128
    ),
}


class Target(NamedTuple):
    """So many GPUs of a kind."""

    gpu: Gpu
    count: int | None
    """None where it was not said."""

    def devices(self, count: int | None = None) -> list[jax.Device]:
        """Devices that programs can be compiled for, ``count`` of them where ``self.count`` is None.

        Raises:
            UserError: JAX's CUDA libraries are not here, or a number of devices that makes no whole hosts.
        """
        from jax.experimental import topologies

        count = self.count or count or 1
        if count > HOST_DEVICES and count % HOST_DEVICES:
            raise UserError(f"{count} GPUs: allowed are 1 to {HOST_DEVICES}, and multiples of {HOST_DEVICES}")
        hosts = max(1, count // HOST_DEVICES)
        try:
            found = topologies.get_topology_desc(
                platform=PLATFORM, target_config=self.gpu.description, topology=f"1x{hosts}x{count // hosts}"
            )
        except NotImplementedError:
            raise UserError(
                f"XLA's compiler for NVIDIA GPUs is not here; pip install 'jax[cuda12]=={jax.__version__}' brings it, "
                "and needs no GPU"
            ) from None
        return list(found.devices)


def parse_target(text: str) -> Target:
    """``h100``, or with a number of devices ``h100x8``.

    Raises:
        UserError: another word.
    """
    if (found := _match(text)) is None:
        raise UserError(
            f"GPU {text!r} is not known; choose {', '.join(GPUS)}, with a number such as h100x8 for several"
        )
    return Target(GPUS[found[1]], int(found[2]) if found[2] else None)


def is_target(text: str) -> bool:
    """Whether ``parse_target`` takes it."""
    return _match(text) is not None


def _match(text: str) -> re.Match | None:
    return re.fullmatch(rf"({'|'.join(GPUS)})(?:x([1-9]\d*))?", text)


class ForGpu:
    """A jitted function in whose place ``lower(...).compile()`` is for a GPU; arguments are shapes with shardings."""

    def __init__(self, function: Any, gpu: Gpu) -> None:
        self._function, self._gpu = function, gpu

    def lower(self, *arguments: Any) -> _LoweredForGpu:
        """As that of a jitted function."""
        with on_capability(self._gpu.capability):
            return _LoweredForGpu(self._function.trace(*arguments).lower(lowering_platforms=(PLATFORM,)))


class _LoweredForGpu:
    def __init__(self, lowered: jax.stages.Lowered) -> None:
        self._lowered = lowered
        self.as_text = lowered.as_text

    def compile(self) -> jax.stages.Compiled:
        return self._lowered.compile(compiler_options=OPTIONS)
