"""Model directories: which networks a model is made of, and how it is sampled by default.

::

    model_index.json                  components and defaults; written last, so its presence means the rest is there
    transformer/config.json           beside it *.safetensors (published) or params/ (converted)
    scheduler/scheduler_config.json
    text_encoder/config.json          likewise; the tokenizer is in tokenizer/
    vae/config.json                   likewise
    controlnet/config.json            likewise, in a model that has one
    checkpoints/<step>/               what was trained, where the directory is a training run
    base_model.json                   of a run that started from another model: see ``base_model_file``

The layout is the one that diffusers publishes in. A training run's directory is a model directory too.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from sana_jax.autoencoders import Autoencoder, load_autoencoder
from sana_jax.contract import Contract, hub_name_of, infer_contract
from sana_jax.diffusion.samplers import Sampler, from_scheduler_config, to_scheduler_config
from sana_jax.errors import UserError
from sana_jax.files import read_json, write_json
from sana_jax.models.controlnet import SanaControlNetConfig
from sana_jax.models.sana import SanaConfig
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.pipelines.families import (
    FAMILIES,
    IMAGE_TRANSFORMER,
    VIDEO_TRANSFORMER,
    WORLD_TRANSFORMER,
    TransformerConfig,
)
from sana_jax.text_encoders import TextEncoder, load_text_encoder
from sana_jax.text_encoders.gemma import GemmaTextEncoder
from sana_jax.text_encoders.instructions import IMAGE_INSTRUCTION, VIDEO_INSTRUCTION, WORLD_INSTRUCTION

_INDEX = "model_index.json"
WORLD_PIPELINE, WORLD_STREAM = "SanaWMPipeline", "SanaWMStreamingPipeline"
WORLD_PIPELINES = (WORLD_PIPELINE, WORLD_STREAM)
# pipeline here -> the classes of published indices that it serves
PIPELINES = {
    "SanaPipeline": ("SanaPipeline", "SanaPAGPipeline"),
    "SanaSprintPipeline": ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
    "SanaControlNetPipeline": ("SanaControlNetPipeline",),
    # the same weights
    "SanaVideoPipeline": ("SanaVideoPipeline", "SanaImageToVideoPipeline"),
    "SanaImageToVideoPipeline": ("SanaImageToVideoPipeline", "SanaVideoPipeline"),
    # a distilled network of the same shape, with its own sampler
    "LongSanaVideoPipeline": ("LongSanaVideoPipeline",),
    # a network of another shape, which is told of the camera
    WORLD_PIPELINE: (WORLD_PIPELINE,),
    # the same in causal blocks, for which networks are distilled; any can be streamed
    WORLD_STREAM: (WORLD_STREAM, WORLD_PIPELINE),
}
VIDEO_PIPELINES = ("SanaVideoPipeline", "SanaImageToVideoPipeline", "LongSanaVideoPipeline", *WORLD_PIPELINES)
# those that write a video while they make it
GROWING_PIPELINES = ("LongSanaVideoPipeline", WORLD_STREAM)
# what an index of another family says of itself
_OTHER_FAMILIES = {
    "SanaVideoPipeline": "SANA-Video",
    "SanaImageToVideoPipeline": "SANA-Video",
    "LongSanaVideoPipeline": "LongSANA",
    WORLD_PIPELINE: "SANA-WM",
    WORLD_STREAM: "SANA-WM",
}
_REFINERS = ("SanaWMLTX2Refiner", "SanaWMRefiner")
_LOOKS = {IMAGE_TRANSFORMER: "an image model", VIDEO_TRANSFORMER: "SANA-Video", WORLD_TRANSFORMER: "SANA-WM"}
_PIXELS_PER_SAMPLE = 32  # of the published autoencoders; sample_size x this is a model's size in pixels
_PUBLISHED_STEPS = {"SanaSprintPipeline": 2}
# by the side in pixels that sample_size stands for; others make squares of it
_PUBLISHED_VIDEO_SIZES = {480: (480, 832), 704: (704, 1280)}
_VIDEO_DEFAULTS = {"guidance_scale": 6.0, "num_inference_steps": 50, "frames": 81, "fps": 16.0}
_LONG_VIDEO_DEFAULTS = {"guidance_scale": 1.0, "num_inference_steps": 4}  # distilled
_WORLD_DEFAULTS = {"guidance_scale": 5.0, "num_inference_steps": 60, "frames": 161, "fps": 16.0}
_WORLD_SIZE = (704, 1280)


_OF_VIDEOS = ("frames", "fps")
CAMERA_DEFAULTS = ("field_of_view", "translation_speed", "rotation_speed")
_OPTIONAL = (*_OF_VIDEOS, *CAMERA_DEFAULTS)


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """What a pipeline does where a call leaves it open.

    ``height`` and ``width`` are pixels. ``license`` is printed when the model is used. ``frames``, and ``fps`` of them
    per second, are for videos, None for pictures. The last three are for worlds: the degrees that the lens spans across
    a frame, and the units and degrees per frame of one key; None for those of any world.
    """

    guidance_scale: float = 4.5
    num_inference_steps: int = 20
    height: int = 1024
    width: int = 1024
    license: str | None = None
    frames: int | None = None
    fps: float | None = None
    field_of_view: float | None = None
    translation_speed: float | None = None
    rotation_speed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """What an index holds of them: without those for videos and worlds where they are None."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _OPTIONAL or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> SamplingDefaults:
        """Reads ``defaults`` of an index; ``source`` names it in errors.

        Raises:
            UserError: a missing or unknown field.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = set(fields) - {"license", *_OPTIONAL}
        if set(values) - set(fields) or required - set(values):
            raise UserError(
                f"{source} has {', '.join(sorted(values)) or 'nothing'}; allowed are {', '.join(fields)}, all but "
                f"license, {', '.join(_OPTIONAL)} required: mend it or write the model directory again"
            )
        kinds = {"guidance_scale": (int, float), "license": (str, type(None))}
        kinds |= dict.fromkeys(("fps", *CAMERA_DEFAULTS), (int, float, type(None)))
        for name, kind in kinds.items():
            if name in values and (isinstance(values[name], bool) or not isinstance(values[name], kind)):
                raise UserError(f"{source} has {name}={values[name]!r}, which is of another type: mend it")
        numbers = ["num_inference_steps", "height", "width"]
        for name in numbers + (["frames"] if values.get("frames") is not None else []):
            if type(values[name]) is not int or values[name] < 1:
                raise UserError(f"{source} has {name}={values[name]!r}; allowed is a whole number from 1 on: mend it")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """What ``read_model_directory`` finds; weights are read apart from it."""

    path: pathlib.Path
    transformer_config: TransformerConfig
    sampler: Sampler
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    defaults: SamplingDefaults
    contract: Contract | None = None
    trained_from: BaseModelFile | None = None
    base: ModelDirectory | None = None
    """The model that a training run started from, where it has started from one."""

    @property
    def transformer_source(self) -> ModelDirectory:
        """The directory that has the transformer's weights: its own, or the one that it was trained beside."""
        beside = self.trained_from is not None and self.trained_from.kind in ("lora", "controlnet")
        return self.base.transformer_source if beside else self


