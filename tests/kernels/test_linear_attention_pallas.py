"""The fused forms of linear attention: interpreted on a CPU, lowered for CUDA, and run where there is a GPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import PRESETS, load_preset
from configs.published import PUBLISHED_TRANSFORMERS, PUBLISHED_VIDEO_TRANSFORMERS
from kernels.linear_attention import pallas, reference, relu_linear_attention, rope_linear_attention
from kernels.linear_attention.blocks import Blocks, check_inputs
from sana_jax.models.sana import SanaConfig
from sana_jax.models.sana_video import SanaVideoConfig
from tests.kernels.cuda_lowering import lower_for_cuda, shared_memory, triton_kernels
from tests.kernels.rotation_cases import draw_rotary
from tests.kernels.shapes import QUICK_COMPILE, relative_error

PUBLIC = {"relu_linear_attention": relu_linear_attention, "rope_linear_attention": rope_linear_attention}
# (batch, tokens, heads, head size, value size): an odd number of tokens, padded heads and values; several blocks, and
# the published head sizes
SHAPES = [(2, 33, 3, 20, 5), (1, 130, 1, 32, 32), (1, 70, 1, 112, 112)]
SHARED_MEMORY = 232_448  # bytes that a program may have on an H100


def with_gradients(function, count=3):
    """Compiled ``(inputs, output_weights) -> output, gradients`` of the first ``count`` inputs."""

    def run(inputs, weights):
        def loss(*first):
            out = function(*first, *inputs[count:])
            return (out.astype(jnp.float32) * weights).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, tuple(range(count)), has_aux=True)(*inputs[:count])
        return out, gradients

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def draw(name, shape, dtype=jnp.float32):
    inputs = draw_rotary(*shape, dtype=dtype)
    weights = np.random.default_rng(1).standard_normal((*shape[:3], shape[4])).astype(np.float32)
    return inputs[: 3 if name.startswith("relu") else 5], weights


def compare(run, name, shape, dtype):
    """Value and gradients beside the reference's; float32 to its last bits, else rounded once."""
    inputs, weights = draw(name, shape, dtype)
    out, gradients = with_gradients(run, len(inputs))(inputs, weights)
    exact = [x.astype(jnp.float32) for x in inputs]
    expected, wanted = with_gradients(getattr(reference, name), len(inputs))(exact, weights)
    rounding = float(jnp.finfo(dtype).eps) / 2 if dtype != jnp.float32 else 0.0
    assert out.dtype == dtype
    assert relative_error(out, expected) <= 2e-6 + rounding
    for found, gradient in zip(gradients, wanted):
        assert relative_error(found, gradient) <= 1e-5 + rounding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_value_and_gradient(name, shape, dtype):
    compare(functools.partial(getattr(pallas, name), interpret=True), name, shape, dtype)


def test_programs_take_several_blocks(monkeypatch):
    """Runs of blocks, the last one of which begins beyond the last token, and sums over several programs."""
    monkeypatch.setattr("kernels.linear_attention.blocks.WANTED_PROGRAMS", 2)
    blocks = Blocks.of(jnp.zeros((1, 300, 1, 4)), jnp.zeros((1, 300, 1, 4)), 1)
    assert (blocks.run, blocks.programs) == (2, 3)
    run = functools.partial(pallas.rope_linear_attention, interpret=True)
    compare(run, "rope_linear_attention", (1, 300, 1, 4, 4), jnp.float32)


def test_other_keys_than_queries():
    query, key, value, *_ = draw_rotary(1, 90, 2, 8, 8)
    query = query[:, :7]
    out = pallas.relu_linear_attention(query, key, value, interpret=True)
    assert relative_error(out, reference.relu_linear_attention(query, key, value)) <= 2e-6


