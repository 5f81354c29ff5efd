"""What devices learn of each other's frames; the moves between them are tested with the network that makes them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from kernels.split_frames import earlier_frames, frames_of_all, later_frames, own_part

DEVICES, FRAMES = 4, 2


def test_frames_of_all_devices():
    frames = jnp.asarray(np.random.default_rng(0).standard_normal((DEVICES, 1, FRAMES, 3)), jnp.bfloat16)
    gathered = jax.vmap(lambda x: frames_of_all(x, "devices"), axis_name="devices")(frames)
    assert gathered.dtype == jnp.bfloat16
    for found in gathered:
        np.testing.assert_array_equal(found, frames.reshape(1, DEVICES * FRAMES, 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_all_devices_are_summed_in_float32(dtype):
    """As the program for devices that need not be there says; frames themselves travel as they are."""
    mesh = AbstractMesh((2, DEVICES), ("others", "devices"), axis_types=(AxisType.Auto,) * 2)
    over_frames = PartitionSpec(None, "devices")

    def loss(x):
        whole = {"mesh": mesh, "axis_names": {"devices"}, "check_vma": False}
        gathered = jax.shard_map(
            lambda x: frames_of_all(x, "devices"), in_specs=over_frames, out_specs=over_frames, **whole
        )(x)
        return jnp.square(gathered.astype(jnp.float32)).sum()

    frames = jax.ShapeDtypeStruct((1, DEVICES * FRAMES, 3), dtype)
    program = jax.jit(jax.grad(loss)).trace(frames).lower(lowering_platforms=("cuda",)).as_text()
    short = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    for kind, wanted in (("all_gather", short), ("reduce_scatter", "f32")):
        found = re.findall(rf"stablehlo\.{kind}\".*?-> tensor<\w+x(b?f\d+)>", program, re.DOTALL)
        assert found == [wanted], kind


@pytest.mark.parametrize("beyond", [0, 3])
def test_a_device_has_its_own_part(beyond):
    numbers = np.arange(DEVICES * FRAMES + beyond)
    run = jax.vmap(lambda _: own_part(numbers, FRAMES, "devices", beyond), axis_name="devices")
    for device, found in enumerate(run(jnp.arange(DEVICES))):
        np.testing.assert_array_equal(found, numbers[device * FRAMES :][: FRAMES + beyond])


def test_frames_that_are_not_split_have_no_neighbours():
    x = jnp.ones((1, FRAMES, 5))
    for found in (earlier_frames(x, 3, None), later_frames(x, 3, None)):
        np.testing.assert_array_equal(found, np.zeros((1, 3, 5)))
    assert frames_of_all(x, None) is x
