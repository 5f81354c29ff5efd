"""What weights need of the computation: dtypes, saturation, sampler. It travels with a converted checkpoint.

Checkpoints of one architecture are not alike. The original SANA 1.6B at 1024 px was trained in float16, whose largest
number, 65504, cuts the sums of linear attention off. Its network relies on that: users report broken pictures in
float32, where the sums go on to 10^6 (huggingface/diffusers#10336), and the maintainers give a separate ``_BF16``
checkpoint for bfloat16 (huggingface/diffusers#9982, #10241). Computed in float32 or bfloat16 with attention's output
clipped to ±65504 (``--emulate-fp16-saturation``) they are themselves again. Where values stay in float16's range the
clipping changes nothing, so asking for it is safe in doubt.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_jax.errors import UserError
from sana_jax.files import read_json
from sana_jax.models.ltx2_config import LTX2_CLASS, REFINER_CLASS, LTX2Config
from sana_jax.models.sana import SanaConfig
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.models.sana_wm_config import SanaWMConfig
from sana_jax.weights.safetensors_files import SafetensorsSource, find_weights_file

DTYPES = ("float32", "bfloat16", "float16")
TransformerConfig = SanaConfig | SanaVideoConfig | SanaWMConfig | LTX2Config
_SATURATION_LIMIT = 65504
_WIDE = ("bfloat16", "float32")
_SAMPLERS = {
    "DPMSolverMultistepScheduler": "dpm_solver",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "SCMScheduler": "scm",
    "LongSanaScheduler": "longsana",
    "SanaWMStreamScheduler": "world_stream",
}

# (width, layers, q and k normalised, guidance as input) of the published networks
_FAMILIES = {
    (1152, 28, False, False): "SANA 0.6B",
    (2240, 20, False, False): "SANA 1.6B",
    (2240, 20, True, False): "SANA-1.5 1.6B",
    (2240, 60, True, False): "SANA-1.5 4.8B",
    (1152, 28, True, True): "SANA-Sprint 0.6B",
    (2240, 20, True, True): "SANA-Sprint 1.6B",
}
# Names on the Hub, without "_diffusers" -> whether float16's saturation was trained with. None: trained in float16, and
# neither reported to break in another dtype nor known to work.
_PUBLISHED: dict[str, bool | None] = {
    "Sana_600M_512px": None,
    "Sana_600M_1024px": None,
    "Sana_1600M_512px": None,
    "Sana_1600M_512px_MultiLing": None,
    "Sana_1600M_1024px_MultiLing": None,
    "Sana_1600M_1024px": True,
    "Sana_1600M_1024px_BF16": False,
    "Sana_1600M_2Kpx_BF16": False,
    "Sana_1600M_4Kpx_BF16": False,
    "SANA1.5_1.6B_1024px": False,
    "SANA1.5_4.8B_1024px": False,
    "Sana_Sprint_0.6B_1024px": False,
    "Sana_Sprint_1.6B_1024px": False,
    "SANA-Video_2B_480p": False,
    "SANA-Video_2B_720p": False,
    "SANA-WM_bidirectional": False,
}
_WITHOUT_ENDING = ("SANA-WM_bidirectional",)
_ORGANISATION = "Efficient-Large-Model"
# By the channels of a video model's latents, which tell its autoencoder: pixels and frames per latent. Wan 2.1, LTX-2,
# DC-AE-V.
_VIDEO_LATENTS = {16: (8, 4), 128: (32, 8), 32: (32, 4)}
_VIDEO_LINES = {30: 480, 22: 720}  # sample_size -> pixels of the shorter side


@dataclasses.dataclass(frozen=True)
class Contract:
    """How one checkpoint is meant to be computed.

    Attributes:
        family: "SANA 1.6B", "SANA-Sprint 0.6B", ..., or its shape in words.
        dtypes: compute dtypes in which the transformer's pictures are right as it is, the best one first.
        fp16_saturation: whether it was trained with attention clipped to ±65504; None where that is not known.
        autoencoder_dtype: compute dtype of the autoencoder; never float16.
        text_encoder_dtype: compute dtype of the text encoder; never float16.
        flow_shift: shift of the sampler's noise schedule; None for SANA-Sprint, whose sampler has none.
        sampler: ``dpm_solver``, ``flow_euler``, ``scm``; None where no scheduler came with the weights.
        image_size: pixels per side that it was trained for; of videos, of the shorter side.
        size_multiple: height and width in pixels are multiples of this.
        frame_rule: what numbers of frames a video model takes, and at how many per second; None for pictures.
        license: as the model card says; None where no card came with the weights.
        source: the checkpoint's published name, or the directory or file that it came from.
    """

    family: str
    dtypes: tuple[str, ...] = _WIDE
    fp16_saturation: bool | None = None
    autoencoder_dtype: str = "float32"
    text_encoder_dtype: str = "bfloat16"
    flow_shift: float | None = None
    sampler: str | None = None
    image_size: int | None = None
    size_multiple: int = 32
    frame_rule: str | None = None
    license: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtypes", tuple(self.dtypes))
        for name in (*self.dtypes, self.autoencoder_dtype, self.text_encoder_dtype):
            if name not in DTYPES:
                raise UserError(f"contract: dtype {name!r} is not known; allowed are {', '.join(DTYPES)}")
        for field in ("autoencoder_dtype", "text_encoder_dtype"):
            if getattr(self, field) == "float16":
                raise UserError(f"contract: {field} float16 overflows; allowed are {', '.join(_WIDE)}")
        if not self.dtypes:
            raise UserError(f"contract: dtypes is empty; allowed is one or more of {', '.join(DTYPES)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as ``contract`` of a converted ``model_index.json`` holds them."""
        return {**dataclasses.asdict(self), "dtypes": list(self.dtypes)}

    @classmethod
    def from_dict(cls, values: Any, source: str = "contract") -> Contract:
        """Reads what ``to_dict`` wrote; ``source`` names the file in errors.

        Raises:
            UserError: unknown fields or values of the wrong type.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) - set(fields) or "family" not in values:
            given = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise UserError(f"{source} has {given}; allowed are {', '.join(fields)}, family required: convert it again")
        for name, value in values.items():
            if not _FIELD_TYPES[name](value):
                raise UserError(f"{source}: {name} cannot be a {type(value).__name__} here; convert it again")
        return cls(**values)

    @property
    def compute_dtype(self) -> str:
        """The best dtype that the pipelines compute in: "float32" or "bfloat16"."""
        return next((dtype for dtype in self.dtypes if dtype in _WIDE), "float32")

    def check(
        self, dtype: str, emulate_fp16_saturation: bool = False, option: str = "--emulate-fp16-saturation"
    ) -> str | None:
        """Refuses a compute dtype in which these weights are reported to draw broken pictures.

        Args:
            dtype: the transformer's compute dtype.
            emulate_fp16_saturation: whether attention's output is clipped as float16 does.
            option: how the command at hand asks for that.

        Returns:
            One line that the user should see, or None.

        Raises:
            UserError: a forbidden pair, with the reason; or an emulation that these weights have no use for.
        """
        if emulate_fp16_saturation and self.fp16_saturation is False:
            raise UserError(
                f"{option}: {self.family} ({self.source}) was not trained with float16's saturation; "
                "leave the option out"
            )
        if emulate_fp16_saturation and dtype == "float16":
            raise UserError(f"{option} with float16, which saturates by itself: leave the option out")
        if dtype in self.dtypes or emulate_fp16_saturation:
            if self.fp16_saturation is None and "float16" in self.dtypes and dtype != "float16":
                if emulate_fp16_saturation:
                    return None
                return (
                    f"{self.source}: weights published for float16, computed in {dtype}; sources conflict on whether "
                    f"that matters: if pictures look broken, add {option}"
                )
            return None
        if self.fp16_saturation:
            raise UserError(
                f"{dtype} is not allowed for {self.source} ({self.family}): these weights were trained in float16 and "
                f"need linear attention clipped to ±{_SATURATION_LIMIT}, without which pictures break "
                f"(huggingface/diffusers#10336). Add {option} (emulate_fp16_saturation=True), which "
                "clips and is harmless otherwise, or use Sana_1600M_1024px_BF16_diffusers"
            )
        raise UserError(
            f"{dtype} is not allowed for {self.source} ({self.family}); allowed are {', '.join(self.dtypes)}: choose "
            "one of them"
        )

    def __str__(self) -> str:
        saturation = {True: "trained with it", False: "no", None: "not known"}[self.fp16_saturation]
        shift = "" if self.flow_shift is None else f" with flow shift {self.flow_shift:g}"
        size = "" if self.image_size is None else f", {self.image_size} px, sizes in multiples of {self.size_multiple}"
        size += "" if self.frame_rule is None else f", frames {self.frame_rule}"
        return (
            f"compute in {' or '.join(self.dtypes)}, float16 saturation: {saturation}; autoencoder in "
            f"{self.autoencoder_dtype}, text encoder in {self.text_encoder_dtype}; "
            f"sampler {self.sampler or 'not stated'}{shift}{size}; "
            f"licence: {self.license or 'not stated beside the weights'}; source: {self.source}"
        )


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) < 1000)


_FIELD_TYPES = {
    "family": lambda value: isinstance(value, str),
    "dtypes": lambda value: isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value),
    "fp16_saturation": lambda value: value is None or isinstance(value, bool),
    "autoencoder_dtype": lambda value: isinstance(value, str),
    "text_encoder_dtype": lambda value: isinstance(value, str),
    "flow_shift": lambda value: value is None or type(value) in (int, float),
    "sampler": _is_text,
    "image_size": lambda value: value is None or type(value) is int,
    "size_multiple": lambda value: type(value) is int and value > 0,
    "frame_rule": _is_text,
    "license": _is_text,
    "source": _is_text,
}


def family_name(config: TransformerConfig) -> str:
    """ "SANA 1.6B" and so on, or the shape in words; ControlNets by the class of their configuration."""
    if isinstance(config, SanaVideoConfig):
        # LongSANA's weights have the same shapes
        published = (config.inner_dim, config.num_layers, config.mlp_ratio) == (2240, 20, 3.0)
        return "SANA-Video 2B" if published else f"SANA-Video of {config.num_layers} blocks, width {config.inner_dim}"
    if isinstance(config, SanaWMConfig):
        published = (config.hidden_size, config.num_layers, config.mlp_ratio) == (2240, 20, 3.0)
        size = "SANA-WM 2.6B" if published else f"SANA-WM of {config.num_layers} blocks, width {config.hidden_size}"
        return size if config.revision == "legacy" else f"{size}, {config.revision} revision"
    if isinstance(config, LTX2Config):
        published = (config.inner_dim, config.num_layers) == (4096, 48)
        size = "" if published else f" of {config.num_layers} blocks, width {config.inner_dim}"
        return f"SANA-WM's refiner, LTX-2{size}"
    if type(config).__name__ == "SanaControlNetConfig":
        size = {1152: " 0.6B", 2240: " 1.6B"}.get(config.inner_dim) if config.num_layers == 7 else None
        return f"ControlNet{size}" if size else f"ControlNet of {config.num_layers} blocks, width {config.inner_dim}"
    shape = (config.inner_dim, config.num_layers, config.qk_norm is not None, config.guidance_embeds)
    if shape in _FAMILIES:
        return _FAMILIES[shape]
    kind = {(False, False): "SANA", (True, False): "SANA-1.5", (True, True): "SANA-Sprint"}.get(shape[2:], "SANA")
    return f"{kind} of {config.num_layers} blocks, width {config.inner_dim}"


def infer_contract(directory: str | os.PathLike[str], variant: str | None = None) -> Contract:
    """The contract of a model directory: the one that is written there, or what its files say.

    Args:
        directory: a model directory, published or converted.
        variant: of the weight files: ``bf16``, ``fp16``.

    Raises:
        FileNotFoundError, UserError, CheckpointError: the directory's files are missing or damaged.
    """
    directory = Path(directory)
    index = read_json(directory / "model_index.json")
    if "contract" in index:
        return Contract.from_dict(index["contract"], f"contract of {directory / 'model_index.json'}")
    config = read_json(directory / "transformer" / "config.json")
    scheduler = directory / "scheduler" / "scheduler_config.json"
    parts = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    networks = {"SanaVideoTransformer3DModel": SanaVideoConfig, "SanaWMTransformer3DModel": SanaWMConfig}
    networks |= {REFINER_CLASS: LTX2Config, LTX2_CLASS: LTX2Config}
    return contract_of(
        networks.get(config.get("_class_name"), SanaConfig).from_dict(config),
        names=[*names_of(directory), *(part["_name_or_path"] for part in (index, config) if _has_name(part))],
        stored={part: stored_dtypes(directory / part, stem, variant) for part, stem in parts.items()},
        scheduler=read_json(scheduler) if scheduler.is_file() else None,
        license=license_of(directory),
    )


def contract_of(
    config: TransformerConfig,
    *,
    names: Sequence[str],
    stored: Mapping[str, Collection[str]],
    scheduler: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> Contract:
    """The contract of weights of which these facts are known.

    A checkpoint is recognised by its published name, which its directory, a part of the path to it, or
    ``_name_or_path`` in its configuration carries. Without one, float16 storage tells: of the networks without
    normalised q and k, only the originals were published in it (the ``_BF16`` ones are stored in bfloat16 or float32).
    Weights of SANA 1.6B at 1024 px in float16 are therefore taken for the original. Nothing tells a renamed float32
    copy of it from a renamed ``_BF16`` one; such weights are allowed in every dtype, with a line that says so.

    Args:
        config: the transformer's shape.
        names: what the checkpoint may be called, the surest first: its directory, its Hub name, ``_name_or_path``.
        stored: component -> names of the dtypes that its weights are stored in.
        scheduler: its ``scheduler_config.json``.
        license: as the model card says.
    """
    is_video = isinstance(config, (SanaVideoConfig, SanaWMConfig, LTX2Config))
    name = _published_name(names)
    dtypes_stored = set(stored.get("transformer", ()))
    saturation: bool | None
    if name is not None and not (_PUBLISHED[name] is not False and dtypes_stored == {"bfloat16"}):
        # (the originals were never published in bfloat16: a folder's name does not make them of these)
        saturation = _PUBLISHED[name]
        may_be_original = saturation is None
    elif (
        is_video or config.qk_norm is not None or config.interpolation_scale is not None or "bfloat16" in dtypes_stored
    ):
        saturation, may_be_original = False, False
    else:
        in_float16 = "float16" in dtypes_stored
        saturation = True if in_float16 and family_name(config) == "SANA 1.6B" and config.sample_size == 32 else None
        may_be_original = in_float16 or family_name(config) in ("SANA 0.6B", "SANA 1.6B")
    if saturation:
        dtypes = ("float16",)
    elif may_be_original:
        dtypes = ("float16", "float32", "bfloat16")
    else:
        dtypes = _WIDE if name is not None or "bfloat16" in dtypes_stored else _WIDE[::-1]
    scheduler = scheduler or {}
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    family = family_name(config)
    if scheduler.get("_class_name") == "LongSanaScheduler":  # its weights have the shapes of SANA-Video's
        family = family.replace("SANA-Video", "LongSANA")
    return Contract(
        family=family,
        dtypes=dtypes,
        fp16_saturation=saturation,
        # the published video pipelines keep the autoencoder in float32, however it is stored
        autoencoder_dtype="float32" if is_video else _wide_dtype(stored.get("vae", ())),
        text_encoder_dtype=_wide_dtype(stored.get("text_encoder", ())),
        flow_shift=float(shift)
        if type(shift) in (int, float) and not getattr(config, "guidance_embeds", False)
        else None,
        sampler=_SAMPLERS.get(str(scheduler.get("_class_name"))),
        **_sizes(config),
        license=license,
        source=name or (names[0] if names else None),
    )


def _sizes(config: TransformerConfig) -> dict[str, Any]:
    """What pictures or videos a network makes."""
    if isinstance(config, SanaConfig):
        return {"image_size": 32 * config.sample_size, "size_multiple": 32 * config.patch_size}
    if isinstance(config, LTX2Config):
        temporal, spatial, _ = config.vae_scale_factors
        return {"size_multiple": spatial, "frame_rule": f"1 + {temporal}k, 16 per second"}
    spatial, temporal = _VIDEO_LATENTS.get(config.in_channels, (None, None))
    rule = "as the autoencoder has it" if temporal is None else f"1 + {temporal}k"
    size_multiple = 1 if spatial is None else spatial * config.patch_size[1]
    image_size = config.image_size if isinstance(config, SanaWMConfig) else _VIDEO_LINES.get(config.sample_size)
    return {"image_size": image_size, "size_multiple": size_multiple, "frame_rule": f"{rule}, 16 per second"}


def names_of(path: str | os.PathLike[str]) -> list[str]:
    """What a directory or file may be called: its own name, then those of the two folders around it."""
    # A hub cache has models--organisation--name/snapshots/<commit>; farther out are the user's own folders.
    return [part for part in reversed(Path(os.path.abspath(path)).parts) if part != os.sep][:3] or [str(path)]


def stored_dtypes(directory: Path, stem: str, variant: str | None = None) -> set[str]:
    """Names of the floating-point dtypes of a component's published weights; empty where there are none."""
    try:
        source = SafetensorsSource(find_weights_file(directory, stem, variant))
    except FileNotFoundError:
        return set()
    return {info.dtype.name for info in source.tensors.values() if info.dtype.name in (*DTYPES, "float64")}


