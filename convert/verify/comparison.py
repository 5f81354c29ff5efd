"""Runs both sides of one component and makes the rows of its table."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.verify import loading
from convert.verify.networks import EXACT, PIXELS_KIND, Inputs, Pass, Whole, by_layer, with_layers
from convert.verify.passes import PASSES
from convert.verify.report import BFLOAT16_SPREAD, Limits, Report, Row, Section, make_row
from convert.verify.taps import LAYERS, PARTS, Recording, Tap, run_ours, run_theirs
from sana_jax.weights.rules import places
from sana_jax.weights.tables.gemma import name_prefix

BFLOAT16 = "bfloat16"


def compare_component(
    place: loading.Place,
    inputs: Inputs,
    dtype: str,
    limits: Limits,
    report: Report,
    *,
    name: str,
    fp16_saturation: bool = False,
    more: Sequence[Whole] = (),
) -> Section:
    """One component, module by module and as a whole. One side at a time is in memory, PyTorch's first.

    Args:
        place: where its weights are.
        inputs: sizes and seed.
        dtype: ``float32`` or ``bfloat16``, of both sides.
        limits: what is allowed.
        report: takes one line after another.
        name: of the component, in the table.
        fp16_saturation: whether both sides clip linear attention.
        more: what else the component does as a whole.
    """
    begin = time.perf_counter()
    network = place.component.network
    passes, wholes = PASSES[network.class_name](network, inputs, fp16_saturation)
    wholes = [*wholes, *more]
    theirs = _run_theirs(place, passes, wholes, dtype, fp16_saturation)
    seconds = time.perf_counter() - begin
    loading.collect()
    report(f"{name}: PyTorch's side took {seconds:.1f} s and is freed; ours is read now")
    rows = _run_ours(place, passes, wholes, theirs, dtype, limits, report)
    loading.collect()
    return Section(name, tuple(rows), time.perf_counter() - begin)


class _Theirs:
    """PyTorch's recordings: float32, and for bfloat16 also its own at both depths and on its own way."""

    def __init__(self) -> None:
        self.taps: list[tuple[Tap, ...]] = []
        self.reference: list[Recording] = []
        self.own: dict[str | None, list[Recording]] = {None: [], PARTS: [], LAYERS: []}
        self.wholes: list[dict[str, np.ndarray]] = []
        self.own_wholes: list[dict[str, np.ndarray]] = []


def _run_theirs(
    place: loading.Place, passes: list[Pass], wholes: list[Whole], dtype: str, fp16_saturation: bool
) -> _Theirs:
    import torch

    found = _Theirs()
    model = loading.load_theirs(place, fp16_saturation)
    network = place.component.network
    # Gemma's published tensors may be those of the language model around it
    is_gemma = network.class_name.startswith("Gemma")
    prefix = name_prefix(places(network.rules, network.abstract)) if is_gemma else ""
    found.taps = [with_layers(run, network, model, prefix) for run in passes]
    with torch.no_grad():
        for run, taps in zip(passes, found.taps, strict=True):
            found.reference.append(run_theirs(model, taps, functools.partial(run.theirs, model, torch.float32)))
        found.wholes = [whole.theirs(model, torch.float32) for whole in wholes]
        if dtype == BFLOAT16:
            model = model.to(torch.bfloat16)
            for run, taps, given in zip(passes, found.taps, found.reference, strict=True):
                call = functools.partial(run.theirs, model, torch.bfloat16)
                for depth, kept in found.own.items():
                    kept.append(run_theirs(model, taps, call, None if depth is None else given, depth))
            found.own_wholes = [whole.theirs(model, torch.bfloat16) for whole in wholes]
    return found


