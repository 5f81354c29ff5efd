"""The original checkpoints of NVlabs, ``.pth`` or ``.safetensors``: weights alone, so the configuration is inferred."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convert.families import network_of
from convert.original_world_model import (
    FLOW_SHIFT,
    infer_world_model_config,
    is_world_model,
    renamed_world_model,
)
from convert.renames import RenamedSource
from convert.sources import LONGSANA, SANA_VIDEO, Choices, Component, Model, check_pipeline, refuse
from convert.tables import controlnet_original, sana_original, sana_video_original
from convert.torch_files import TorchSource
from sana_jax.contract import contract_of, license_of, names_of
from sana_jax.diffusion.samplers import LongSanaSampler, make_sampler, to_scheduler_config
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights.messages import describe_array
from sana_jax.weights.recognition import looks_like
from sana_jax.weights.rules import misfits, places
from sana_jax.weights.safetensors_files import SafetensorsSource, TensorSource

if TYPE_CHECKING:
    from sana_jax.diffusion.samplers import Sampler

_TORCH_ENDS = (".pth", ".pt", ".bin", ".ckpt")
_HEAD_SIZE = 32  # of linear attention, in every published network
# width -> (heads, size) of cross-attention
_CROSS_HEADS = {1152: (16, 72), 2240: (20, 112)}
_IMAGE_SIZES = (512, 1024, 2048, 4096)
# pixels -> divisor of the position table's coordinates; the other sizes have no table
_INTERPOLATION = {2048: 1.0, 4096: 2.0}
_PIXELS = 32  # of a latent's pixel
# width -> size of the heads of self-attention and of cross-attention
_VIDEO_HEAD_SIZES = {2240: (112, 112)}
# patch -> latent side: 480p on Wan's latents, 720p on those of LTX-2 and DC-AE-V
_VIDEO_SAMPLE_SIZES = {(1, 2, 2): 30, (1, 1, 1): 22}
_VIDEO_FLOW_SHIFT = 8.0
# what LongSANA's training calls its network in a file; SANA-Video's has no such part
LONGSANA_SECTIONS = {"generator", "generator_ema"}


def open_original(path: Path, choices: Choices) -> Model:
    """One file of weights under NVlabs' names.

    Raises:
        UserError: not such a file, or one that leaves open what an option must say.
    """
    refuse(choices, path, "variant", "checkpoint_step")
    if path.suffix in _TORCH_ENDS:
        source = TorchSource(path, choices.weights)
        notes = []
        if source.sections:
            there = ", ".join(f"{name} ({count} tensors)" for name, count in source.sections.items())
            notes.append(f"{path.name} holds {there}; {source.section} is read")
        file = OriginalFile(path, source, ((path, path.stat().st_size),), frozenset(source.sections))
        return read_original(file, choices, notes)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no file of weights; allowed are {', '.join(_TORCH_ENDS)} and .safetensors")
    refuse(choices, path, "weights")
    weights = SafetensorsSource(path)
    return read_original(OriginalFile(path, weights, weights.files), choices, [])


class OriginalFile(NamedTuple):
    """A file under NVlabs' names: where it is, its tensors, its sizes in bytes, the sets of weights that it names."""

    path: Path
    source: TensorSource
    files: tuple[tuple[Path, int], ...] = ()
    sections: frozenset[str] = frozenset()


