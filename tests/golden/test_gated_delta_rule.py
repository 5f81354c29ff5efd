"""Recorded outputs of the gated delta rule: SANA-WM's main branch in two forms, SANA-Streaming's chunks with a state.

What stands around the rule in those layers (projections, short convolution, norms, gates) is spelt out here in numpy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gated_delta_rule import gated_delta_rule, init_state
from sana_jax.nn.rope import rope_3d
from tests.golden.golden_files import assert_golden, load_golden

MODULE = 1e-5
NORM_EPSILON = 1e-5


run_rule = jax.jit(gated_delta_rule, static_argnames=("key_scale", "chunk_starts", "epsilon", "implementation"))


class Layer:
    """The weights of one attention layer, widened, and the sizes of its file."""

    def __init__(self, name: str, prefix: str):
        self.golden = load_golden(name)
        self.hparams = self.golden.hparams
        self.size = self.hparams["net"]["linear_head_dim"]
        self.grid = (self.hparams["T"], self.hparams["H"], self.hparams["W"])
        self.tokens = self.grid[1] * self.grid[2]
        self._prefix = prefix

    def __getitem__(self, name: str) -> np.ndarray:
        return self.golden[f"w/{self._prefix}{name}"].astype(np.float64)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def feature(self, name: str, x: np.ndarray) -> np.ndarray:
        """RMS norm over all channels, then ReLU."""
        return np.maximum(x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPSILON) * self[f"{name}.weight"], 0)

    def gates(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """β of (B, T, S, h) and decay of (B, T, h)."""
        beta = 1 / (1 + np.exp(-self.linear("beta_proj", x)))
        steepness = np.logaddexp(0, self.linear("gate_proj", x.mean(2)) + self["dt_bias"])
        return beta, np.exp(-np.exp(self["A_log"]) * steepness)

    def rule(self, query, key, value, x, first_frame=0, state=None, **options):
        """The rule on (B, T, S, C) features, and its state."""
        heads = [jnp.asarray(f.reshape(*f.shape[:3], -1, self.size), jnp.float32) for f in (query, key, value)]
        gates = [jnp.asarray(gate, jnp.float32) for gate in self.gates(x)]
        rotation = rope_3d((x.shape[1], *self.grid[1:]), self.size, first_frame=first_frame)
        state = init_state(*gates[1].shape[::2], self.size) if state is None else state
        options["key_scale"] = (self.size * self.tokens) ** -0.5
        out, state = run_rule(*heads, *gates, rotation, state=state, **options)
        return np.asarray(out, np.float64).reshape(x.shape), state


def short_convolution(key: np.ndarray, taps: np.ndarray, starts: list[int]) -> np.ndarray:
    """Over earlier frames of the clip and later frames of the own chunk; the last tap is the frame itself's."""
    out, frames, last = key * taps[:, -1], key.shape[1], taps.shape[1] - 1
    for t in range(frames):
        end = min(start for start in (*starts, frames) if start > t)
        for distance in range(1, last + 1):
            for other in (t - distance, t + distance):
                if 0 <= other < end:
                    out[:, t] += key[:, other] * taps[:, last - distance]
    return out


@pytest.mark.parametrize(("form", "implementation"), [("bidirectional", "xla_associative"), ("chunk_causal", "xla")])
def test_world_model(form, implementation):
    layer = Layer("wm_model", "blocks.0.attn.")
    golden = layer.golden
    x = golden["in/attn_x"].astype(np.float64)
    x = x.reshape(x.shape[0], layer.grid[0], layer.tokens, -1)
    starts = [0] if form == "bidirectional" else layer.hparams["chunk_boundaries"][:-1]
    query, key, value = np.split(x @ layer["qkv.weight"].T, 3, axis=-1)
    # recorded trap: frames that fill all chunks of the plain split make the convolution restart on that split
    frames, size = layer.grid[0], layer.hparams["chunk"]
    restarts = range(0, frames, size) if form == "chunk_causal" and frames % size == 0 else starts
    key = short_convolution(key, layer["conv_k.weight"][:, 0], list(restarts))
    beta, decay = layer.gates(x)
    assert_golden(beta.transpose(0, 3, 1, 2), golden["out64/gates_block0/beta"], MODULE, "beta")
    assert_golden(decay.transpose(0, 2, 1), golden["out64/gates_block0/decay"], MODULE, "decay")
    features = layer.feature("q_norm", query), layer.feature("k_norm", key), value
    options = {
        "chunk_starts": tuple(starts),
        "epsilon": layer.hparams["attention_eps"],
        "implementation": implementation,
    }
    found, _ = layer.rule(*features, x, **options)
    wanted = golden[f"out64/default_fp32/attn_block0_gdn/{form}/main_raw"]
    assert_golden(found.reshape(wanted.shape), wanted, MODULE, form)


def test_streaming_with_a_state():
    """Two chunks, the second with the state of the first, or with that of the first chunk's first frame."""
    layer = Layer("v2v_model", "streaming/blocks.0.attn.")
    golden, state, first_frame = layer.golden, None, 0
    recorded = "out64/attn_block0_state"
    for chunk, name in enumerate(("attn_x", "attn_x2")):
        x = golden[f"in/{name}"].astype(np.float64)
        x = x.reshape(x.shape[0], -1, layer.tokens, x.shape[-1])
        query, key = (x @ layer[f"{n}.weight"][..., 0].T for n in ("q", "k"))
        features = layer.feature("q_norm", query), layer.feature("k_norm", key), x @ layer["v.weight"].T
        if chunk == 0:
            _, after_one = layer.rule(*(f[:, :1] for f in features), x[:, :1])
            assert_state(after_one, golden, f"{recorded}/chunk0/saved_frame0_only")
        found, state = layer.rule(*features, x, first_frame, state=state)
        gate = layer.linear("output_gate", x)
        found = layer.linear("proj", found * gate / (1 + np.exp(-gate)))
        wanted = golden[f"{recorded}/chunk{chunk}/out"]
        assert_golden(found.reshape(wanted.shape), wanted, MODULE, f"chunk {chunk}")
        if chunk == 0:
            assert_state(state, golden, f"{recorded}/chunk0/saved")
        first_frame += x.shape[1]


def assert_state(state, golden, prefix: str) -> None:
    """Recorded states have the value's channels in front."""
    assert_golden(np.swapaxes(state.key_value, -1, -2), golden[f"{prefix}0"], MODULE, f"{prefix}0")
    assert_golden(state.key[..., None], golden[f"{prefix}1"], MODULE, f"{prefix}1")