def _run_ours(
    place: loading.Place,
    passes: list[Pass],
    wholes: list[Whole],
    theirs: _Theirs,
    dtype: str,
    limits: Limits,
    report: Report,
) -> list[Row]:
    compute = jnp.dtype(dtype)
    params = loading.load_ours(place, compute)
    rows: list[Row] = []
    for number, run in enumerate(passes):
        taps, reference = theirs.taps[number], theirs.reference[number]
        call = functools.partial(run.ours, params, compute)
        free = run_ours(taps, call)
        parts = run_ours(taps, call, reference, PARTS)
        layers = run_ours(taps, call, reference, LAYERS)
        own = {depth: kept[number] if kept else None for depth, kept in theirs.own.items()}
        by_name = {tap.name: tap for tap in taps}
        for name in layers.values:
            rows += _tap_rows(by_name[name], reference, free, layers if by_name[name].detail else parts, own, limits)
        rows += _result_rows(run, params, compute, reference, free, parts, own, limits)
    for number, whole in enumerate(wholes):
        found = whole.ours(params, compute, report)
        own_whole = theirs.own_wholes[number] if theirs.own_wholes else None
        rows += whole_rows(whole.kinds, found, theirs.wholes[number], own_whole, limits)
    return rows


def _result_rows(
    run: Pass,
    params: Any,
    compute: Any,
    reference: Recording,
    free: Recording,
    parts: Recording,
    own: dict[str | None, Recording | None],
    limits: Limits,
) -> list[Row]:
    """The network's results: behind PyTorch's last module, and compiled as the pipelines run it."""
    rows = []
    given, on_way = by_layer(parts.result), by_layer(free.result)
    compiled = by_layer(jax.jit(functools.partial(run.ours, dtype=compute))(params)) if run.compiled else {}
    for name, expected in reference.result.items():
        at = functools.partial(_own_result, own, name=name)
        way = on_way[name]
        rows.append(
            make_row(name, given[name], expected, limits.module, limits, own=at(PARTS), in_place=way, module=True)
        )
        if run.compiled:
            told = f"{name}, whole network compiled"
            rows.append(make_row(told, compiled[name], expected, limits.whole, limits, own=at(None)))
    return rows


def _own_result(own: dict[str | None, Recording | None], depth: str | None, name: str) -> Any:
    recording = own[depth]
    return None if recording is None else recording.result[name]


def _tap_rows(
    tap: Tap,
    reference: Recording,
    free: Recording,
    forced: Recording,
    own: dict[str | None, Recording | None],
    limits: Limits,
) -> list[Row]:
    ours = forced.values[tap.name]
    shapes = [array.shape for array in ours]
    expected = tap.to_ours(reference.values[tap.name], shapes)
    recording = own[LAYERS if tap.detail else PARTS]
    their_own = [None] * len(ours) if recording is None else tap.to_ours(recording.values[tap.name], shapes)
    names = [f"{tap.name}: {part}" for part in tap.names] if tap.names else [tap.name]
    return [
        make_row(
            name,
            ours[i],
            expected[i],
            limits.module,
            limits,
            own=their_own[i],
            in_place=free.values[tap.name][i],
            detail=tap.detail,
            module=True,
        )
        for i, name in enumerate(names)
    ]


def whole_rows(
    kinds: dict[str, str],
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    own: dict[str, np.ndarray] | None,
    limits: Limits,
    *,
    of_pipeline: bool = False,
) -> list[Row]:
    """Rows of results that the user sees; in bfloat16 those of a pipeline, and single pixels, may spread further."""
    rows = []
    wide = dataclasses.replace(limits, ratio=limits.ratio * BFLOAT16_SPREAD)
    for name, kind in kinds.items():
        if kind == EXACT:
            rows.append(make_row(name, ours[name], theirs[name], 0.0, limits))
            continue
        pixels = kind == PIXELS_KIND
        limit = limits.pixel if pixels else limits.whole
        other = None if own is None else own[name]
        spread = wide if pixels or of_pipeline else limits
        rows.append(make_row(name, ours[name], theirs[name], limit, spread, own=other, of_pixels=pixels))
        if pixels and other is not None and not of_pipeline:
            told = f"{name}, all pixels"
            rows.append(make_row(told, ours[name], theirs[name], limit, limits, own=other))
    return rows
