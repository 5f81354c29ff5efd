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
from sana_jax.contract import Contract, infer_contract
from sana_jax.diffusion.samplers import Sampler, from_scheduler_config, to_scheduler_config
from sana_jax.errors import UserError
from sana_jax.files import read_json, write_json
from sana_jax.models.controlnet import SanaControlNetConfig
from sana_jax.models.sana import SanaConfig
from sana_jax.pipelines.base_model_file import BaseModelFile
from sana_jax.text_encoders import TextEncoder, load_text_encoder

_INDEX = "model_index.json"
# pipeline here -> the classes of published indices that it serves
PIPELINES = {
    "SanaPipeline": ("SanaPipeline", "SanaPAGPipeline"),
    "SanaSprintPipeline": ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
    "SanaControlNetPipeline": ("SanaControlNetPipeline",),
}
# what an index of another family says of itself
_OTHER_FAMILIES = {
    "SanaVideoPipeline": "SANA-Video",
    "SanaImageToVideoPipeline": "SANA-Video",
    "LongSanaVideoPipeline": "LongSANA",
    "SanaWMPipeline": "SANA-WM",
}
_PIXELS_PER_SAMPLE = 32  # of the published autoencoders; sample_size x this is a model's size in pixels
_PUBLISHED_STEPS = {"SanaSprintPipeline": 2}


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """What a pipeline does where a call leaves it open.

    ``height`` and ``width`` are pixels. ``license`` is printed when the model is used.
    """

    guidance_scale: float = 4.5
    num_inference_steps: int = 20
    height: int = 1024
    width: int = 1024
    license: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> SamplingDefaults:
        """Reads ``defaults`` of an index; ``source`` names it in errors.

        Raises:
            UserError: a missing or unknown field.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = set(fields) - {"license"}
        if set(values) - set(fields) or required - set(values):
            raise UserError(
                f"{source} has {', '.join(sorted(values)) or 'nothing'}; allowed are {', '.join(fields)}, all but "
                "license required: mend it or write the model directory again"
            )
        for name, kind in {"guidance_scale": (int, float), "license": (str, type(None))}.items():
            if name in values and (isinstance(values[name], bool) or not isinstance(values[name], kind)):
                raise UserError(f"{source} has {name}={values[name]!r}, which is of another type: mend it")
        for name in ("num_inference_steps", "height", "width"):
            if type(values[name]) is not int or values[name] < 1:
                raise UserError(f"{source} has {name}={values[name]!r}; allowed is a whole number from 1 on: mend it")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """What ``read_model_directory`` finds; weights are read apart from it."""

    path: pathlib.Path
    transformer_config: SanaConfig
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
    transformer_config: SanaConfig,
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
            "defaults": dataclasses.asdict(defaults),
        },
    )


def read_model_directory(
    directory: str | os.PathLike[str], pipeline: str = "SanaPipeline", *, variant: str | None = None
) -> ModelDirectory:
    """Reads what ``write_model_directory`` has written, or a published directory; the transformer's weights apart.

    Args:
        directory: the model.
        pipeline: the pipeline that it is wanted for, a key of ``PIPELINES``.
        variant: of the published weight files: ``"bf16"``, ``"fp16"``.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        UserError: a damaged file, a pipeline of another kind, or components that do not fit one another.
    """
    directory = pathlib.Path(directory)
    _check_is_directory(directory)
    index = _read_json(directory / _INDEX)
    check_pipeline(index.get("_class_name"), pipeline, directory / _INDEX)
    transformer_config = SanaConfig.from_dict(_read_component(directory, "transformer", "SanaTransformer2DModel"))
    if trained_from := BaseModelFile.read(directory):
        return _read_trained(directory, trained_from, transformer_config, index, pipeline, variant)
    contract = None
    if "contract" in index or _is_published(index, directory):
        contract = infer_contract(directory, variant)
    text_dtype, image_dtype = (contract.text_encoder_dtype, contract.autoencoder_dtype) if contract else (None, None)
    text_encoder = load_text_encoder(directory / "text_encoder", dtype=text_dtype, variant=variant)
    autoencoder = load_autoencoder(directory / "vae", dtype=image_dtype, variant=variant)
    check_fit(transformer_config, text_encoder, autoencoder)
    return ModelDirectory(
        path=directory,
        transformer_config=transformer_config,
        sampler=from_scheduler_config(_read_json(directory / "scheduler" / "scheduler_config.json")),
        text_encoder=text_encoder,
        autoencoder=autoencoder,
        defaults=_defaults(index, directory, pipeline, transformer_config, contract),
        contract=contract,
    )


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
    base = read_model_directory(place, pipeline_of(place), variant=variant)
    return dataclasses.replace(
        base,
        path=directory,
        transformer_config=transformer_config,
        sampler=from_scheduler_config(_read_json(directory / "scheduler" / "scheduler_config.json")),
        defaults=_defaults(index, directory, pipeline, transformer_config, base.contract),
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
    for other, classes in PIPELINES.items():
        if class_name in classes:
            use = f"use {other}"
            if (pipeline, other) == ("SanaControlNetPipeline", "SanaPipeline"):
                use += ", or name the directory of a ControlNet as controlnet"
            raise UserError(f"{where} has _class_name {class_name!r}; {pipeline} allows {allowed}: {use}")
    if family := _OTHER_FAMILIES.get(class_name):
        raise UserError(
            f"{where} looks like {family}: it has _class_name {class_name!r}; {pipeline} allows {allowed}: choose an "
            "image model"
        )
    raise UserError(
        f"{where} has _class_name {class_name!r}; allowed is {allowed}: choose a text-to-image model of the SANA family"
    )


def _is_published(index: Mapping[str, Any], directory: pathlib.Path) -> bool:
    """Whether diffusers has written the directory; by its index alone if the weights are missing."""
    source = index.get("transformer")
    named = isinstance(source, list) and source[:1] == ["diffusers"]
    return named or any((directory / "transformer").glob("*.safetensors*"))


def _check_is_directory(directory: pathlib.Path) -> None:
    if not directory.is_dir():
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
        looks = ": looks like SANA-Video" if "Video" in str(found) else ""
        raise UserError(f"{path} has _class_name {found!r}{looks}; allowed is {class_name}: choose such a model")
    return config


def _defaults(
    index: Mapping[str, Any],
    directory: pathlib.Path,
    pipeline: str,
    config: SanaConfig,
    contract: Contract | None,
) -> SamplingDefaults:
    """What our index says, or what the published pipelines do."""
    if "defaults" in index or contract is None:
        return SamplingDefaults.from_dict(index.get("defaults", {}), f"defaults of {directory / _INDEX}")
    side, license = config.sample_size * _PIXELS_PER_SAMPLE, contract.license
    steps = _PUBLISHED_STEPS.get(pipeline, SamplingDefaults.num_inference_steps)
    return SamplingDefaults(num_inference_steps=steps, height=side, width=side, license=license)


def check_fit(config: SanaConfig, text_encoder: TextEncoder, autoencoder: Autoencoder) -> None:
    """Raises ``UserError`` for components that do not fit one another."""
    if config.caption_channels != text_encoder.embedding_dim:
        raise UserError(
            f"transformer caption_channels {config.caption_channels} must be the text encoder's embedding_dim "
            f"{text_encoder.embedding_dim}: set both alike"
        )
    out_channels = config.out_channels or config.in_channels
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
