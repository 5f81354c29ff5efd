"""Softmax attention: every form beside the definition, in blocks without all scores, and what cuDNN is given."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.published import PUBLISHED_TRANSFORMERS, PUBLISHED_VIDEO_TRANSFORMERS, PUBLISHED_WORLD_TRANSFORMERS
from kernels import selection
from kernels.softmax_attention import blockwise, cudnn, reference, softmax_attention, xla
from kernels.softmax_attention.visibility import causal_blocks
from tests.kernels.cuda_lowering import lower_for_cuda
from tests.kernels.shapes import QUICK_COMPILE, relative_error

BATCH, HEADS, SIZE, VALUE_SIZE, PER_FRAME = 2, 2, 8, 5, 3
SIZES = {"query_block": 8, "key_block": 7}
# without the test session's own check of shapes, which would come first
UNCHECKED = getattr(softmax_attention, "__wrapped__", softmax_attention)


def formula(query, key, value, frame_mask=None, scale=SIZE**-0.5):
    """In float64, all scores at once."""
    scores = np.einsum("bmhd,bnhd->bhmn", query, key) * scale
    if frame_mask is not None:
        tokens = np.repeat(np.repeat(frame_mask, PER_FRAME, axis=1), PER_FRAME, axis=2)
        scores = np.where(tokens[:, None], scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhmn,bnhe->bmhe", weights / np.where(total == 0, 1, total), value)


def draw(queries: int, keys: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = (queries, HEADS, SIZE), (keys, HEADS, SIZE), (keys, HEADS, VALUE_SIZE)
    return tuple(rng.standard_normal((BATCH, *shape)) * (2 if i < 2 else 1) for i, shape in enumerate(shapes))


def causal_mask(frames: int, keys: int, seed: int = 1) -> np.ndarray:
    """Of every example another one; whole blocks are hidden, and the first frame's queries see nothing."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(keys) <= np.arange(frames)[:, None]) & (rng.random((BATCH, frames, keys)) < 0.7)
    mask[:, 0] = False
    return mask


@pytest.mark.parametrize(("frames", "keys"), [(7, 7), (2, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_formula_and_gradients(frames, keys, masked):
    arrays = draw(frames * PER_FRAME, keys * PER_FRAME)
    mask = causal_mask(frames, keys) if masked else None
    weights = np.random.default_rng(2).standard_normal((*arrays[0].shape[:3], VALUE_SIZE))

    def loss(function):
        def run(*arrays):
            out = function(*arrays)
            return (out * weights).sum(), out

        return run

    def ours(query, key, value):
        given = None if mask is None else jnp.asarray(mask)
        return blockwise.attend(query, key, value, given, scale=0.4, **SIZES)

    def plain(query, key, value):
        scores = jnp.einsum("bmhd,bnhd->bhmn", query, key, precision="highest") * 0.4
        if mask is not None:
            tokens = np.repeat(np.repeat(mask, PER_FRAME, axis=1), PER_FRAME, axis=2)[:, None]
            scores = jnp.where(tokens, scores, -jnp.inf)
            seen = tokens.any(-1, keepdims=True)
            weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, 0)), 0)
        else:
            weights = jax.nn.softmax(scores)
        return jnp.einsum("bhmn,bnhe->bmhe", weights, value, precision="highest")

    given = [jnp.asarray(array, jnp.float32) for array in arrays]
    results = [
        jax.jit(jax.value_and_grad(loss(f), (0, 1, 2), has_aux=True), compiler_options=QUICK_COMPILE)(*given)
        for f in (ours, plain)
    ]
    ((_, found), gradients), (_, expected) = results
    assert relative_error(found, formula(*arrays, mask, scale=0.4)) <= 1e-6
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert relative_error(gradient, wanted) <= 2e-6