def read_original(file: OriginalFile, choices: Choices, notes: list[str]) -> Model:
    """What the names and shapes of an original file say; ``notes`` comes first in the result's.

    Raises:
        UserError: no file of the SANA family, or one that leaves open what an option must say.
    """
    check_pipeline(choices.pipeline)
    path, source = file.path, file.source
    names = source.tensors
    if any(name.startswith("transformer_blocks.") for name in names):
        raise UserError(
            f"{path} has the names of a published component, whose shape is in the config.json beside it: name the "
            "directory instead"
        )
    if is_world_model(source):
        refuse(choices, path, "image_size")
        _refuse_pipeline(choices, path)
        return _open_world_model(file, choices, notes)
    if choices.revision is not None:
        raise UserError(
            f"--revision {choices.revision}: {path.name} is no SANA-WM, which alone has two; leave the option out"
        )
    axes = len(names["x_embedder.proj.weight"].shape) if "x_embedder.proj.weight" in names else 0
    if axes == 5 and any(name.endswith(".mlp.t_conv.weight") for name in names):
        refuse(choices, path, "image_size")
        return _open_video(file, choices, notes)
    _refuse_pipeline(choices, path)
    if axes != 4:
        seen = looks_like(names) or "holds no network that is known here"
        raise CheckpointError(
            f"{path} {seen}; allowed are SANA, SANA-1.5, SANA-Sprint and their ControlNets, SANA-Video, LongSANA and "
            "SANA-WM"
        )
    is_controlnet = any(name.startswith("controlnet.") for name in names)
    guidance = "cfg_embedder.mlp.0.weight" in names
    if is_controlnet:
        refuse(choices, path, "flow_shift")
        renamed = RenamedSource(source, controlnet_original.controlnet_table(), controlnet_original.DROPPED)
    else:
        renamed = RenamedSource(source, sana_original.transformer_table(guidance=guidance), sana_original.DROPPED)
    config = infer_config(renamed, choices.image_size, controlnet=is_controlnet)
    network = network_of(config, f"the configuration inferred from {path.name}", renamed.tensors)
    problems = misfits(renamed, places(network.rules, network.abstract))
    if renamed.dropped:
        notes.append(_describe_dropped(renamed.dropped))
    folder = "" if is_controlnet else "transformer"
    component = Component(folder, network, config, renamed, problems, file.files, "original")
    if is_controlnet:
        return Model(path, None, (component,), notes=tuple(notes))
    if guidance:
        refuse(choices, path, "flow_shift")
        sampler, index_class = make_sampler("scm"), "SanaSprintPipeline"
    else:
        shift = choices.flow_shift
        if shift is None:
            shift = 6.0 if _PIXELS * config["sample_size"] >= 4096 else 3.0
            notes.append(f"flow shift {shift:g}, as published for this size; --flow-shift changes it")
        sampler, index_class = make_sampler("dpm_solver", flow_shift=shift), "SanaPipeline"
    return _transformer_model(path, component, sampler, index_class, notes)


def _refuse_pipeline(choices: Choices, path: Path) -> None:
    if choices.pipeline is not None:
        raise UserError(
            f"--pipeline {choices.pipeline} is for an original file of SANA-Video or LongSANA, which look alike; "
            f"{path} is neither: leave the option out"
        )


def _is_longsana(file: OriginalFile, choices: Choices, notes: list[str]) -> bool:
    """Whether a video network is LongSANA's: as the file says, else as the user says, else not, with a note."""
    chosen = choices.pipeline
    if LONGSANA_SECTIONS & file.sections:
        if chosen not in (None, LONGSANA):
            raise UserError(
                f"--pipeline {chosen}: {file.path} has a generator among its parts, so it is LongSANA; leave the "
                "option out"
            )
        notes.append("a generator among its parts: LongSANA")
        return True
    if chosen is None:
        notes.append(
            "taken for SANA-Video; LongSANA's weights have the same names and shapes: if it is that, add --pipeline "
            f"{LONGSANA}"
        )
    return chosen == LONGSANA


def _open_video(file: OriginalFile, choices: Choices, notes: list[str]) -> Model:
    """The transformer of SANA-Video or LongSANA, whose files look alike."""
    path, source = file.path, file.source
    renamed = RenamedSource(source, sana_video_original.video_transformer_table(), sana_video_original.DROPPED)
    config = infer_video_config(renamed)
    network = network_of(config, f"the configuration inferred from {path.name}", renamed.tensors)
    problems = misfits(renamed, places(network.rules, network.abstract))
    if renamed.dropped:
        notes.append(_describe_dropped(renamed.dropped))
    component = Component("transformer", network, config, renamed, problems, file.files, "original")
    shift = choices.flow_shift
    if _is_longsana(file, choices, notes):
        long_sampler = LongSanaSampler(**({} if shift is None else {"flow_shift": shift}))
        notes.append(
            f"LongSANA is sampled in {long_sampler.num_inference_steps} steps at "
            f"{', '.join(map(str, long_sampler.timesteps))} with flow shift {long_sampler.flow_shift:g}, in blocks of "
            f"{long_sampler.block_frames} latent frames; scheduler/scheduler_config.json says so and can be changed"
        )
        return _transformer_model(path, component, long_sampler, LONGSANA, notes)
    if shift is None:
        shift = _VIDEO_FLOW_SHIFT
        notes.append(f"flow shift {shift:g}, as published for SANA-Video; --flow-shift changes it")
    sampler = make_sampler("dpm_solver", flow_shift=shift)
    return _transformer_model(path, component, sampler, SANA_VIDEO, notes)