@pytest.mark.parametrize("name", PUBLIC)
def test_nothing_to_attend_to_gives_zero(name):
    """Queries of zeros and keys without a positive channel, one at a time."""
    inputs, weights = draw(name, SHAPES[0])
    run = with_gradients(functools.partial(getattr(pallas, name), interpret=True), len(inputs))
    query, key, *rest = inputs
    for changed in ((jnp.zeros_like(query), key, *rest), (query, -jnp.abs(key), *rest)):
        out, gradients = run(changed, weights)
        assert not np.any(out)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("size", "dtype", "message"),
    [(144, jnp.float32, r"query \(1, 3, 2, 144\).*at most 128; use 'xla'"), (8, jnp.int8, "query of int8")],
)
def test_inputs_that_do_not_fit(size, dtype, message):
    x = jnp.ones((1, 3, 2, size), dtype)
    with pytest.raises(ValueError, match=message):
        check_inputs("pallas", x, x, x)


def test_reasons_why_it_cannot_run():
    inputs, _ = draw("relu_linear_attention", SHAPES[0])
    run = functools.partial(relu_linear_attention, implementation="pallas")
    forward = lambda *x: jax.jvp(run, x, x)  # noqa: E731
    with pytest.raises(ValueError, match=r"no forward-mode derivative \(jax.jvp\); use implementation='xla'"):
        lower_for_cuda(forward, *inputs)
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="'pallas' runs on cuda alone, not on cpu"):
            run(*inputs)


def cases():
    """(function, dtype, shape) of every published network and every preset that has this attention, once each."""
    published = PUBLISHED_TRANSFORMERS | PUBLISHED_VIDEO_TRANSFORMERS
    networks = {(entry.config, entry.dtype) for entry in published.values()}
    networks |= {(load_preset(name).transformer, dtype) for name in PRESETS for dtype in ("float32", "bfloat16")}
    # The sizes of clips are not in the networks' configurations: 81 frames of 480p and of 720p.
    found = {("rope_linear_attention", "bfloat16", 2, tokens, 20, 112) for tokens in (21 * 30 * 52, 11 * 22 * 40)}
    for config, dtype in networks:
        if isinstance(config, SanaVideoConfig):  # 21 latent frames of 9:16
            side = config.sample_size // config.patch_size[1]
            found.add(("rope_linear_attention", dtype, 2, 21 * side * (side * 16 // 9), *heads(config)))
        elif isinstance(config, SanaConfig):
            side = config.sample_size // config.patch_size
            found.add(("relu_linear_attention", dtype, 2, side**2, *heads(config)))
    return sorted(found)


def heads(config):
    return config.num_attention_heads, config.attention_head_dim


def abstract(name, dtype, sizes):
    tables = [jax.ShapeDtypeStruct((sizes[1], sizes[3] // 2), jnp.float32)] * (2 if name.startswith("rope") else 0)
    inputs = [*[jax.ShapeDtypeStruct(sizes, dtype)] * 3, *tables]
    return inputs, jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_lowers_for_cuda(case):
    """Value and gradients at every shape that is shipped; nothing is computed."""
    name, dtype, *sizes = case
    run = with_gradients(functools.partial(PUBLIC[name], implementation="pallas"))
    program = lower_for_cuda(run, *abstract(name, dtype, tuple(sizes)))
    large = sizes[3] > 64
    assert triton_kernels(program) == (6 if large else 4)


@pytest.mark.prove
@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [(name, size, dtype) for name, size in zip(PUBLIC, (32, 112)) for dtype in ("bfloat16", "float32")],
)
def test_programs_fit_an_h100(name, size, dtype):
    """Triton's own compiler, which needs no GPU: what every kernel asks of a multiprocessor's shared memory."""
    run = with_gradients(functools.partial(PUBLIC[name], implementation="pallas"))
    found = shared_memory(run, *abstract(name, dtype, (2, 1024, 20, size)))
    assert len(found) == (6 if size == 112 else 4)
    assert max(found.values()) <= SHARED_MEMORY, found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1024, 4, 32, 32), (1, 1560, 4, 112, 112)], ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_compiled_value_and_gradient(name, shape, dtype):
    compare(functools.partial(PUBLIC[name], implementation="pallas"), name, shape, dtype)
