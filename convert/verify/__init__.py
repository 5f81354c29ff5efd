"""Compares our networks with PyTorch's on the same weights: module by module, then the whole pipeline.

PyTorch (with diffusers and transformers) is imported here and nowhere else, and only when a comparison is asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from convert.sources import Choices, Component, Model, open_model
from convert.verify import loading, refiner_pipelines
from convert.verify.networks import WORLD_MODEL, Inputs
from convert.verify.report import Limits, Report, Section, print_section, verdict, write_report
from sana_jax.compilation import readable_bytes
from sana_jax.errors import CheckpointError, UserError

PIPELINE = "pipeline"
# in the order in which they are compared
COMPONENTS = ("text_encoder", "connectors", "transformer", "controlnet", "vae", PIPELINE)
DTYPES = ("float32", "bfloat16")
PROMPTS = ("A red panda reading a book", "two small birds on a wire, in the rain")
_BY_CLASS = {
    "SanaTransformer2DModel": "transformer",
    "SanaVideoTransformer3DModel": "transformer",
    "SanaWMTransformer3DModel": "transformer",
    "SanaControlNetModel": "controlnet",
    "SanaWMLTX2RefinerTransformer3DModel": "transformer",
    "LTX2VideoTransformer3DModel": "transformer",
    "LTX2TextConnectors": "connectors",
    "Gemma2Model": "text_encoder",
    "Gemma3ForConditionalGeneration": "text_encoder",
    "Gemma3TextModel": "text_encoder",
    "AutoencoderDC": "vae",
    "AutoencoderKLWan": "vae",
    "AutoencoderKLLTX2Video": "vae",
}
_VIDEO_MULTIPLE = 32  # pixels; PyTorch's video pipelines refuse other sizes
_SIDES = (3, 5)  # latent pixels: few, odd and not square, so that a published model takes minutes on a CPU


class _Settings(NamedTuple):
    """What is compared of every component, and how strictly."""

    prompts: tuple[str, ...]
    steps: int | None
    dtype: str
    limits: Limits
    fp16_saturation: bool
    every: bool


def verify_model(
    source: str | Path,
    choices: Choices | None = None,
    *,
    components: Sequence[str] = (),
    dtype: str = "float32",
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    limits: Limits | None = None,
    emulate_fp16_saturation: bool = False,
    every: bool = False,
    json_file: str | Path | None = None,
    report: Report = print,
) -> bool:
    """Compares a model with PyTorch's networks on the same weights and returns whether all is within its thresholds.

    One component is in memory at a time, and of it one side: PyTorch's first, then ours.

    Args:
        source: a model directory (published or converted), one component's, a training run, or an original file.
        choices: what the source leaves open.
        components: of ``COMPONENTS``; empty for all that there are.
        dtype: of both sides: ``float32``, or ``bfloat16``, where ours must be about as near to PyTorch's float32 as
            PyTorch's own bfloat16 is.
        height: pixels; None for three latent pixels.
        width: pixels; None for five.
        steps: of the pipeline; None for 3, of SANA-Sprint 2.
        prompts: one or several.
        seed: of all inputs and noise.
        limits: what is allowed.
        emulate_fp16_saturation: both sides clip linear attention as float16 does, for weights that need it.
        every: lists layers within modules too.
        json_file: also writes everything that was compared there.
        report: takes one line after another.

    Raises:
        loading.MissingPackageError: PyTorch, diffusers or transformers is not installed.
        FileNotFoundError, CheckpointError, UserError: nothing that can be compared, or a value that is not allowed.
    """
    choices, limits = choices or Choices(), limits or Limits()
    _check_options(components, dtype, prompts, steps)
    model = open_model(source, choices)
    if strange := [part.network.family for part in model.components if part.network.class_name not in _BY_CLASS]:
        raise UserError(f"{source} has {strange[0]}, which verify does not compare; it compares {', '.join(_BY_CLASS)}")
    by_name = {part.folder or _BY_CLASS[part.network.class_name]: part for part in model.components}
    wanted = _choose(model, by_name, tuple(components), steps)
    needed = set(by_name) | set(model.failures) if PIPELINE in wanted else set(wanted)
    parts = {name: by_name[name] for name in COMPONENTS if name in needed and name in by_name}
    _require_whole(model, parts, needed)
    inputs = _inputs(parts, height, width, seed)
    if model.index is not None and PIPELINE not in wanted and not components:
        report(f"note: its pipeline is not compared: {model.index.get('_class_name')} has no comparison here")
    for note in _world_notes(parts, dtype):
        report(f"note: {note}")
    if {"transformer", "controlnet"} & parts.keys():
        _check_contract(model, dtype, emulate_fp16_saturation, report)
    elif emulate_fp16_saturation:
        raise UserError("--emulate-fp16-saturation would not be used: it is the transformer's; leave it out")
    versions = loading.require_packages()
    for note in model.notes:
        report(f"note: {note}")
    report(
        f"{versions}; {dtype}, matrix products in full precision; {inputs.height}x{inputs.width} pixels, seed {seed}"
    )
    _plan(wanted, parts, dtype, report)
    begin = time.perf_counter()
    with loading.full_precision(), loading.published(model, list(parts.values()), choices, report) as found:
        places = dict(zip(parts, found, strict=True))
        settings = _Settings(tuple(prompts), steps, dtype, limits, fp16_saturation=emulate_fp16_saturation, every=every)
        sections = _compare(model, wanted, places, inputs, settings, report)
    if json_file is not None:
        head = {
            "source": str(source),
            "dtype": dtype,
            "versions": versions,
            "size": [inputs.height, inputs.width],
            "seed": seed,
            "prompts": list(prompts),
            "emulate_fp16_saturation": emulate_fp16_saturation,
            "seconds": round(time.perf_counter() - begin, 3),
        }
        write_report(json_file, head, sections)
        report(f"written: {json_file}")
    report(verdict(sections))
    return not any(section.first_past for section in sections)


def _check_options(components: Sequence[str], dtype: str, prompts: Sequence[str], steps: int | None) -> None:
    if unknown := [name for name in components if name not in COMPONENTS]:
        raise UserError(f"--component {unknown[0]} is not known; allowed are {', '.join(COMPONENTS)}: name one of them")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not allowed; choose one of {', '.join(DTYPES)}")
    if not prompts or any(not isinstance(prompt, str) or not prompt.strip() for prompt in prompts):
        raise UserError(f"--prompt {list(prompts)!r}; allowed is one text or several, none of them empty: write one")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise UserError(f"--steps {steps}; allowed is a whole number from 1 on")


def _choose(
    model: Model, by_name: dict[str, Component], components: tuple[str, ...], steps: int | None
) -> tuple[str, ...]:
    """What is compared, in order."""
    from convert.verify.pipelines import runnable

    reason = runnable(model, set(by_name) | set(model.failures))
    if components:
        wanted = set(components)
        if PIPELINE in wanted and reason is not None:
            raise UserError(f"--component pipeline: {reason}; name a whole model directory or leave it out")
        there = set(by_name) | set(model.failures) | (set() if reason else {PIPELINE})
        if missing := [name for name in components if name not in there]:
            has = ", ".join(name for name in COMPONENTS if name in there)
            raise UserError(f"--component {missing[0]}: {model.path} has none; it has {has}: name one of these")
    else:
        wanted = set(by_name) | set(model.failures) | (set() if reason else {PIPELINE})
    if steps is not None and PIPELINE not in wanted:
        raise UserError(f"--steps {steps} would not be used, since no pipeline is compared; leave it out")
    if steps is not None and model.index.get("_class_name") in refiner_pipelines.KINDS:
        raise UserError(f"--steps {steps} would not be used: a refiner's noise levels are given; leave it out")
    return tuple(name for name in COMPONENTS if name in wanted) or tuple(wanted)


def _require_whole(model: Model, parts: dict[str, Component], needed: set[str]) -> None:
    """Raises with everything that is wrong with what is to be compared."""
    errors = {name: error for name, error in model.failures.items() if name in needed}
    failed = [f"{name}: {error}" for name, error in errors.items()]
    failed += [f"{name}: the weights do not fit: {part.problems}" for name, part in parts.items() if part.problems]
    if len(failed) == len(errors) == 1:
        raise next(iter(errors.values()))
    if failed:
        raise CheckpointError(
            f"{model.path} cannot be verified. {'. '.join(failed)}. python -m convert.main inspect {model.path} --all "
            "lists every tensor"
        )


def _inputs(parts: dict[str, Component], height: int | None, width: int | None, seed: int) -> Inputs:
    factor = parts["vae"].network.config.spatial_factor if "vae" in parts else 32
    sizes = [parts[name].network.config.patch_size for name in ("transformer", "controlnet") if name in parts]
    patches = [max(size) if isinstance(size, tuple) else size for size in sizes]
    multiple = factor * max(patches, default=1)
    if any(isinstance(size, tuple) for size in sizes) and "vae" in parts:
        multiple = math.lcm(multiple, _VIDEO_MULTIPLE)
    sides = []
    for name, given, count in (("height", height, _SIDES[0]), ("width", width, _SIDES[1])):
        side = count * multiple if given is None else given
        if side < multiple or side % multiple:
            raise UserError(f"--{name} {side}; allowed is a multiple of {multiple} from {multiple} on: choose one")
        sides.append(side)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}; allowed is a whole number from 0 to 4294967295")
    return Inputs(*sides, factor, seed)


def _check_contract(model: Model, dtype: str, emulate_fp16_saturation: bool, report: Report) -> None:
    if model.contract is not None and (notice := model.contract.check(dtype, emulate_fp16_saturation)):
        report(f"note: {notice}")
    if emulate_fp16_saturation:
        report("linear attention is clipped to ±65504 on both sides")


def _world_notes(parts: dict[str, Component], dtype: str) -> list[str]:
    """What is compared of a world model's transformer that is not what a pipeline computes."""
    transformer = parts.get("transformer")
    if transformer is None or transformer.network.class_name != WORLD_MODEL:
        return []
    notes = []
    if dtype == "float32":
        notes.append(
            "softmax layers are compared without their rounding to bfloat16, in which PyTorch's kernel for CPUs is "
            "inexact"
        )
    if transformer.network.config.revision != "legacy":
        notes.append(
            f"the revision is {transformer.network.config.revision}, and PyTorch's class knows legacy alone: legacy is "
            "what both compute here"
        )
    return notes