def write_model_directory(
    directory: str | os.PathLike[str],
    *,
    transformer_config: TransformerConfig,
    sampler: Sampler,
    text_encoder: TextEncoder,
    autoencoder: Autoencoder,
    defaults: SamplingDefaults | Mapping[str, Any],
    pipeline: str = "SanaPipeline",
    contract: Contract | None = None,
    trained_from: BaseModelFile | None = None,
) -> None:
    """Writes the configurations of a model; what else is in the directory stays.

    Each file appears whole or not at all, the index last. With ``trained_from`` text encoder and autoencoder are left
    to the base model.

    Raises:
        UserError: ``defaults`` with missing or unknown fields, or components that do not fit one another.
    """
    directory = pathlib.Path(directory)
    if not isinstance(defaults, SamplingDefaults):
        defaults = SamplingDefaults.from_dict(defaults, "defaults")
    check_fit(transformer_config, text_encoder, autoencoder)
    parts = {
        "transformer": ("config.json", transformer_config.to_dict()),
        "scheduler": ("scheduler_config.json", to_scheduler_config(sampler)),
        "text_encoder": ("config.json", text_encoder.to_config()),
        "vae": ("config.json", autoencoder.to_config()),
    }
    if trained_from is not None:
        trained_from.write(directory)
    for folder, (name, config) in parts.items():
        if trained_from is None or folder in ("transformer", "scheduler"):
            write_json(directory / folder / name, config)
    write_json(
        directory / _INDEX,
        {
            "_class_name": pipeline,
            **{folder: ["sana_jax", config.get("_class_name")] for folder, (_, config) in parts.items()},
            **({} if contract is None else {"contract": contract.to_dict()}),
            "defaults": defaults.to_dict(),
        },
    )


