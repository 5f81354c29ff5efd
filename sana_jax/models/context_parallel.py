"""SANA-WM with a video's frames split over the devices of a mesh axis ("context parallelism").

Every device runs the network on its own frames. Across devices go: the composed updates of the delta rule, one matrix
pair per device and head; the keys and values of softmax layers; and the few neighbouring frames of the convolutions
over time. Other mesh axes stay with the compiler, so that parameters and the batch may be cut over them as ever.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from kernels.typing import Array, Bool, Float, Int, PyTree
from sana_jax.errors import UserError
from sana_jax.models.sana_wm import SanaWMTransformer
from sana_jax.models.sana_wm_config import SanaWMConfig

CONTEXT_AXIS = "context"


@dataclasses.dataclass(frozen=True)
class ContextParallelTransformer:
    """A transformer whose ``apply`` splits frames over ``axis``; see ``context_parallel``.

    Attributes:
        transformer: the network, which knows nothing of it.
        mesh: None for that of ``jax.set_mesh`` at the time of the call.
        axis: the mesh axis.
    """

    transformer: SanaWMTransformer
    mesh: Mesh | None = None
    axis: str = CONTEXT_AXIS

    @property
    def config(self) -> SanaWMConfig:
        """The network's shape."""
        return self.transformer.config

    def apply(
        self,
        variables: PyTree,
        hidden_states: Float[Array, "B T H W C"],
        encoder_hidden_states: Float[Array, "B L Ctext"],
        timestep: Float[Array, "B T"],
        encoder_attention_mask: Int[Array, "B L"] | None = None,
        camera_conditions: Float[Array, "B T 20"] | None = None,
        chunk_plucker: Float[Array, "B T H W P"] | None = None,
        frame_valid_mask: Bool[Array, "B T"] | None = None,
        block_starts: tuple[int, ...] | None = None,
        convolution_starts: tuple[int, ...] | None = None,
        *,
        first_frame: int | Int[Array, ""] = 0,
    ) -> Float[Array, "B T H W C"]:
        """The velocity, as ``SanaWMTransformer`` has it: the same arguments, of the whole video, and the same values.

        Frames that do not divide by the axis are filled up with frames that no other sees, and cut off again.

        Raises:
            UserError: as the transformer; or a mesh that has no such axis.
        """
        mesh = jax.sharding.get_abstract_mesh() if self.mesh is None else self.mesh
        devices = _axis_size(mesh, self.axis)
        frames = hidden_states.shape[1]
        missing = -frames % devices
        split = {
            "hidden_states": hidden_states,
            "timestep": timestep,
            "camera_conditions": camera_conditions,
            "chunk_plucker": chunk_plucker,
            "frame_valid_mask": frame_valid_mask,
        }
        whole = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "first_frame": first_frame,
        }
        starts = _with_end(block_starts or (0,), frames, missing)
        if convolution_starts is not None:
            convolution_starts = _with_end(convolution_starts, frames, missing)
        _check_lengths(split, frames)
        # a camera of zeros is none: its intrinsics divide
        split = {name: _filled_up(x, missing, repeat="camera" in name) for name, x in split.items() if x is not None}
        static = {name: x for name, x in whole.items() if x is None or isinstance(x, int)}
        traced = {name: x for name, x in whole.items() if name not in static}
        network = self.transformer.clone(context_axis=self.axis)

        def run(variables: PyTree, split: dict[str, Array], traced: dict[str, Array]) -> Array:
            given = {**split, **traced, **static}
            return network.apply(variables, **given, block_starts=starts, convolution_starts=convolution_starts)

        everywhere, over_frames = PartitionSpec(), PartitionSpec(None, self.axis)
        velocity = jax.shard_map(
            run,
            mesh=self.mesh,
            in_specs=(everywhere, over_frames, everywhere),
            out_specs=over_frames,
            axis_names={self.axis},
            check_vma=False,
        )(variables, split, traced)
        return velocity[:, :frames]


def context_parallel(
    transformer: SanaWMTransformer, mesh: Mesh | None = None, axis: str = CONTEXT_AXIS
) -> ContextParallelTransformer:
    """The same network with a video's frames split over a mesh axis: call its ``apply`` inside ``jax.jit``.

    Gradients flow through it, and are those of one device. ``init`` and everything else is the transformer's own.

    Args:
        transformer: the network.
        mesh: None for that of ``jax.set_mesh``.
        axis: the name of the mesh axis.
    """
    return ContextParallelTransformer(transformer, mesh, axis)


def split_where_possible(transformer: SanaWMTransformer) -> SanaWMTransformer | ContextParallelTransformer:
    """``context_parallel`` where the mesh of ``jax.set_mesh`` has several devices along its context axis.

    Elsewhere the transformer itself. What is done with either is ``apply`` without a state.
    """
    devices = jax.sharding.get_abstract_mesh().shape.get(CONTEXT_AXIS, 1)
    return transformer if devices == 1 else context_parallel(transformer)


def _axis_size(mesh: Any, axis: str) -> int:
    if axis not in mesh.shape:
        raise UserError(
            f"the mesh has no axis {axis!r} to split frames over; its axes are {', '.join(mesh.shape) or 'none'}: "
            "use jax.set_mesh with a mesh that has it, or give one"
        )
    return mesh.shape[axis]


def _with_end(starts: tuple[int, ...], frames: int, missing: int) -> tuple[int, ...]:
    """Frames that fill up are a causal block of their own behind all others: it sees them, and is seen by none."""
    return (*starts, frames) if missing else tuple(starts)


def _check_lengths(split: dict[str, Array | None], frames: int) -> None:
    for name, array in split.items():
        if array is not None and (array.ndim < 2 or array.shape[1] != frames):
            raise UserError(f"{name} of shape {array.shape}; its second axis must have the video's {frames} frames")


def _filled_up(x: Array, missing: int, repeat: bool) -> Array:
    """``x`` with more frames at the end: of zeros, or of its last one."""
    if not missing:
        return x
    padding = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, padding, mode="edge") if repeat else jnp.pad(x, padding)