def test_bfloat16_rounds_weights_as_fused_attention_does():
    arrays = [jnp.asarray(array, jnp.bfloat16) for array in draw(20, 30)]
    wide = [np.asarray(array.astype(jnp.float32), np.float64) for array in arrays]
    scores = np.einsum("bmhd,bnhd->bhmn", *wide[:2]) * SIZE**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    rounded = np.asarray(jnp.asarray(weights, jnp.bfloat16).astype(jnp.float32), np.float64)
    expected = np.einsum("bhmn,bnhe->bmhe", rounded, wide[2]) / weights.sum(-1).swapaxes(1, 2)[..., None]
    found = blockwise.attend(*arrays)
    assert found.dtype == jnp.bfloat16
    expected = jnp.asarray(expected, jnp.bfloat16)
    assert np.mean(np.asarray(found != expected)) < 0.01


def test_no_array_has_all_scores():
    """Of 8192 tokens one head's scores would take 268 MB; forward and backward passes stay far below."""
    tokens, block = 8192, 512
    shapes = [jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.bfloat16)] * 3

    def loss(*arrays):
        return blockwise.attend(*arrays, query_block=block, key_block=block).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile(QUICK_COMPILE)
    one_block = 4 * block**2
    used = compiled.memory_analysis().temp_size_in_bytes
    assert used < 16 * one_block + 40 * 4 * tokens * 16, f"{used:,}"
    assert used < 4 * tokens**2 / 8


def test_one_row_of_a_mask_is_for_all_queries():
    """A mask of keys, as padded captions and caches have it."""
    query, key, value = draw(11, 17)
    mask = np.random.default_rng(3).random((BATCH, 17)) < 0.5
    mask[0] = np.arange(17) >= 14  # whole blocks of keys are hidden
    given = [jnp.asarray(array, jnp.float32) for array in (query, key, value)]
    found = blockwise.attend(*given, jnp.asarray(mask[:, None]), **SIZES)
    for sample, seen in enumerate(mask):
        own = slice(sample, sample + 1)
        expected = formula(query[own], key[own][:, seen], value[own][:, seen])
        assert relative_error(found[own], expected) <= 1e-6