def read_model_directory(
    directory: str | os.PathLike[str], pipeline: str = "SanaPipeline", *, variant: str | None = None
) -> ModelDirectory:
    """Reads what ``write_model_directory`` has written, or a published directory; the transformer's weights apart.

    Args:
        directory: the model.
        pipeline: the pipeline that it is wanted for, a key of ``PIPELINES``.
        variant: of the published weight files: ``"bf16"``, ``"fp16"``; None of a run for the one that it was given.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        UserError: a damaged file, a pipeline of another kind, or components that do not fit one another.
    """
    directory = pathlib.Path(directory)
    _check_is_directory(directory)
    index = _read_json(directory / _INDEX)
    check_pipeline(index.get("_class_name"), pipeline, directory / _INDEX)
    network = _network_of(pipeline)
    transformer_config = FAMILIES[network].config.from_dict(_read_component(directory, "transformer", network))
    if trained_from := BaseModelFile.read(directory):
        return _read_trained(directory, trained_from, transformer_config, index, pipeline, variant)
    contract = None
    if "contract" in index or _is_published(index, directory):
        contract = infer_contract(directory, variant)
    text_dtype, image_dtype = (contract.text_encoder_dtype, contract.autoencoder_dtype) if contract else (None, None)
    text_encoder = load_text_encoder(directory / "text_encoder", dtype=text_dtype, variant=variant)
    text_encoder = _as_trained(text_encoder, pipeline)
    autoencoder = load_autoencoder(directory / "vae", dtype=image_dtype, variant=variant)
    check_fit(transformer_config, text_encoder, autoencoder)
    return ModelDirectory(
        path=directory,
        transformer_config=transformer_config,
        sampler=from_scheduler_config(_read_json(directory / "scheduler" / "scheduler_config.json")),
        text_encoder=text_encoder,
        autoencoder=autoencoder,
        defaults=_defaults(index, directory, pipeline, transformer_config, contract, autoencoder),
        contract=contract,
    )


def _network_of(pipeline: str) -> str:
    """The published class of a pipeline's transformer."""
    if pipeline in WORLD_PIPELINES:
        return WORLD_TRANSFORMER
    return VIDEO_TRANSFORMER if pipeline in VIDEO_PIPELINES else IMAGE_TRANSFORMER


def _as_trained(text_encoder: TextEncoder, pipeline: str) -> TextEncoder:
    """A Gemma-2 with the instruction of a pipeline's family; its files are the same in all of them."""
    if not isinstance(text_encoder, GemmaTextEncoder) or pipeline not in VIDEO_PIPELINES:
        return text_encoder
    changes: dict[str, Any] = {"cleans_prompts": False} if pipeline in WORLD_PIPELINES else {}
    if text_encoder.complex_human_instruction == IMAGE_INSTRUCTION:
        own = WORLD_INSTRUCTION if pipeline in WORLD_PIPELINES else VIDEO_INSTRUCTION
        changes["complex_human_instruction"] = own
    return dataclasses.replace(text_encoder, **changes)