def _plan(wanted: tuple[str, ...], parts: dict[str, Component], dtype: str, report: Report) -> None:
    """What will be in memory when, before anything is computed."""
    from convert.families import parameter_count

    counts = {name: parameter_count(part.network.abstract) for name, part in parts.items()}
    size = 2 if dtype == "bfloat16" else 4

    def bytes_of(names: Sequence[str], each: int) -> str:
        return readable_bytes(each * sum(counts[name] for name in names))

    for name in wanted:
        if name != PIPELINE:
            family = parts[name].network.family
            report(
                f"plan: {name}: {family}; PyTorch's {bytes_of([name], 4)}, freed before our {bytes_of([name], size)}"
            )
            continue
        later = [part for part in counts if part != "text_encoder"]
        largest = readable_bytes(size * max(counts.values()))
        report(
            f"plan: pipeline: PyTorch's text encoder {bytes_of(['text_encoder'], 4)}, freed before its "
            f"{', '.join(later)} {bytes_of(later, 4)}; then ours, one at a time, {largest} at most"
        )


def _compare(
    model: Model,
    wanted: Sequence[str],
    places: Mapping[str, loading.Place],
    inputs: Inputs,
    settings: _Settings,
    report: Report,
) -> list[Section]:
    from convert.verify.comparison import compare_component
    from convert.verify.pipelines import compare_pipeline, prompts_whole, states_whole

    sections = []
    prompts, steps, dtype, limits, fp16_saturation, every = settings
    for name in wanted:
        report("")
        if name == PIPELINE:
            section = compare_pipeline(
                model, places, inputs, prompts, steps, dtype, limits, report,
                variant=loading.variant_of(places["transformer"].component), fp16_saturation=fp16_saturation,
            )  # fmt: skip
        else:
            more = []
            if name == "text_encoder":
                tokenizer = (
                    model.path if places[name].component.folder else model.path.absolute().parent
                ) / "tokenizer"
                if tokenizer.is_dir():
                    network = places[name].component.network
                    whole = states_whole if network.class_name.startswith("Gemma3") else prompts_whole
                    more = [whole(network.config, tokenizer, prompts)]
                else:
                    report(f"note: there is no {tokenizer}, so prompts are not compared, tokens of a random text are")
            section = compare_component(
                places[name], inputs, dtype, limits, report, name=name, fp16_saturation=fp16_saturation, more=more
            )
        print_section(section, report, every=every)
        sections.append(section)
    return sections
