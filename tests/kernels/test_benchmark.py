"""``python -m kernels.benchmark``: every operation has a case, costs are the formula's, files, comparison, mistakes."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from kernels import benchmark, selection
from kernels.benchmarking.flops import count_products
from kernels.benchmarking.ops import RELU
from kernels.benchmarking.pointwise_ops import OPS
from kernels.benchmarking.report import compare, markdown
from kernels.benchmarking.roofline import Cost, roofline
from kernels.benchmarking.timing import Timing, time_interleaved

PEAKS = {"flops_per_s": {"float32": 100.0, "float32 highest": 50.0}, "bytes_per_s": 10.0}


def test_every_operation_has_cases_of_every_size():
    assert set(selection.operations()) == set(OPS)
    assert all(set(op.cases) == set(benchmark.SIZES) for op in OPS.values())


@pytest.mark.parametrize("name", sorted(OPS))
def test_xla_agrees_with_the_reference(name):
    """The error of a row is that of the implementation: the inputs are narrowed as the results are."""
    sizes = OPS[name].cases["tiny"]["tiny"]
    for what in benchmark.WHATS:
        (row,) = benchmark.measure_op(OPS[name], ["xla"], "tiny", sizes, "float32", what, PEAKS, 1)
        assert row["error"] < 2e-6, row
        assert row["median_s"] > 0
        assert row["roofline_share"] > 0


def test_a_wrong_or_absent_implementation_shows(monkeypatch):
    def wrong(query, key, value, epsilon):
        return 1.1 * value

    def absent(*_):
        raise ValueError("there is no such device here\nand more")

    table = {"xla": RELU.run.__globals__["linear_attention"].IMPLEMENTATIONS["xla"], "wrong": wrong, "absent": absent}
    for name, function in table.items():
        monkeypatch.setitem(RELU.run.__globals__["linear_attention"].IMPLEMENTATIONS, name, function)
    sizes = RELU.cases["tiny"]["tiny"]
    good, bad, missing = benchmark.measure_op(RELU, list(table), "tiny", sizes, "float32", "values", PEAKS, 1)
    assert good["error"] < 1e-6 < 0.01 < bad["error"]
    assert missing["note"] == "cannot run here: ValueError: there is no such device here"
    assert "median_s" not in missing


def test_costs_are_those_of_the_formula():
    sizes = {"B": 2, "N": 5, "h": 3, "d": 4}
    cost = RELU.least(sizes, "bfloat16", False)
    assert (cost.flops, cost.bytes) == (2 * 3 * 5 * (4 * 16 + 3 * 4), 4 * 2 * 3 * 5 * 4 * 2)
    share = roofline(Cost(100.0, 1.0, "float32 highest"), PEAKS, 4.0)
    assert share["bound"] == "float32 highest products"
    assert share["roofline_share"] == 0.5
    assert roofline(Cost(1.0, 100.0), PEAKS, 20.0)["bound"] == "memory"


def test_products_of_a_function_are_counted():
    def function(x, w):
        def body(carry, _):
            return jax.checkpoint(lambda c: jnp.tanh(c @ w))(carry), None

        x, _ = jax.lax.scan(body, x, None, length=3)
        picture = x.reshape(1, 2, 4, 4)
        kernel = jnp.ones((3, 3, 2, 8))
        return jax.lax.conv_general_dilated(
            picture, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    expected = 3 * 2 * 8 * 4 * 4 + 2 * (2 * 4 * 8) * 3 * 3 * 2
    assert count_products(function, jnp.ones((8, 4)), jnp.ones((4, 4))) == expected


def test_functions_take_turns_after_a_first_call():
    calls = []
    timings = time_interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3, lambda x: x)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert {len(timing.seconds) for timing in timings.values()} == {3}
    summary = Timing(tuple(map(float, range(1, 12)))).summary()
    assert (summary["median_s"], summary["p10_s"], summary["p90_s"]) == (6.0, 2.0, 10.0)


def test_the_command_writes_a_table_and_compares_it(tmp_path, capsys):
    output = tmp_path / "new" / "k"
    options = ["--size", "tiny", "--ops", "depthwise_conv", "--what", "values", "--repetitions", "1"]
    assert benchmark.main([*options, "--output", str(output)]) == 0
    report = json.loads((tmp_path / "new" / "k.json").read_text())
    assert sorted(path.name for path in output.parent.iterdir()) == ["k.json", "k.md", "k.measurements.json"]
    table = (tmp_path / "new" / "k.md").read_text()
    assert "CPU figures" in table
    assert report["device"] in table
    assert report["peaks"]["bytes_per_s"] > 0
    assert set(report["peaks"]["flops_per_s"]) == {"float32", "float32 highest", "bfloat16"}
    rows = {row["implementation"]: row for row in report["rows"]}
    assert set(rows) == set(selection.operations()["depthwise_conv"])
    assert all(row["compile_s"] > 0 and row["p10_s"] <= row["median_s"] <= row["p90_s"] for row in rows.values())
    selection.parse(json.loads((tmp_path / "new" / "k.measurements.json").read_text()))
    capsys.readouterr()
    assert benchmark.main(["--compare", f"{output}.json", f"{output}.json"]) == 0
    assert "Geometric mean of first / second over 2 rows: 1.00." in capsys.readouterr().out


def test_reports_of_other_devices_are_not_compared():
    row = {"case": "c", "what": "w", "implementation": "i", "shape": "s", "dtype": "d", "median_s": 2.0}
    first = {"device": "one", "versions": {}, "date": "today", "rows": [row]}
    second = {**first, "device": "two", "rows": [{**row, "median_s": 1.0}]}
    with pytest.raises(ValueError, match=r"'one' and 'two'.*--across-devices"):
        compare(first, second)
    assert "over 1 rows: 2.00" in compare(first, second, across_devices=True)
    with pytest.raises(ValueError, match="no row in common"):
        compare(first, {**first, "rows": []})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ops", "convolution"], "choose from"),
        (["--size", "huge"], "--help"),
        (["--repetitions", "0"], "1 or more"),
        (["--across-devices"], "--compare"),
        (["--implementations", "metal"], "these operations have"),
        (["--compare", "/nowhere/a.json", "/nowhere/b.json"], "is not a file"),
        (["--compare", "a.json", "b.json", "--ops", "mix_ffn"], "--ops would not be used with --compare"),
        (["--compare", "a.json", "b.json", "--output", "k"], "--output would not be used with --compare"),
        (["--compare", "a.json", "b.json", "--picks"], "--picks would not be used with --compare"),
        (["--picks", "--size=tiny", "--seconds", "3"], "--size, --seconds would not be used with --picks"),
    ],
)
def test_mistakes_are_one_line(words, told, capsys, tmp_path):
    place = [] if {"--compare", "--picks"} & {*words} else ["--output", str(tmp_path / "k")]
    assert benchmark.main([*words, *place]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error
    assert not list(tmp_path.iterdir())


def test_picks_are_told(capsys):
    assert benchmark.main(["--picks"]) == 0
    assert capsys.readouterr().out.strip() == selection.describe()


def test_markdown_has_the_reason_of_a_row_that_did_not_run():
    report = {"command": "c", "date": "d", "device": "x", "platform": "gpu", "versions": {}, "load_average": None}
    shown = markdown({**report, "rows": [{"case": "c", "note": "cannot run here: a | b"}]})
    assert "cannot run here: a / b" in shown
    assert "CPU figures" not in shown