def _read_trained(
    directory: pathlib.Path,
    trained_from: BaseModelFile,
    transformer_config: SanaConfig,
    index: Mapping[str, Any],
    pipeline: str,
    variant: str | None,
) -> ModelDirectory:
    """A run's directory that leans on its base model."""
    place = pathlib.Path(trained_from.locate(directory))
    base = read_model_directory(place, pipeline_of(place), variant=variant or trained_from.variant)
    return dataclasses.replace(
        base,
        path=directory,
        transformer_config=transformer_config,
        sampler=from_scheduler_config(_read_json(directory / "scheduler" / "scheduler_config.json")),
        defaults=_defaults(index, directory, pipeline, transformer_config, base.contract, base.autoencoder),
        trained_from=trained_from,
        base=base,
    )


def read_controlnet_config(directory: str | os.PathLike[str]) -> SanaControlNetConfig:
    """The configuration of a ControlNet's own directory.

    Raises:
        FileNotFoundError: it has no ``config.json``.
        UserError: a damaged file, or a network of another kind.
    """
    directory = pathlib.Path(directory)
    return SanaControlNetConfig.from_dict(_read_component(directory.parent, directory.name, "SanaControlNetModel"))


def pipeline_of(directory: str | os.PathLike[str]) -> str:
    """The key of ``PIPELINES`` that a model directory is for.

    Raises:
        FileNotFoundError: there is no such directory, or it has no index.
        UserError: the index is damaged or of another family.
    """
    directory = pathlib.Path(directory)
    _check_is_directory(directory)
    class_name = _read_json(directory / _INDEX).get("_class_name")
    if isinstance(class_name, str) and class_name in PIPELINES:
        return class_name
    for pipeline, classes in PIPELINES.items():
        if class_name in classes:
            return pipeline
    check_pipeline(class_name, "SanaPipeline", directory / _INDEX)
    return "SanaPipeline"


def check_pipeline(class_name: Any, pipeline: str, where: pathlib.Path) -> None:
    """Raises ``UserError`` if an index of ``class_name`` is not for ``pipeline``, naming the one that it is for."""
    if class_name in PIPELINES[pipeline]:
        return
    allowed = " or ".join(PIPELINES[pipeline])
    wants_video = pipeline in VIDEO_PIPELINES
    family = _OTHER_FAMILIES.get(class_name)
    for other, classes in PIPELINES.items():
        if class_name in classes and wants_video == (other in VIDEO_PIPELINES):
            use = f"use {other}"
            if (pipeline, other) == ("SanaControlNetPipeline", "SanaPipeline"):
                use += ", or name the directory of a ControlNet as controlnet"
            raise UserError(f"{where} has _class_name {class_name!r}; {pipeline} allows {allowed}: {use}")
    if class_name in _REFINERS:
        raise UserError(
            f"{where} is SANA-WM's refiner: it has _class_name {class_name!r}; {pipeline} allows {allowed}: name the "
            "first stage's directory, and this one as refiner"
        )
    if wants_video and any(class_name in classes for classes in PIPELINES.values()):
        family = "an image model"
    if family:
        use = f"choose a{' video' if wants_video else 'n image'} model"
        if not wants_video and class_name in VIDEO_PIPELINES:
            use += f", or use {class_name}"
        raise UserError(
            f"{where} looks like {family}: it has _class_name {class_name!r}; {pipeline} allows {allowed}: {use}"
        )
    kind = "text-to-video" if wants_video else "text-to-image"
    raise UserError(
        f"{where} has _class_name {class_name!r}; allowed is {allowed}: choose a {kind} model of the SANA family"
    )


