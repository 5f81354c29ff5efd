"""One component's weights on either side: PyTorch's own reader on its files, and ours as the pipelines read them."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.engine import export_model
from convert.sources import Choices, Component, Model
from convert.verify.report import Report
from kernels.typing import PyTree
from sana_jax.compilation import readable_bytes
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights.components import open_component
from sana_jax.weights.messages import first_few, one_line
from sana_jax.weights.rules import read_params

PACKAGES = ("torch", "diffusers", "transformers")
_CLASSES = {
    "SanaTransformer2DModel": "diffusers",
    "SanaVideoTransformer3DModel": "diffusers",
    "SanaWMTransformer3DModel": "diffusers",
    "SanaControlNetModel": "diffusers",
    "SanaWMLTX2RefinerTransformer3DModel": "diffusers",
    "LTX2VideoTransformer3DModel": "diffusers",
    "LTX2TextConnectors": "diffusers.pipelines.ltx2.connectors",
    "AutoencoderDC": "diffusers",
    "AutoencoderKLWan": "diffusers",
    "AutoencoderKLLTX2Video": "diffusers",
    "Gemma2Model": "transformers",
    "Gemma3ForConditionalGeneration": "transformers",
    "Gemma3TextModel": "transformers",
}
# The published class whose weights another one runs block by block.
_RUN_BY = {"LTX2VideoTransformer3DModel": "SanaWMLTX2RefinerTransformer3DModel"}
_LARGEST_FLOAT16 = 65504.0


class MissingPackageError(UserError):
    """PyTorch, or a package of its networks, is not installed."""


def require_packages() -> str:
    """Imports PyTorch and its networks; returns their versions in words.

    Raises:
        MissingPackageError: one of them is not installed, or cannot be imported.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on disk
    versions = []
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            missing = getattr(error, "name", None) or name
            raise MissingPackageError(
                f"verify compares with PyTorch's networks, and the package {missing} is not installed "
                f"({one_line(error, 200)}); install it: pip install torch diffusers transformers accelerate"
            ) from None
        versions.append(f"{name} {module.__version__}")
    return ", ".join(versions)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in full precision on both sides; PyTorch's libraries say nothing but errors."""
    import diffusers
    import torch
    import transformers

    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    levels = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        diffusers.utils.logging.set_verbosity(levels[0])
        transformers.utils.logging.set_verbosity(levels[1])


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one component is.

    Attributes:
        ours: its directory as the source has it; None for an original file or a training run.
        theirs: a directory that PyTorch's libraries read.
        variant: of the files there.
    """

    component: Component
    ours: Path | None
    theirs: Path
    variant: str | None


def variant_of(component: Component) -> str | None:
    """The variant of published files, by their names."""
    for file, _ in component.files if component.origin == "published" else ():
        if match := re.fullmatch(r"[a-z_]+\.([A-Za-z]\w*?)(-\d+-of-\d+)?\.safetensors", file.name):
            return match[1]
    return None


@contextlib.contextmanager
def published(model: Model, components: list[Component], choices: Choices, report: Report) -> Iterator[list[Place]]:
    """Where PyTorch finds each component: the source, or what ``export`` makes of it in a temporary directory."""
    if all(component.origin == "published" for component in components):
        report("PyTorch reads the weights from the source itself")
        yield [Place(part, model.path / part.folder, model.path / part.folder, variant_of(part)) for part in components]
        return
    with tempfile.TemporaryDirectory(prefix="sana-jax-verify-") as root:
        places = []
        size = sum(component.num_bytes for component in components)
        report(f"PyTorch reads the weights as export writes them, from a temporary directory: {readable_bytes(size)}")
        for component in components:
            whole = component.origin in ("original", "training run")
            source = model.path if whole else model.path / component.folder
            target = Path(root) / (component.folder or "component")
            export_model(source, target, choices, report=lambda line: None)
            inside = target / component.folder if (target / component.folder / "config.json").is_file() else target
            places.append(Place(component, None if whole else source, inside, None))
        yield places


def load_theirs(place: Place, fp16_saturation: bool = False) -> Any:
    """PyTorch's network in float32, strictly: every weight from the files and no other.

    Raises:
        CheckpointError: PyTorch's libraries find weights missing, unexpected or misshapen.
    """
    import torch

    name = place.component.network.class_name
    module = importlib.import_module(_CLASSES[name])
    # Gemma's attention in other forms leaves its soft capping out
    more = {"attn_implementation": "eager", "dtype": torch.float32} if name.startswith("Gemma") else {}
    if not more:
        more = {"torch_dtype": torch.float32}
    try:
        model, info = getattr(module, _RUN_BY.get(name, name)).from_pretrained(
            str(place.theirs), variant=place.variant, output_loading_info=True, local_files_only=True, **more
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{_CLASSES[name]} cannot read {place.theirs}: {one_line(error, 400)}; download or convert it again"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = sorted(map(str, info.get(what) or ()))
        found = [key for key in found if not key.startswith(("lm_head", "model.lm_head"))]
        if what == "missing_keys":
            found = [key for key in found if not any(re.fullmatch(p, key) for p in place.component.network.dropped)]
        if found:
            raise CheckpointError(
                f"{_CLASSES[name]} reports {what.replace('_', ' ')} in {place.theirs}: {first_few(found, 'tensors')}; "
                "download or convert it again"
            )
    if name == "Gemma3ForConditionalGeneration":
        model = model.model.language_model  # no text passes through its image tower
    _fill_left_out(model, place.component.network.dropped)
    model = model.eval()
    if fp16_saturation:
        saturate(model)
    return model


def _fill_left_out(model: Any, patterns: tuple[str, ...]) -> None:
    """Zeros for the weights of a part that an import has left out: it has no influence on ours, and is run with it."""
    import torch

    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and any(re.fullmatch(pattern, name) for pattern in patterns):
            owner, _, own = name.rpartition(".")
            zeros = torch.nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False)
            setattr(model.get_submodule(owner), own, zeros)


def saturate(model: Any) -> None:
    """Clips what linear attention gives to float16's range, as PyTorch does where it computes in float16."""
    for name, module in model.named_modules():
        if name.endswith(".attn1"):
            module.register_forward_hook(lambda module, args, output: output.clip(-_LARGEST_FLOAT16, _LARGEST_FLOAT16))


def load_ours(place: Place, dtype: Any) -> PyTree:
    """Our parameters in ``dtype``, read as the pipelines read them, or by the rules from where they do not."""
    network = place.component.network
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), network.abstract)
    if place.ours is None:

        def put(array: np.ndarray, leaf: Any) -> jax.Array:
            return jax.device_put(array.astype(leaf.dtype, copy=False))

        return read_params(place.component.source, network.rules, abstract, ignored=network.ignored, place=put)
    return open_component(
        place.ours, network.rules, abstract, stem=network.stem, variant=place.variant, ignored=network.ignored
    ).params


def collect() -> None:
    """Gives memory back between components."""
    gc.collect()