def test_definition():
    """The reference's options together, in float64 by hand: shared keys, soft cap, bias, lengths, causal."""
    query, key, value = draw(6, 6)
    bias = np.random.default_rng(4).standard_normal((BATCH, 1, 6, 6))
    lengths = np.asarray([0, 4])
    scores = np.einsum("bmhd,bnd->bhmn", query, key[:, :, 0]) * 0.3
    scores = 2.0 * np.tanh(scores / 2.0) + bias
    seen = (np.arange(6) < lengths[:, None, None]) & np.tri(6, dtype=bool)
    weights = np.where(seen[:, None], np.exp(scores), 0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    expected = np.einsum("bhmn,bne->bmhe", weights, value[:, :, 0])
    given = [jnp.asarray(x, jnp.float32) for x in (query, key[:, :, :1], value[:, :, :1])]
    options = {"bias": jnp.asarray(bias, jnp.float32), "key_lengths": lengths, "causal": True, "scale": 0.3}
    found = softmax_attention(*given, **options, soft_cap=2.0, implementation="reference")
    assert relative_error(found, expected) <= 1e-6
    assert not found[0].any()


# -- every form beside the definition ----------------------------------------------------------------------------------

TOKENS = 12
FRAME_MASK = np.asarray([[[0, 0, 1], [1, 1, 0]], [[1, 0, 0], [0, 0, 0]]], bool)
KEY_MASK = np.random.default_rng(3).random((1, 1, TOKENS)) < 0.5
BIAS = jnp.asarray(np.random.default_rng(4).standard_normal((BATCH, 1, 1, TOKENS)), jnp.float32)
# options, heads of keys, size of values
CASES = {
    "causal, shared keys": ({"causal": True}, 2, 5),
    "causal, mask": ({"causal": True, "mask": FRAME_MASK}, 4, 5),
    "causal blocks": ({"block_starts": (0, 4, 10)}, 4, 5),
    "lengths": ({"key_lengths": np.asarray([0, 7]), "scale": 0.2}, 4, SIZE),
    "padding": ({"mask": KEY_MASK}, 1, SIZE),
}
ALL_SCORES = {
    "bias": ({"bias": BIAS}, 4, SIZE),
    "bias of heads, shared keys": ({"bias": BIAS * jnp.arange(4.0)[:, None, None]}, 2, 5),
    "capped": ({"soft_cap": 0.7, "mask": FRAME_MASK, "causal": True}, 2, SIZE),
}


def inputs_of(shared: int, value_size: int, dtype=jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (TOKENS, 4, SIZE), (TOKENS, shared, SIZE), (TOKENS, shared, value_size)
    return [jnp.asarray(2 * rng.standard_normal((BATCH, *shape)), dtype) for shape in shapes]


def with_gradients(**options):
    def run(*given):
        out, pull = jax.vjp(functools.partial(softmax_attention, **options), *given)
        return out, *pull(jnp.sin(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

    return jax.jit(run, compiler_options=QUICK_COMPILE)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that do not divide the tokens, in place of blocks that hold all of them."""
    attend = functools.partial(blockwise.attend, query_block=5, key_block=7)
    monkeypatch.setitem(selection.operations()["softmax_attention"], "blockwise", attend)


@pytest.mark.parametrize(
    ("implementation", "case"),
    [
        *((form, case) for form in ("blockwise", "large_blocks") for case in CASES if case != "padding"),
        *(("xla", case) for case in [*CASES, *ALL_SCORES]),
    ],
)
def test_values_and_gradients(implementation, case, small_blocks):
    options, *shape = (CASES | ALL_SCORES)[case]
    given = inputs_of(*shape)
    with jax.default_matmul_precision("highest"):
        found = with_gradients(**options, implementation=implementation)(*given)
        expected = with_gradients(**options, implementation="reference")(*given)
    assert float(jnp.abs(expected[0]).max()) > 0.5
    for mine, wanted in zip(found, expected, strict=True):
        assert relative_error(mine, wanted) <= 2e-6


@pytest.mark.parametrize("starts", [(0, 5, 7), (0, 4, 8), (0,)])
def test_causal_blocks_are_the_mask_that_they_stand_for(starts):
    given = inputs_of(2, SIZE)
    own = np.searchsorted(starts, np.arange(TOKENS), side="right")
    with jax.default_matmul_precision("highest"):
        found = with_gradients(block_starts=starts, bounded_memory=True)(*given)
        expected = with_gradients(mask=(own <= own[:, None])[None], implementation="reference")(*given)
    for mine, wanted in zip(found, expected, strict=True):
        assert relative_error(mine, wanted) <= 2e-6


def test_large_blocks_are_of_whole_rows():
    """A GPU's products copy operands whose rows are of another length, to fill them up."""
    sizes = {tokens: blockwise._block_size(tokens, blockwise.LARGE_BLOCK, blockwise.WHOLE_ROWS) for tokens in
             (18480, 2640, 4000, 1250, 300, 12)}  # fmt: skip
    assert sizes == {18480: 880, 2640: 880, 4000: 800, 1250: 640, 300: 304, 12: 12}
    query, key, value = (jnp.asarray(array, jnp.float32) for array in draw(1250, 1400))
    with jax.default_matmul_precision("highest"):
        found = softmax_attention(query, key, value, implementation="large_blocks")
        assert relative_error(found, formula(query, key, value)) <= 2e-6


@pytest.mark.parametrize("implementation", ["blockwise", "large_blocks"])
@pytest.mark.parametrize("options", [{"mask": np.tril(np.ones((1, 64, 64), bool))}, {"causal": True}, {}], ids=str)
def test_no_pair_of_all_is_kept_for_a_scan_of_layers(implementation, options):
    """What is seen depends on no layer, so that JAX would compute it once for all of them, and keep it."""
    tokens = 4096 if options else 4100  # these leave a rest
    shape = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)

    def loss(query, key, value):
        def layer(query, _):
            attend = functools.partial(softmax_attention, implementation=implementation, bounded_memory=True, **options)
            return jax.checkpoint(attend)(query, key, value), None

        return jax.lax.scan(layer, query, None, length=2)[0].sum()

    traced = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(shape, shape, shape))
    sizes = {math.prod(map(int, found.split(","))) for found in re.findall(r"\w\[([\d,]+)\]", traced)}
    assert max(sizes) < tokens**2 / 8
    assert max(sizes) >= 8 * tokens


def test_what_runs_without_a_measurement():
    """Where all scores may be held the form that has them, in both modes; blocks where they may not."""
    query, key, value = given = inputs_of(4, SIZE, jnp.bfloat16)
    assert (softmax_attention(*given, bias=BIAS) == xla.attend(*given, bias=BIAS)).all()
    _, tangent = jax.jvp(lambda query: softmax_attention(query, key, value), (query,), (query,))
    assert jnp.isfinite(tangent).all()
    bounded = softmax_attention(*given, mask=KEY_MASK, bounded_memory=True)
    assert (bounded == blockwise.attend(*given, jnp.asarray(KEY_MASK))).all()
    assert (bounded != xla.attend(*given, jnp.asarray(KEY_MASK))).any()
    lowered = [lower_for_cuda(functools.partial(softmax_attention, bounded_memory=b), *given) for b in (False, True)]
    assert not any("cudnn" in program for program in lowered)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": np.ones((1, 5, 3), bool)}, r"mask \(1, 5, 3\) of bool for 12 queries and 12 keys of 2 examples"),
        ({"mask": KEY_MASK, "key_lengths": np.ones(2, int)}, "mask and key_lengths: give one of them"),
        ({"key_lengths": np.ones((2, 1), int)}, r"key_lengths \(2, 1\): it must have one number per example, \(2,\)"),
        ({"bias": jnp.zeros((2, 3, 1, 12))}, r"bias \(2, 3, 1, 12\): it must be \(2, 4, 12, 12\), or 1"),
        ({"soft_cap": 0.0}, "soft_cap=0.0: it must be more than 0"),
        ({"bias": BIAS, "implementation": "blockwise"}, "implementation='blockwise': it takes no bias; use 'xla'"),
        ({"soft_cap": 1.0, "bounded_memory": True}, "implementation='blockwise': it takes no soft_cap; use 'xla'"),
        ({"block_starts": (0, 3), "causal": True}, "block_starts and mask, key_lengths or causal: give one of them"),
        ({"block_starts": (0, 3, 3)}, r"block_starts \(0, 3, 3\) for 12 queries and 12 keys: it must ascend from 0"),
        ({"block_starts": (1, 3)}, "it must ascend from 0"),
        ({"block_starts": (0, 12)}, "below their number"),
        ({"soft_cap": 1.0, "implementation": "cudnn"}, "implementation='cudnn': it has no soft_cap; use 'blockwise'"),
        ({"implementation": "cudnn"}, "'cudnn': inputs of float32: all of them must be bfloat16 or float16"),
        ({"bounded_memory": True, "implementation": "xla"}, "'xla' has all scores at once, which bounded_memory=True"),
        ({"implementation": "flash"}, r"implementation='flash': choose one of \['blockwise', 'cudnn', 'large_blocks'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        jax.eval_shape(functools.partial(UNCHECKED, **options), *inputs_of(4, SIZE))
    assert "\n" not in str(caught.value)


def test_block_starts_may_be_an_array():
    inputs = [jnp.ones((1, 12, 2, 4))] * 3
    given = UNCHECKED(*inputs, block_starts=np.array([0, 3, 9]))
    np.testing.assert_array_equal(given, UNCHECKED(*inputs, block_starts=(0, 3, 9)))


def test_shapes_that_do_not_fit_are_refused():
    query, key, value = inputs_of(4, SIZE)
    with pytest.raises(ValueError, match=r"and h a multiple of k"):
        UNCHECKED(query, key[:, :, :3], value[:, :, :3])
    with pytest.raises(ValueError, match="causal=True for 12 queries and 6 keys: there must be as many"):
        UNCHECKED(query, key[:, :6], value[:, :6], causal=True)


# -- cuDNN, as far as a CPU can tell -----------------------------------------------------------------------------------

PICKED = selection.Measurement("", "cudnn", "cuda", "H100", {}, "2026-01-01", "", 0.5, "by hand")


@pytest.fixture
def with_cudnn(monkeypatch):
    """An H100 with cuDNN, as far as tracing and lowering ask."""
    from jax._src.cudnn import fused_attention_stablehlo

    class Versions:
        cudnn_get_version = staticmethod(lambda: 91300)

    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", Versions)
    monkeypatch.setattr(cudnn, "largest_size", lambda: cudnn.LARGEST_SIZE)
    monkeypatch.setattr(cudnn, "fault_here", lambda: None)
    rows = [dataclasses.replace(PICKED, op=op) for op in ("softmax_attention", "bounded_softmax_attention")]
    monkeypatch.setattr(selection, "measurements", lambda: tuple(rows))


def calls(function, *shapes) -> list[str]:
    return re.findall(r"__cudnn\$(\w+)", lower_for_cuda(function, *shapes))


def half(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def published_shapes() -> set[tuple[str, int, int, int, int]]:
    """What, queries, keys, heads and head size of the published networks' softmax attentions."""
    found = set()
    for entry in PUBLISHED_TRANSFORMERS.values():
        config = entry.config
        tokens = (config.sample_size // config.patch_size) ** 2
        found.add(("caption", tokens, 300, config.num_cross_attention_heads, config.cross_attention_head_dim))
    for entry in PUBLISHED_VIDEO_TRANSFORMERS.values():
        config = entry.config
        found.add(("video", 21 * 1560, 300, config.num_cross_attention_heads, config.cross_attention_head_dim))
    for entry in PUBLISHED_WORLD_TRANSFORMERS.values():
        config = entry.config
        size = config.hidden_size // config.num_attention_heads
        found |= {("video", 21 * 880, 300, config.num_attention_heads, size)}
        tokens = 21 * 880
        found |= {("world", tokens, tokens, config.hidden_size // config.linear_head_dim, config.linear_head_dim)}
    return {*found, ("world", 21 * 880, 21 * 880, 32, 128)}  # the refiner's


@pytest.mark.parametrize(("what", "queries", "keys", "heads", "size"), sorted(published_shapes()))
def test_cudnn_is_called_where_it_is_measured_to_be_faster(what, queries, keys, heads, size, with_cudnn):
    """At the published sizes, with gradients; the padding of captions is written out."""

    def loss(query, key, value, padding=None):
        options = {"bias": padding} if what == "caption" else {"mask": padding, "bounded_memory": True}
        return softmax_attention(query, key, value, **options).astype(jnp.float32).sum()

    shapes = [half(2, queries, heads, size), half(2, keys, heads, size), half(2, keys, heads, size)]
    if what == "caption":
        shapes.append(jax.ShapeDtypeStruct((2, 1, 1, keys), jnp.float32))
    elif what == "video":
        shapes.append(jax.ShapeDtypeStruct((2, 1, keys), bool))
    plain = "fmhaSoftmax" if what == "world" else "fmhaScaleBiasSoftmax"
    assert calls(jax.grad(loss, (0, 1, 2)), *shapes) == [plain, f"{plain}Backward"]


def test_cudnn_is_called_once_for_each_causal_block(with_cudnn):
    """On the keys before its end, without a mask; 121 latent frames in blocks of three are the published recipe."""
    frame, frames = 880, 121
    starts = tuple(range(0, frames * frame, 3 * frame))
    shapes = [half(1, frames * frame, 20, 112)] * 3
    run = functools.partial(softmax_attention, block_starts=starts, bounded_memory=True)

    def loss(*given):
        return run(*given).astype(jnp.float32).sum()

    program = lower_for_cuda(jax.grad(loss, (0, 1, 2)), *shapes)
    found = re.findall(r"__cudnn\$(\w+)", program)
    assert sorted(found) == ["fmhaSoftmax"] * len(starts) + ["fmhaSoftmaxBackward"] * len(starts)
    for end in (*starts[1:], frames * frame):
        assert f"tensor<1x{end}x20x112xbf16>" in program
    assert f"{frames * frame}x{frames * frame}" not in program  # no mask


def test_cudnn_is_called_for_worlds_with_a_mask(with_cudnn):
    """Written out once for all heads: 683 MB at 21 latent frames."""
    tokens = 21 * 880
    shapes = half(1, tokens, 20, 112), half(1, tokens, 20, 112), half(1, tokens, 20, 112)
    mask = np.tril(np.ones((1, 21, 21), bool))
    run = functools.partial(softmax_attention, mask=mask, bounded_memory=True)
    assert calls(run, *shapes) == ["fmhaScaleBiasSoftmax"]


@pytest.mark.parametrize(
    ("sizes", "options", "reason"),
    [
        ((12, 12, 20), {}, "heads of 20 channels: it takes multiples of 8 up to 128 on this device"),
        ((12, 12, 136), {}, "heads of 136 channels"),
        ((12, 11, 16), {"mask": np.ones((1, 1, 11), bool)}, "12 queries and 11 keys: both must be even"),
        ((2**15, 2**15, 16), {"mask": np.ones((1, 2, 2), bool)}, "32768 x 32768 pairs takes over 1 GiB"),
    ],
)
def test_what_cudnn_does_not_take_runs_in_blocks(sizes, options, reason, with_cudnn):
    queries, keys, size = sizes
    shapes = half(1, queries, 2, size), half(1, keys, 2, size), half(1, keys, 2, size)
    bounded = functools.partial(softmax_attention, **options, bounded_memory=True)
    assert calls(bounded, *shapes) == []
    with pytest.raises(ValueError, match=f"implementation='cudnn': .*{reason}.*; use 'blockwise' or 'xla'"):
        lower_for_cuda(functools.partial(bounded, implementation="cudnn"), *shapes)
    assert "stablehlo.while" in lower_for_cuda(bounded, *shapes)  # that of the blocks
    if "1 GiB" not in reason:
        open_to_all = lower_for_cuda(functools.partial(softmax_attention, **options), *shapes)
        assert "cudnn" not in open_to_all
        assert "stablehlo.while" not in open_to_all  # XLA has all scores there, as where there is no cuDNN


def test_without_a_gpu_cudnn_is_named_as_what_is_missing(monkeypatch):
    rows = (dataclasses.replace(PICKED, op="softmax_attention"),)
    monkeypatch.setattr(selection, "measurements", lambda: rows)
    given = inputs_of(4, SIZE, jnp.bfloat16)
    assert (softmax_attention(*given) == xla.attend(*given)).all()
    with pytest.raises(ValueError, match="implementation='cudnn': no CUDA device is here, and with it no cuDNN"):
        jax.eval_shape(functools.partial(softmax_attention, implementation="cudnn"), *given)
    with pytest.raises(ValueError, match="softmax_attention: implementation='cudnn' runs on cuda alone, not on cpu"):
        softmax_attention(*given, implementation="cudnn")


def test_the_trial_of_cudnn(monkeypatch):
    """With XLA's form in cuDNN's place: also while a program is traced, under a mesh."""
    (device, *_), plain = jax.devices(), jax.nn.dot_product_attention
    assert cudnn.trial(device, "xla") is None
    assert "cuDNN is not detected" in cudnn.trial(device, "cudnn")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, mask, **rest: plain(*x, **rest))
    found = []
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        jax.jit(lambda x: found.append(cudnn.trial(device, "xla")) or x)(jnp.ones(2))
    assert re.fullmatch(r"values or gradients are off by \d.* of the largest", found[0])


def test_where_the_trial_went_wrong_another_form_runs(with_cudnn, monkeypatch):
    monkeypatch.setattr(cudnn, "fault_here", lambda: "CUDNN_STATUS_INTERNAL_ERROR")
    given = inputs_of(4, SIZE, jnp.bfloat16)
    with pytest.raises(ValueError, match="'cudnn': a trial on this machine went wrong: CUDNN_STATUS_INTERNAL_ERROR;"):
        lower_for_cuda(functools.partial(softmax_attention, implementation="cudnn"), *given)
    assert "cudnn" not in lower_for_cuda(lambda *x: softmax_attention(*x), *given)
    with cudnn.on_capability((9, 0)):  # another machine's: nothing can be tried
        assert "cudnn" in lower_for_cuda(functools.partial(softmax_attention, implementation="cudnn"), *given)


@pytest.mark.gpu
def test_cudnn_works_here():
    assert cudnn.fault_here() is None


@pytest.mark.gpu
@pytest.mark.parametrize("size", [32, 112])
@pytest.mark.parametrize("case", ["none", "frames", "padding", "lengths", "causal", "blocks"])
def test_cudnn_on_a_gpu(case, size):
    """Values and gradients in bfloat16 beside the definition: cross-attention's padding, worlds' causal frames."""
    batch, frames, tokens, heads = 2, 4, 96, 4
    rng = np.random.default_rng(0)
    given = [jnp.asarray(rng.standard_normal((batch, frames * tokens, heads, size)), jnp.bfloat16) for _ in range(3)]
    options = {
        "none": {},
        "frames": {"mask": np.tri(frames, dtype=bool)[None]},
        "padding": {"mask": np.arange(frames * tokens)[None, None] < np.asarray([300, 77])[:, None, None]},
        "lengths": {"key_lengths": np.asarray([300, 77])},
        "causal": {"causal": True},
        "blocks": {"block_starts": (0, tokens, 3 * tokens)},
    }[case]
    found, expected = (with_gradients(implementation=name, **options)(*given) for name in ("cudnn", "reference"))
    for mine, wanted in zip(found, expected, strict=True):
        assert relative_error(mine, wanted) <= 2.0**-6


@pytest.mark.parametrize("case", ["lengths", "causal, mask", "causal blocks", "padding", "bias"])
def test_what_surrounds_cudnn(case, monkeypatch, with_cudnn):
    """With XLA's form in cuDNN's place: padding, lengths and rows without any key mean the same."""
    options, _, _ = (CASES | ALL_SCORES)[case]
    plain = jax.nn.dot_product_attention

    def in_its_place(*given, implementation, **options):
        assert implementation == "cudnn"
        return plain(*given, **options, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    query, key, value = inputs_of(4, SIZE, jnp.bfloat16)
    names = {name: options.get(name) for name in ("mask", "bias", "key_lengths")}
    names = {name: None if x is None else jnp.asarray(x) for name, x in names.items()}
    rest = {name: options[name] for name in ("causal", "scale") if name in options}
    starts = {name: options[name] for name in ("block_starts",) if name in options}
    if starts:
        names["mask"] = jnp.asarray(causal_blocks(starts["block_starts"], TOKENS))
    found = cudnn.attend(query, key, value, **names, **rest, **starts)
    expected = reference.attend(query, key, value, **names, **rest)
    assert relative_error(found, expected) <= 2.0**-7
    assert (jnp.abs(expected).sum((2, 3)) > 0).tolist() == (jnp.abs(found).sum((2, 3)) > 0).tolist()