def _is_published(index: Mapping[str, Any], directory: pathlib.Path) -> bool:
    """Whether it is as diffusers writes and reads one; by its index alone if the weights are missing."""
    text_encoder = index.get("text_encoder")
    if isinstance(text_encoder, list) and text_encoder[-1:] == ["WordEncoder"]:  # which has no weights
        return False
    source = index.get("transformer")
    named = isinstance(source, list) and source[:1] == ["diffusers"]
    return named or any((directory / "transformer").glob("*.safetensors*"))


def _check_is_directory(directory: pathlib.Path) -> None:
    if not directory.is_dir():
        if hub_name := hub_name_of(directory.name):
            raise FileNotFoundError(
                f"model {directory} is not a directory here; write --model {hub_name} to download it, or the path of a "
                "directory that has it"
            )
        raise FileNotFoundError(
            f"model {directory} is not a directory here; allowed is a directory with {_INDEX}: python -m train.main "
            "makes one, runs/digits"
        )


def _read_component(directory: pathlib.Path, folder: str, class_name: str) -> dict[str, Any]:
    """A network's configuration; raises ``UserError`` if it says that it is a network of another class."""
    path = directory / folder / "config.json"
    config = _read_json(path)
    found = config.get("_class_name", class_name)
    if found != class_name:
        looks = f": looks like {_LOOKS[found]}" if found in _LOOKS else ""
        raise UserError(f"{path} has _class_name {found!r}{looks}; allowed is {class_name}: choose such a model")
    return config


def _defaults(
    index: Mapping[str, Any],
    directory: pathlib.Path,
    pipeline: str,
    config: TransformerConfig,
    contract: Contract | None,
    autoencoder: Autoencoder,
) -> SamplingDefaults:
    """What our index says, or what the published pipelines do."""
    if "defaults" in index or contract is None:
        return SamplingDefaults.from_dict(index.get("defaults", {}), f"defaults of {directory / _INDEX}")
    license = contract.license
    if pipeline in WORLD_PIPELINES:
        return SamplingDefaults(height=_WORLD_SIZE[0], width=_WORLD_SIZE[1], license=license, **_WORLD_DEFAULTS)
    if pipeline in VIDEO_PIPELINES:
        side = config.sample_size * config.patch_size[1] * autoencoder.spatial_factor
        height, width = _PUBLISHED_VIDEO_SIZES.get(side, (side, side))
        own = _LONG_VIDEO_DEFAULTS if pipeline == "LongSanaVideoPipeline" else {}
        return SamplingDefaults(height=height, width=width, license=license, **{**_VIDEO_DEFAULTS, **own})
    side = config.sample_size * _PIXELS_PER_SAMPLE
    steps = _PUBLISHED_STEPS.get(pipeline, SamplingDefaults.num_inference_steps)
    return SamplingDefaults(num_inference_steps=steps, height=side, width=side, license=license)


def check_fit(config: TransformerConfig, text_encoder: TextEncoder, autoencoder: Autoencoder) -> None:
    """Raises ``UserError`` for components that do not fit one another."""
    if isinstance(config, SanaConfig) == hasattr(autoencoder, "temporal_factor"):
        kinds = ("an image", "a video") if isinstance(config, SanaConfig) else ("a video", "an image")
        raise UserError(
            f"{kinds[0]} transformer with {kinds[1]} autoencoder ({type(autoencoder).__name__}); allowed are both of "
            "one kind: take them from one model"
        )
    if config.caption_channels != text_encoder.embedding_dim:
        raise UserError(
            f"transformer caption_channels {config.caption_channels} must be the text encoder's embedding_dim "
            f"{text_encoder.embedding_dim}: set both alike"
        )
    out_channels = getattr(config, "out_channels", None) or config.in_channels
    if not config.in_channels == out_channels == autoencoder.latent_channels:
        raise UserError(
            f"transformer in_channels {config.in_channels} and out_channels {out_channels} must be the autoencoder's "
            f"latent channels {autoencoder.latent_channels}: set all alike"
        )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so its directory is not a model; allowed is a published or converted model, or a "
            "directory that python -m train.main has written, such as runs/digits: name that one or train again"
        )
    return read_json(path)