def license_of(directory: Path) -> str | None:
    """The licence that the model card's (``README.md``) first lines state; None where they do not."""
    try:
        with open(directory / "README.md", encoding="utf-8") as file:
            head = file.read(20_000)
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", head, re.DOTALL)
    fields = dict(re.findall(r"^(license(?:_name|_link)?):[ \t]*(\S[^\n]*?)[ \t]*$", front[1] if front else "", re.M))
    stated = [fields[key].strip("'\"") for key in ("license_name", "license", "license_link") if key in fields]
    if "license_name" in fields and "license" in fields:
        stated.remove(fields["license"].strip("'\""))  # "other"
    return " ".join(stated)[:300] or None


def hub_name_of(name: str) -> str | None:
    """Where the Hub has the published model of that name, with or without ``_diffusers``; None for other names."""
    plain = re.sub(r"_diffusers$", "", name, flags=re.IGNORECASE).lower()
    for published in _PUBLISHED:
        if published.lower() == plain:
            ending = "" if published in _WITHOUT_ENDING else "_diffusers"
            return f"{_ORGANISATION}/{published}{ending}"
    return None


def _published_name(names: Iterable[str]) -> str | None:
    """The published name that one of ``names`` is or holds; whole names go before parts, long ones before short."""
    plain = [
        re.sub(r"(_diffusers)?(\.pth|\.safetensors)?$", "", part, flags=re.IGNORECASE).lower()
        for name in names
        for part in re.split(r"--|[/\\]", name)
    ]
    by_length = sorted(_PUBLISHED, key=len, reverse=True)
    for test in (lambda part, name: part == name, lambda part, name: name in part):
        for part in plain:
            for name in by_length:
                if test(part, name.lower()):
                    return name
    return None


def _wide_dtype(stored: Collection[str]) -> str:
    """float32 stays float32; everything else is computed in bfloat16, for float16 overflows there."""
    return "float32" if not stored or "float32" in stored or "float64" in stored else "bfloat16"


def _has_name(part: Mapping[str, Any]) -> bool:
    return isinstance(part.get("_name_or_path"), str)