def _open_world_model(file: OriginalFile, choices: Choices, notes: list[str]) -> Model:
    """The transformer of SANA-WM."""
    path, source = file.path, file.source
    renamed = renamed_world_model(source)
    config = infer_world_model_config(renamed)
    if choices.revision is not None:
        config["revision"] = choices.revision
    network = network_of(config, f"the configuration inferred from {path.name}", renamed.tensors)
    problems = misfits(renamed, places(network.rules, network.abstract), network.ignored)
    if renamed.dropped:
        notes.append(_describe_dropped(renamed.dropped))
    if choices.revision is None:
        notes.append(
            "computed as diffusers 0.42.1 does, revision legacy; --revision current computes it as the original code "
            'does now, as "revision": "current" in transformer/config.json does'
        )
    component = Component("transformer", network, config, renamed, problems, file.files, "original")
    shift = choices.flow_shift
    if shift is None:
        shift = FLOW_SHIFT
        notes.append(f"flow shift {shift:g}, as published for SANA-WM; --flow-shift changes it")
    sampler = make_sampler("flow_euler", flow_shift=shift)
    return _transformer_model(path, component, sampler, "SanaWMPipeline", notes)


def _transformer_model(path: Path, component: Component, sampler: Sampler, index_class: str, notes: list[str]) -> Model:
    """A transformer with the files that a model directory has beside it."""
    network, scheduler = component.network, to_scheduler_config(sampler)
    contract = contract_of(
        network.config,
        names=names_of(path),
        stored={"transformer": {info.dtype.name for info in component.source.tensors.values()}},
        scheduler=scheduler,
        license=license_of(path.parent),
    )
    notes = [*notes, "an original file holds the transformer alone; --components-from DIR takes the others from there"]
    index = {
        "_class_name": index_class,
        "scheduler": ["sana_jax" if isinstance(sampler, LongSanaSampler) else "diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", network.class_name],
    }
    written = {"scheduler/scheduler_config.json": scheduler}
    return Model(path, index, (component,), {}, written, contract, tuple(notes))


def infer_config(source: RenamedSource, image_size: int | None, *, controlnet: bool = False) -> dict[str, Any]:
    """The ``config.json`` that a published checkpoint of these names and shapes has.

    Args:
        source: the tensors under published names.
        image_size: pixels per side that the network was trained for; None takes it from the position table, which
            original files carry even where the network does not use it.
        controlnet: whether it is a ControlNet.

    Raises:
        UserError: the image size is needed, or contradicts the file.
        CheckpointError: a tensor that says something about the shape is missing or has an impossible shape.
    """
    width, channels, patch, _ = _shape(source, "patch_embed.proj.weight", 4)
    if width not in _CROSS_HEADS or width % _HEAD_SIZE:
        raise CheckpointError(
            f"{source.location}: width {width} is not a published one ({', '.join(map(str, _CROSS_HEADS))}), and the "
            "number of cross-attention's heads cannot be seen in the weights: convert it to a diffusers directory with "
            "a config.json first"
        )
    heads, head_size = _CROSS_HEADS[width]
    (inverted, *_), (_, caption) = (
        _shape(source, "transformer_blocks.0.ff.conv_inverted.weight", 4),
        _shape(source, "caption_projection.linear_1.weight", 2),
    )
    layers = {name.split(".")[1] for name in source.tensors if name.startswith("transformer_blocks.")}
    size = _image_size(source, image_size, patch)
    config: dict[str, Any] = {
        "_class_name": "SanaControlNetModel" if controlnet else "SanaTransformer2DModel",
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": width // _HEAD_SIZE,
        "attention_head_dim": _HEAD_SIZE,
        "num_layers": len(layers),
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": head_size,
        "cross_attention_dim": width,
        "caption_channels": caption,
        "mlp_ratio": inverted / 2 / width,
        "dropout": 0.0,
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in source.tensors,
        "sample_size": size // _PIXELS,
        "patch_size": patch,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": _INTERPOLATION.get(size),
    }
    if not controlnet:
        config["out_channels"] = _shape(source, "proj_out.weight", 2)[0] // patch**2
        config["guidance_embeds"] = "time_embed.guidance_embedder.linear_1.weight" in source.tensors
        config["guidance_embeds_scale"] = 0.1
        config["qk_norm"] = (
            "rms_norm_across_heads" if "transformer_blocks.0.attn1.norm_q.weight" in source.tensors else None
        )
        config["timestep_scale"] = 1.0
    return config


