"""SANA-WM with its frames split over simulated devices beside one device: values, gradients, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from sana_jax.errors import UserError
from sana_jax.models.context_parallel import context_parallel
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer

ROOT = Path(__file__).parents[2]
VALUE, GRADIENT = 1e-6, 1e-5


@pytest.mark.parametrize(
    ("case", "gradients"),
    [
        ("chunks over 2, parameters over 2", False),
        *(
            pytest.param(case, True, marks=pytest.mark.prove)
            for case in (
                "chunks over 2, parameters over 2",
                "bidirectional over 4",
                "chunks over 4, no filling up",
                "bidirectional over 2",
            )
        ),
    ],
)
def test_split_frames_change_nothing_but_rounding(case, gradients, tmp_path):
    command = [sys.executable, "-m", "tests.models.context_parallel_worker", str(tmp_path / "out.json"), case]
    command += ["gradients"] if gradients else []
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report) > 40 or not gradients
    for name, error in report.items():
        assert error <= (VALUE if name == "velocity" else GRADIENT), f"{name}: {error:.1e}"


# -- what does not fit -------------------------------------------------------------------------------------------------

CONFIG = SanaWMConfig(
    in_channels=2,
    num_layers=1,
    hidden_size=8,
    num_attention_heads=1,
    linear_head_dim=8,
    chunk_plucker_channels=2,
    caption_channels=4,
)
FRAMES = 5


def lowered(axes: dict[str, int], **call):
    """Traces a call over a mesh of devices that need not be there."""
    transformer = SanaWMTransformer(CONFIG)
    latents, caption = jnp.zeros((1, FRAMES, 1, 1, 2)), jnp.zeros((1, 1, 4))
    params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), latents, caption, jnp.zeros((1, FRAMES))))
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    network = context_parallel(transformer, mesh)
    given = {"timestep": jnp.zeros((1, FRAMES)), **call}
    return jax.eval_shape(lambda params: network.apply(params, latents, caption, **given), params)


def test_frames_that_do_not_divide_are_cut_off_again():
    assert lowered({"context": 2}).shape == lowered({"data": 2, "context": 8}).shape == (1, FRAMES, 1, 1, 2)


@pytest.mark.parametrize(
    ("axes", "call", "message"),
    [
        ({"data": 2}, {}, "no axis 'context' to split frames over; its axes are data"),
        ({"context": 2}, {"timestep": np.zeros((1, 4), np.float32)}, r"timestep of shape \(1, 4\).*5 frames"),
        ({"context": 2}, {"block_starts": (0, 5)}, r"block_starts=\(0, 5"),
        ({"context": 2}, {"first_frame": 1020}, "1026 frames of tokens exceed the 1024"),
    ],
)
def test_what_does_not_fit(axes, call, message):
    with pytest.raises(UserError, match=message):
        lowered(axes, **call)


def test_a_state_is_refused():
    transformer = SanaWMTransformer(CONFIG, context_axis="context")
    with pytest.raises(UserError, match="context_axis='context' with a state"):
        jax.vmap(
            lambda latents: transformer.apply(
                {"params": {}}, latents, jnp.zeros((1, 1, 4)), jnp.zeros((1, 1)), state=object()
            ),
            axis_name="context",
        )(jnp.zeros((2, 1, 1, 1, 1, 2)))
