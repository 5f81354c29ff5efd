"""Prompts and whole pipelines on both sides, with the same noise."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.sources import Model
from convert.verify import loading, refiner_pipelines, world_pipelines
from convert.verify.comparison import BFLOAT16, whole_rows
from convert.verify.networks import EXACT, PIXELS_KIND, WHOLE, Inputs, Whole, from_torch, smooth_picture
from convert.verify.report import Limits, Report, Section, median_ratio_row
from sana_jax.autoencoders.base import pixel_frames

_GUIDANCE, _CONTROL_SCALE, _PAG_SCALE, _STRENGTH, _SPRINT_STEPS = 4.5, 0.7, 2.0, 0.6, 2
_OURS = {
    "SanaPipeline": "SanaPipeline",
    "SanaPAGPipeline": "SanaPipeline",
    "SanaSprintPipeline": "SanaSprintPipeline",
    "SanaSprintImg2ImgPipeline": "SanaSprintPipeline",
    "SanaControlNetPipeline": "SanaControlNetPipeline",
    "SanaVideoPipeline": "SanaVideoPipeline",
    "SanaImageToVideoPipeline": "SanaImageToVideoPipeline",
    world_pipelines.KIND: "SanaWMPipeline",
    **dict.fromkeys(refiner_pipelines.KINDS, "SanaWMRefiner"),
}
_LATENT_FRAMES = 3  # of a video
_STATES_LENGTH = 128  # tokens of a prompt of which all layers' states are compared


# -- prompts ---------------------------------------------------------------------------------------------------------


def prompts_whole(config: Any, tokenizer: Path, prompts: tuple[str, ...]) -> Whole:
    """Tokens, masks and encodings of prompts (with the instruction before them) and of the empty negative one."""
    from sana_jax.text_encoders.gemma import GemmaTextEncoder
    from sana_jax.text_encoders.tokenizer import PromptTokenizer
    from sana_jax.weights.components import Resident

    names = [*(f"prompt {number + 1}" for number in range(len(prompts))), "empty negative prompt"]
    kinds = {}
    for name in names:
        kinds |= {f"{name}: token ids": EXACT, f"{name}: mask": EXACT, f"{name}: encoding": WHOLE}

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        found = {}
        for name, (ids, embeds, mask) in zip(names, _their_encodings(model, tokenizer, prompts), strict=True):
            found |= _one_prompt(name, ids, embeds, mask)
        return found

    def ours(params: Any, dtype: Any, say: Report) -> dict[str, np.ndarray]:
        reader = _Listening(PromptTokenizer.from_directory(tokenizer))
        encoder = GemmaTextEncoder(config, reader, Resident.of("text_encoder", params), dtype, say=say)
        found = {}
        for name, prompt in zip(names, (*prompts, ""), strict=True):
            embeds, mask = encoder.encode([prompt], negative=prompt == "")
            found |= _one_prompt(name, np.array(reader.ids), embeds[0], mask[0])
        return found

    return Whole(kinds, theirs, ours)


def states_whole(config: Any, tokenizer: Path, prompts: tuple[str, ...]) -> Whole:
    """Tokens, masks and the states of all layers of prompts, padded on the left, as SANA-WM's refiner reads them."""
    from sana_jax.text_encoders.gemma3 import Gemma3TextEncoder
    from sana_jax.text_encoders.tokenizer import PromptTokenizer
    from sana_jax.weights.components import Resident

    names = [f"prompt {number + 1}" for number in range(len(prompts))]
    kinds = {}
    for name in names:
        kinds |= {f"{name}: token ids": EXACT, f"{name}: mask": EXACT, f"{name}: encoding": WHOLE}

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        import torch
        from transformers import AutoTokenizer

        reader, found = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True), {}
        for name, prompt in zip(names, prompts, strict=True):
            given = reader(
                [prompt.strip()], padding="max_length", padding_side="left", max_length=_STATES_LENGTH,
                truncation=True, return_tensors="pt",
            )  # fmt: skip
            out = model(given.input_ids, attention_mask=given.attention_mask, output_hidden_states=True)
            states, mask = from_torch(torch.stack(out.hidden_states, dim=-1))[0], given.attention_mask[0].numpy()
            found |= _one_prompt(name, given.input_ids[0].numpy()[mask == 1], states.reshape(len(mask), -1), mask)
        return found

    def ours(params: Any, dtype: Any, say: Report) -> dict[str, np.ndarray]:
        reader, found = _Listening(PromptTokenizer.from_directory(tokenizer)), {}
        weights = Resident.of("text_encoder", params)
        encoder = Gemma3TextEncoder(config, reader, weights, dtype, max_length=_STATES_LENGTH, say=say)
        for name, prompt in zip(names, prompts, strict=True):
            states, mask = encoder.encode([prompt])
            states = np.asarray(states[0].astype(np.float32)).reshape(_STATES_LENGTH, -1)
            found |= _one_prompt(name, np.array(reader.ids), states, mask[0])
        return found

    return Whole(kinds, theirs, ours)


