"""Which implementation runs: by name, by the table of measurements, and when it must not."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from kernels import selection
from kernels.refusal import Refusal
from kernels.selection import (
    Measurement,
    choose,
    describe,
    forward_mode,
    measurements,
    operations,
    parse,
    pick,
    picks,
    preference,
    preferred,
    preferring,
)
from tests.kernels.cuda_lowering import lower_for_cuda

ROW = Measurement("scale", "pallas", "cuda", "H100", {"jax": "0"}, "2026-01-01", "float32 (2,)", 0.5, "by hand")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fused(x, factor):
    return jnp.cos(x) * factor


fused.defvjp(lambda x, factor: (fused(x, factor), x), lambda factor, x, g: (-g * jnp.sin(x) * factor,))
IMPLEMENTATIONS = {"xla": lambda x, factor: jnp.sin(x) * factor, "pallas": fused, "xla_other": lambda x, _: jnp.tanh(x)}


def table(monkeypatch, *rows):
    monkeypatch.setattr(selection, "measurements", lambda: rows)


def row(implementation, ratio, platform="cuda"):
    return dataclasses.replace(ROW, implementation=implementation, ratio=ratio, platform=platform)


def test_the_table_is_of_operations_that_exist():
    found = operations()
    assert {"relu_linear_attention", "rope_linear_attention", "depthwise_conv"} <= set(found)
    for measurement in measurements():
        assert measurement.implementation in found[measurement.op]
    assert pick("depthwise_conv", "cpu").implementation == "xla_shifted"
    # nothing is timed on a GPU so far
    on_gpus = {found.op: found for found in picks() if found.platform == "cuda"}
    assert all(not row.timed for found in on_gpus.values() for row in found.measurements)
    cudnn = {op for op, found in on_gpus.items() if found.implementation == "cudnn"}
    assert cudnn == {"softmax_attention", "bounded_softmax_attention"}
    assert all(found.implementation == "xla" for op, found in on_gpus.items() if op not in cudnn)
    assert "softmax_attention on cuda: cudnn (reckoned 0." in describe()
    assert "depthwise_conv on cuda, rocm, tpu: xla (nothing is measured there)" in describe()


def test_what_is_faster_in_every_row_is_picked(monkeypatch):
    table(monkeypatch, row("pallas", 0.9), row("pallas", 0.2), row("xla_other", 0.5), row("xla_other", 0.5))
    assert pick("scale", "cuda").implementation == "pallas"  # 0.42 in the geometric mean
    assert pick("scale", "cpu") == selection.Pick("scale", "cpu", "xla", ())
    table(monkeypatch, row("pallas", 1.1), row("pallas", 0.2))
    assert pick("scale", "cuda").implementation == "xla"


def test_what_is_reckoned_must_promise_half_and_counts_until_something_is_timed(monkeypatch):
    reckoned = [dataclasses.replace(row("pallas", ratio), timed=False) for ratio in (0.3, 0.45)]
    table(monkeypatch, *reckoned)
    assert pick("scale", "cuda").implementation == "pallas"
    table(monkeypatch, *reckoned, dataclasses.replace(row("pallas", 0.6), timed=False))
    assert pick("scale", "cuda").implementation == "xla"
    table(monkeypatch, *reckoned, row("pallas", 1.1))
    assert pick("scale", "cuda") == selection.Pick("scale", "cuda", "xla", (row("pallas", 1.1),))
    table(monkeypatch, *reckoned, row("xla_other", 0.9))
    assert pick("scale", "cuda").implementation == "xla_other"


def test_none_is_decided_when_the_program_is_lowered(monkeypatch):
    x = jnp.ones(2)
    assert choose("scale", IMPLEMENTATIONS, None) is IMPLEMENTATIONS["xla"]
    table(monkeypatch, row("xla_other", 0.5, "cpu"), row("pallas", 0.5))
    run = jax.jit(jax.grad(lambda x: choose("scale", IMPLEMENTATIONS, None)(x, 2.0).sum()))
    programs = [run.trace(x).lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")]
    assert ["stablehlo.tanh" in program for program in programs] == [True, False, False]
    assert ["stablehlo.sine" in program for program in programs] == [False, True, False]


@pytest.mark.parametrize("transform", [lambda f: f, lambda f: jax.grad(lambda x: f(x).sum()), jax.vmap])
def test_a_named_program_for_a_gpu(transform):
    """It lowers for CUDA, with gradients, in loops and under remat; elsewhere it says where it runs."""
    run = transform(lambda x: choose("scale", IMPLEMENTATIONS, "pallas")(x, 2.0))
    looped = lambda x: jax.lax.scan(lambda c, _: (jax.checkpoint(run)(c), None), x, None, length=2)[0]  # noqa: E731
    for function in (run, looped):
        assert "stablehlo.cosine" in lower_for_cuda(function, jnp.ones(2)) or transform is not jax.vmap
        with pytest.raises(
            ValueError, match="scale: implementation='pallas' runs on cuda alone, not on cpu; use 'xla'"
        ):
            jax.jit(function).trace(jnp.ones(2)).lower(lowering_platforms=("cpu",))


def test_forward_mode_of_a_fused_form_is_refused():
    forward = lambda x: jax.jvp(lambda x: choose("scale", IMPLEMENTATIONS, "pallas")(x, 2.0), (x,), (x,))  # noqa: E731
    with pytest.raises(ValueError, match=r"no forward-mode derivative \(jax.jvp\); use implementation='xla'"):
        lower_for_cuda(forward, jnp.ones(2))


def test_a_network_that_takes_forward_mode_says_so(monkeypatch):
    """Inside, what has a gradient of its own is not picked; other forms are."""
    table(monkeypatch, row("pallas", 0.5), row("xla_other", 0.5, "cpu"))
    run = lambda x: choose("scale", IMPLEMENTATIONS, None)(x, 2.0)  # noqa: E731
    forward = lambda x: jax.jvp(run, (x,), (x,))  # noqa: E731
    with pytest.raises(ValueError, match="no forward-mode derivative"):
        lower_for_cuda(forward, jnp.ones(2))
    with forward_mode():
        assert "stablehlo.sine" in lower_for_cuda(lambda x: forward(x), jnp.ones(2))
        program = jax.jit(lambda x: forward(x)).lower(jnp.ones(2)).as_text()
    assert "stablehlo.tanh" in program
    assert "stablehlo.cosine" in lower_for_cuda(lambda x: run(x), jnp.ones(2))


def test_a_pick_that_refuses_leaves_it_to_the_next(monkeypatch, capsys):
    def refuses(x, factor):
        raise Refusal("implementation='xla_other': too small; use 'xla'")

    selection._say_once.cache_clear()
    table(monkeypatch, row("xla_other", 0.5, "cpu"), row("xla_other", 0.5, "cuda"))
    forms = {**IMPLEMENTATIONS, "xla_other": refuses, "other": lambda x, _: jnp.exp(x)}
    found = choose("scale", forms, None)(jnp.ones(2), 2.0)
    assert (found == 2 * jnp.sin(1.0)).all()
    line = "scale: what None picks on cpu leaves it to XLA: implementation='xla_other': too small; use 'xla'\n"
    assert capsys.readouterr().err == line  # once, and for this platform alone
    assert (choose("scale", forms, None, fallbacks=("other",))(jnp.ones(2), 2.0) == jnp.exp(1.0)).all()
    with pytest.raises(ValueError, match="too small"):
        choose("scale", forms, "xla_other")(jnp.ones(2), 2.0)


def test_a_preference_comes_before_the_table(monkeypatch):
    table(monkeypatch, row("xla_other", 0.5), row("xla_other", 0.5, "cpu"))
    program = lambda: lower_for_cuda(lambda x: choose("scale", IMPLEMENTATIONS, None)(x, 2.0), jnp.ones(2))  # noqa: E731
    assert "tanh" in program()
    with preferring("xla"):
        assert "stablehlo.sine" in program()
        with preferring("pallas"):
            assert "stablehlo.cosine" in program()
            assert preferred("scale", IMPLEMENTATIONS, "cpu") == "xla_other"  # it has no program for a CPU
            with forward_mode():
                assert "stablehlo.sine" in program()
            with preferring("triton"):  # which this operation does not have
                assert "tanh" in program()
        assert preference() == "xla"
    assert preference() == "auto"
    with (
        pytest.raises(ValueError, match="kernels='cudnn': choose one of auto, xla, pallas, triton"),
        preferring("cudnn"),
    ):
        pass


@pytest.mark.parametrize("name", ["pallas", "triton"])
def test_every_operation_with_such_a_kernel_runs_it_where_it_is_preferred(name):
    with preferring(name):
        for op, forms in operations().items():
            assert (preferred(op, forms, "cuda") == name) == (name in forms), op
            assert preferred(op, forms, "cpu") == pick(op, "cpu").implementation


def test_unknown_names_and_rows():
    with pytest.raises(ValueError, match=r"implementation='cudnn': choose one of \['pallas', 'xla', 'xla_other'\]"):
        choose("scale", IMPLEMENTATIONS, "cudnn")
    good = dataclasses.asdict(ROW)
    assert parse([good]) == (ROW,)
    for changed, message in (
        ({"ratio": 0.0}, "ratio 0.0 of scale"),
        ({"platform": "gpu"}, "pallas on gpu: rows are of"),
        ({"device_memory": 1}, "its fields must be"),
    ):
        with pytest.raises(ValueError, match=message):
            parse([good | changed])