def infer_video_config(source: RenamedSource) -> dict[str, Any]:
    """The ``config.json`` that a published SANA-Video of these names and shapes has.

    Raises:
        CheckpointError: a tensor that says something about the shape is missing or has an impossible shape.
    """
    width, channels, *patch = _shape(source, "patch_embedding.weight", 5)
    if width not in _VIDEO_HEAD_SIZES:
        raise CheckpointError(
            f"{source.location}: width {width} is not a published one ({', '.join(map(str, _VIDEO_HEAD_SIZES))}), and "
            "the number of heads cannot be seen in the weights: convert it to a diffusers directory with a config.json "
            "first"
        )
    head_size, cross_head_size = _VIDEO_HEAD_SIZES[width]
    (inverted, *_), (_, caption) = (
        _shape(source, "transformer_blocks.0.ff.conv_inverted.weight", 4),
        _shape(source, "caption_projection.linear_1.weight", 2),
    )
    layers = {name.split(".")[1] for name in source.tensors if name.startswith("transformer_blocks.")}
    normalised = "transformer_blocks.0.attn1.norm_q.weight" in source.tensors
    return {
        "_class_name": "SanaVideoTransformer3DModel",
        "in_channels": channels,
        "out_channels": _shape(source, "proj_out.weight", 2)[0] // math.prod(patch),
        "num_attention_heads": width // head_size,
        "attention_head_dim": head_size,
        "num_layers": len(layers),
        "num_cross_attention_heads": width // cross_head_size,
        "cross_attention_head_dim": cross_head_size,
        "cross_attention_dim": width,
        "caption_channels": caption,
        "mlp_ratio": inverted / 2 / width,
        "dropout": 0.0,
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in source.tensors,
        "sample_size": _VIDEO_SAMPLE_SIZES.get(tuple(patch), 30),
        "patch_size": patch,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": None,
        "guidance_embeds": False,
        "guidance_embeds_scale": 0.1,
        "qk_norm": "rms_norm_across_heads" if normalised else None,
        "rope_max_seq_len": 1024,
    }


def _shape(source: RenamedSource, name: str, axes: int) -> tuple[int, ...]:
    info = source.tensors.get(name)
    if info is None or len(info.shape) != axes or 0 in info.shape:
        found = "is missing" if info is None else f"is {describe_array(info)}"
        raise CheckpointError(f"{source.location}: {name} {found}; it says how wide the network is: download it again")
    return info.shape


def _image_size(source: RenamedSource, image_size: int | None, patch: int) -> int:
    allowed = ", ".join(map(str, _IMAGE_SIZES))
    table = source.dropped.get("pos_embed")
    found = None
    if table is not None and len(table) == 3:
        side = math.isqrt(table[1])
        if side * side == table[1] and side * patch * _PIXELS in _IMAGE_SIZES:
            found = side * patch * _PIXELS
    if image_size is None and found is None:
        raise UserError(
            f"{source.location} does not say for which pictures it was trained; add --image-size with one of {allowed}"
        )
    if image_size is not None and image_size not in _IMAGE_SIZES:
        raise UserError(f"--image-size {image_size} is not a published size; allowed are {allowed}")
    return image_size or found


def _describe_dropped(dropped: Mapping[str, tuple[int, ...]]) -> str:
    base = [name for name in dropped if name.startswith(("blocks.", "final_layer."))]
    others = [name for name in dropped if name not in base]
    parts = [f"left out: {', '.join(others)} (no weights of the network)"] if others else []
    if base:
        parts.append(f"left out: {len(base)} tensors of the transformer beside the ControlNet")
    return "; ".join(parts)