class _Listening:
    """A tokenizer that remembers the last tokens it gave."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.location, self.count = tokenizer.location, tokenizer.count
        self.ids: list[int] = []

    def encode(self, text: str, limit: int) -> Any:
        found = self._tokenizer.encode(text, limit)
        self.ids = found.ids
        return found


def _one_prompt(name: str, ids: np.ndarray, embeds: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    kept = embeds * mask[:, None]  # what stands at padding is of no consequence
    return {f"{name}: token ids": ids, f"{name}: mask": mask, f"{name}: encoding": kept}


def _instruction(kind: str) -> list[str]:
    """The reference's own for a pipeline."""
    import diffusers

    pipeline = getattr(diffusers, kind if "Video" in kind else "SanaPipeline")
    return inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default


def _their_encodings(
    model: Any, tokenizer: Path, prompts: tuple[str, ...], kind: str = "SanaPipeline"
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Token ids without padding, embeddings and mask of each prompt and of the empty negative one.

    ``kind`` is the pipeline whose instruction stands before the prompts.
    """
    from diffusers import SanaPipeline
    from transformers import AutoTokenizer

    reader = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    pipeline = SanaPipeline(tokenizer=reader, text_encoder=model, vae=None, transformer=None, scheduler=None)
    seen = []

    def listen(module: Any, args: tuple, kwargs: dict) -> None:
        seen.append(args[0][kwargs["attention_mask"] != 0].numpy())

    handle = model.register_forward_pre_hook(listen, with_kwargs=True)
    found = []
    try:
        for prompt in prompts:
            both = pipeline.encode_prompt(
                prompt, True, negative_prompt="", complex_human_instruction=_instruction(kind), max_sequence_length=300
            )
            found.append(both[:2])
    finally:
        handle.remove()
    found.append(both[2:])
    ids = [*seen[::2], seen[1]]
    return [
        (tokens, from_torch(embeds)[0], from_torch(mask)[0]) for tokens, (embeds, mask) in zip(ids, found, strict=True)
    ]


# -- pipelines -------------------------------------------------------------------------------------------------------


def compare_pipeline(
    model: Model,
    places: Mapping[str, loading.Place],
    inputs: Inputs,
    prompts: tuple[str, ...],
    steps: int | None,
    dtype: str,
    limits: Limits,
    report: Report,
    *,
    variant: str | None = None,
    fp16_saturation: bool = False,
) -> Section:
    """Both pipelines from the same prompts and the same noise: latents after each step, and pixels.

    PyTorch's text encoder is freed before its other networks are read, and all of PyTorch's before any of ours.
    """
    begin = time.perf_counter()
    kind = str(model.index["_class_name"])
    if steps is None:
        steps = _SPRINT_STEPS if "Sprint" in kind else 3
    dtypes = dict.fromkeys(("float32", dtype))
    is_refiner = kind in refiner_pipelines.KINDS
    if (kind == world_pipelines.KIND or is_refiner) and len(prompts) > 1:
        report(f"note: {kind} makes one video at a time; of {len(prompts)} prompts the first is compared")
    if kind == world_pipelines.KIND:
        world = world_pipelines.WorldCase.draw(places, inputs, prompts[0], steps)
        theirs = {name: world_pipelines.run_theirs(world, model, places, name) for name in dtypes}
    elif is_refiner:
        refined = refiner_pipelines.RefinerCase.draw(model, places, inputs, prompts[0])
        theirs = {name: refiner_pipelines.run_theirs(refined, model, places, name) for name in dtypes}
    else:
        case = _Case(kind, inputs, prompts, steps, places["transformer"].component.network.config)
        theirs = {name: _run_theirs(case, model, places, name, fp16_saturation) for name in dtypes}
    loading.collect()
    report(f"pipeline: PyTorch's {kind} took {time.perf_counter() - begin:.1f} s and is freed; ours is read now")
    if kind == world_pipelines.KIND:
        ours = world_pipelines.run_ours(world, model, dtype, variant)
    elif is_refiner:
        ours = refiner_pipelines.run_ours(refined, model, dtype, variant)
    else:
        ours = _run_ours(case, model, dtype, variant, fp16_saturation)
    kinds = {name: PIXELS_KIND if name == "pixels" else WHOLE for name in theirs["float32"]}
    own = theirs[BFLOAT16] if dtype == BFLOAT16 else None
    if ours.keys() != theirs["float32"].keys():
        missing = sorted(ours.keys() ^ theirs["float32"].keys())
        raise RuntimeError(f"the pipelines took other steps: {', '.join(missing)}")
    rows = whole_rows(kinds, ours, theirs["float32"], own, limits, of_pipeline=True)
    if own is not None:
        rows.append(median_ratio_row(rows, limits))
    loading.collect()
    return Section("pipeline", tuple(rows), time.perf_counter() - begin)


class _Case:
    """One call of a pipeline, with all noise drawn."""

    def __init__(self, kind: str, inputs: Inputs, prompts: tuple[str, ...], steps: int, config: Any) -> None:
        import torch

        self.kind, self.inputs, self.prompts, self.steps = kind, inputs, prompts, steps
        self.sprint, self.from_picture = "Sprint" in kind, "Img2Img" in kind
        self.seed = inputs.seed
        self.video = "Video" in kind
        shape = (inputs.height // inputs.factor, inputs.width // inputs.factor)
        shape = (len(prompts), config.in_channels, *((_LATENT_FRAMES,) if self.video else ()), *shape)
        self.latents = np.random.default_rng([inputs.seed, 11]).standard_normal(shape).astype(np.float32)
        self.step_noise = None
        self.pag_layer = config.num_layers // 2
        if self.sprint:
            # What PyTorch will draw, one after another, from a generator of this seed.
            from sana_jax.pipelines.base import first_step

            generator = torch.Generator().manual_seed(self.seed)
            if self.from_picture:
                self.latents = torch.randn(shape, generator=generator).numpy()
            taken = steps - (first_step(steps, _STRENGTH) if self.from_picture else 0)
            self.step_noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(taken)]).numpy()

    @property
    def picture(self) -> Any:
        from PIL import Image

        return Image.fromarray(np.round((smooth_picture(self.inputs) + 1) * 127.5).astype(np.uint8))

    def shared(self, temporal_factor: int | None) -> dict[str, Any]:
        """Arguments that both pipelines take; ``temporal_factor`` is a video autoencoder's."""
        more: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": _GUIDANCE}
        more |= {"height": self.inputs.height, "width": self.inputs.width}
        if self.video:
            more |= {"frames": pixel_frames(_LATENT_FRAMES, temporal_factor)}
        if self.kind == "SanaImageToVideoPipeline":
            more |= {"image": self.picture}
        if self.from_picture:
            more |= {"image": self.picture, "strength": _STRENGTH}
        if self.kind == "SanaControlNetPipeline":
            more |= {"control_image": self.picture, "controlnet_conditioning_scale": _CONTROL_SCALE}
        if self.kind == "SanaPAGPipeline":
            more |= {"pag_scale": _PAG_SCALE}
        return more


def _run_theirs(
    case: _Case, model: Model, places: Mapping[str, loading.Place], dtype: str, fp16_saturation: bool
) -> dict[str, np.ndarray]:
    import diffusers
    import torch

    wanted = getattr(torch, dtype)
    with torch.no_grad():
        encoder = loading.load_theirs(places["text_encoder"]).to(wanted)
        *positive, negative = _their_encodings(encoder, model.path / "tokenizer", case.prompts, case.kind)
        del encoder
        loading.collect()
        parts = {
            name: loading.load_theirs(places[name], fp16_saturation).to(wanted)
            for name in ("transformer", "controlnet", "vae")
            if name in places
        }
        name = model.index["scheduler"][1]
        scheduler = getattr(diffusers, name).from_pretrained(str(model.path / "scheduler"), local_files_only=True)
        more = {"pag_applied_layers": f"transformer_blocks.{case.pag_layer}"} if case.kind == "SanaPAGPipeline" else {}
        made = getattr(diffusers, case.kind)(tokenizer=None, text_encoder=None, scheduler=scheduler, **parts, **more)
        made.set_progress_bar_config(disable=True)
        temporal_factor = places["vae"].component.network.config.temporal_factor if case.video else None
        arguments = case.shared(temporal_factor)

        def stack(which: int) -> Any:
            return torch.from_numpy(np.stack([prompt[which] for prompt in positive]))

        arguments |= {"prompt_embeds": stack(1).to(wanted), "prompt_attention_mask": stack(2)}
        if case.sprint:
            arguments["generator"] = torch.Generator().manual_seed(case.seed)
            if case.steps != 2:
                arguments["intermediate_timesteps"] = None  # its default is an error for other numbers of steps
        else:
            repeated = [np.stack([negative[which]] * len(positive)) for which in (1, 2)]
            arguments["negative_prompt"] = None
            arguments["negative_prompt_embeds"] = torch.from_numpy(repeated[0]).to(wanted)
            arguments["negative_prompt_attention_mask"] = torch.from_numpy(repeated[1])
        if not case.from_picture:
            arguments["latents"] = torch.from_numpy(case.latents.copy())
        found: dict[str, np.ndarray] = {}

        def keep(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            found[f"latents after step {index + 1}"] = from_torch(values["latents"])
            return values

        result = made(**arguments, output_type="np", use_resolution_binning=False, callback_on_step_end=keep)
    return _in_order(found, np.asarray(result.frames if case.video else result.images, np.float32))


def _in_order(latents: dict[str, np.ndarray], pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Steps counted from the first one taken."""
    return {f"latents after step {n}": value for n, value in enumerate(latents.values(), 1)} | {"pixels": pixels}


def _run_ours(
    case: _Case, model: Model, dtype: str, variant: str | None, fp16_saturation: bool
) -> dict[str, np.ndarray]:
    import sana_jax
    from sana_jax.autoencoders import load_autoencoder
    from sana_jax.text_encoders.gemma import GemmaTextEncoder

    pipeline = getattr(sana_jax, _OURS[case.kind]).from_pretrained(
        model.path,
        dtype=dtype,
        variant=variant,
        residency="one_at_a_time",
        emulate_fp16_saturation=fp16_saturation,
    )
    # The model's contract may want others; both sides compute everything in one dtype here.
    encoder = GemmaTextEncoder.from_directory(model.path, dtype=dtype, variant=variant)
    instruction = pipeline.text_encoder.complex_human_instruction
    pipeline.text_encoder = dataclasses.replace(encoder, complex_human_instruction=instruction)
    pipeline.autoencoder = load_autoencoder(model.path / "vae", dtype=jnp.dtype(dtype), variant=variant)
    found: dict[str, np.ndarray] = {}

    def keep(pipeline: Any, index: int, timestep: float, values: dict[str, Any]) -> None:
        found[f"latents after step {index + 1}"] = np.asarray(values["latents"], np.float32)

    temporal_factor = getattr(pipeline.autoencoder, "temporal_factor", None)
    arguments: dict[str, Any] = {**case.shared(temporal_factor), "prompt": list(case.prompts), "latents": case.latents}
    if case.sprint:
        arguments["step_noise"] = case.step_noise
    if case.kind == "SanaPAGPipeline":
        arguments["pag_applied_layers"] = (case.pag_layer,)
    result = pipeline(**arguments, binning="off", output_type="np", callback_on_step_end=keep)
    return _in_order(found, np.asarray(result.frames if case.video else result.images, np.float32))


def runnable(model: Model, folders: set[str]) -> str | None:
    """Why there is no pipeline to compare; None where there is one."""
    kind = None if model.index is None else model.index.get("_class_name")
    if kind not in _OURS:
        return f"{model.path} is no pipeline that is known here ({', '.join(_OURS)})"
    needed = {"transformer", "text_encoder", "vae"} | ({"controlnet"} if "ControlNet" in str(kind) else set())
    if kind in refiner_pipelines.KINDS:
        needed = set(refiner_pipelines.PARTS)
    if missing := sorted(needed - folders):
        return f"{model.path} has no {', '.join(missing)}"
    return None
