"""SigLIP as an image encoder: pictures in, one vector each out, or one vector per patch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import Array, Float
from sana_jax.compilation import compile_ahead
from sana_jax.component_config import load_from_config
from sana_jax.dtypes import parse_dtype
from sana_jax.errors import UserError
from sana_jax.image_encoders.preprocessing import Preprocessing
from sana_jax.models.siglip import VISION_MODEL, WHOLE_MODEL, SiglipVision, SiglipVisionConfig, init_params
from sana_jax.weights.components import CONVERTED, TRANSFORMERS_STEM, Resident, open_component
from sana_jax.weights.identity import weights_id
from sana_jax.weights.safetensors_files import SafetensorsSource, find_weights_file
from sana_jax.weights.tables.siglip import IGNORED, PREFIX, name_prefix, siglip_rules
from sana_jax.weights.trees import abstract_tree

Features = Literal["pooled", "patches"]
_SMALLEST_NORM = 1e-12  # a vector of nothing but zeros stays one


@dataclasses.dataclass(frozen=True)
class SiglipImageEncoder:
    """Embeds pictures with SigLIP's vision tower.

    Change a field with ``dataclasses.replace``; weights and compiled programs are shared with the original.

    Attributes:
        config: the network's shape.
        preprocessing: what is done to a picture first.
        weights: the network's parameters, read when the first picture comes.
        weights_id: a short name for the weights' bytes.
        dtype: ``float32`` or ``bfloat16``, of parameters and computation.
        features: ``pooled``, the picture's one vector; or ``patches``, one for each patch after the last norm.
        normalize: whether each vector is divided by its length.
        batch_size: pictures that go through the network at once.
        say: prints a line.

    Raises:
        UserError: a value that is not allowed, or pooled features of a tower without the head.
    """

    config: SiglipVisionConfig
    preprocessing: Preprocessing
    weights: Resident
    weights_id: str
    dtype: Any = jnp.float32
    features: Features = "pooled"
    normalize: bool = False
    batch_size: int = 16
    say: Callable[[str], None] = print
    _compiled: dict[Any, Callable[[Any, np.ndarray], Any]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", parse_dtype(self.dtype, "image encoder dtype"))
        if self.features not in ("pooled", "patches"):
            raise UserError(f"image features {self.features!r} are not allowed; choose pooled or patches")
        if self.features == "pooled" and not self.config.vision_use_head:
            raise UserError("pooled features need vision_use_head, which this image encoder lacks; choose patches")
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size!r} of the image encoder is not allowed; choose 1 or more")

    @classmethod
    def from_directory(
        cls,
        directory: str | os.PathLike[str],
        *,
        dtype: Any = "float32",
        features: Features = "pooled",
        normalize: bool = False,
        batch_size: int = 16,
        say: Callable[[str], None] = print,
    ) -> SiglipImageEncoder:
        """The image encoder of a published or converted SigLIP, or of its vision tower alone; weights are read later.

        Args:
            directory: with ``config.json``, ``preprocessor_config.json`` and the weights.
            dtype: ``"float32"`` or ``"bfloat16"``.
            features: see the class.
            normalize: see the class.
            batch_size: see the class.
            say: prints a line.

        Raises:
            FileNotFoundError: a file is missing.
            UserError: a configuration is damaged or not SigLIP's, or a value is not allowed.
            CheckpointError: weights that are damaged or do not fit.
        """
        directory = Path(os.path.abspath(directory))
        kinds = dict.fromkeys((WHOLE_MODEL, VISION_MODEL, "siglip2"), SiglipVisionConfig.from_dict)
        config = load_from_config(directory, kinds)
        dtype = parse_dtype(dtype, "image encoder dtype")
        prefix = PREFIX
        if not (directory / CONVERTED).is_dir():
            prefix = name_prefix(SafetensorsSource(find_weights_file(directory, TRANSFORMERS_STEM)).tensors)
        shapes = jax.eval_shape(lambda key: init_params(SiglipVision(config), key), jax.random.key(0))
        rules, abstract = siglip_rules(config, prefix), abstract_tree(shapes, dtype)
        weights = open_component(directory, rules, abstract, stem=TRANSFORMERS_STEM, ignored=IGNORED)
        preprocessing = Preprocessing.from_directory(directory)
        sizes = (preprocessing.height, preprocessing.width)
        if sizes not in ((None, None), (config.image_size, config.image_size)):
            raise UserError(
                f"{directory}: preprocessor_config.json resizes to {sizes[0]}x{sizes[1]} pixels and the network takes "
                f"{config.image_size}x{config.image_size}; take both files from one model"
            )
        return cls(config, preprocessing, weights, weights_id(directory), dtype, features, normalize, batch_size, say)

    @property
    def embedding_dim(self) -> int:
        """D, the size of a vector."""
        return self.config.hidden_size

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one picture's features: (D,) or (patches, D)."""
        return (self.embedding_dim,) if self.features == "pooled" else (self.config.num_patches, self.embedding_dim)

    @property
    def id(self) -> str:
        """Changes with everything that changes the result: for the keys of caches, and to compare encoders by."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:12]

    def describe(self) -> dict[str, Any]:
        """Everything that changes the result, as JSON-able values."""
        return {
            "class": "SiglipVisionModel",
            "weights": self.weights_id,
            "config": dataclasses.asdict(self.config),
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "dtype": jnp.dtype(self.dtype).name,
            "features": self.features,
            "normalize": self.normalize,
        }

    def encode(self, pictures: Sequence[Any] | Any) -> Float[np.ndarray, "B *shape"]:
        """Features of pictures, (B, D) or (B, patches, D), float32.

        Args:
            pictures: a list of files, PIL images or arrays (H, W, 3), or an array (B, H, W, 3), of any sizes.

        Raises:
            FileNotFoundError, UserError: no pictures, or one that can't be read.
        """
        if isinstance(pictures, str | os.PathLike) or not hasattr(pictures, "__len__"):
            pictures = [pictures]
        if not len(pictures):
            raise UserError("no pictures to encode; give one or more")
        features = []
        for begin in range(0, len(pictures), self.batch_size):
            ready = self.preprocessing(pictures[begin : begin + self.batch_size])
            # A last part that is smaller is filled up, so that one program does.
            size = self.batch_size if len(pictures) > self.batch_size else len(ready)
            filled = np.concatenate([ready, np.zeros((size - len(ready), *ready.shape[1:]), np.float32)])
            features.append(np.asarray(self._program(filled.shape)(self.weights.params, filled))[: len(ready)])
        return np.concatenate(features)

    def free(self) -> None:
        """Lets go of the weights; the next picture reads them again."""
        self.weights.free()

    def _program(self, shape: tuple[int, ...]) -> Callable[[Any, np.ndarray], Float[Array, "B *shape"]]:
        # Instances that differ in these share the dictionary.
        key = (shape, jnp.dtype(self.dtype).name, self.features, self.normalize)
        if key not in self._compiled:
            network = SiglipVision(self.config, dtype=self.dtype)

            def run(params, pictures):
                seen = network.apply({"params": params}, pictures.astype(self.dtype))
                vectors = (seen.pooled if self.features == "pooled" else seen.patches).astype(jnp.float32)
                return normalized(vectors) if self.normalize else vectors

            count = shape[0]
            name = f"the image encoder for {count} picture{'s' if count > 1 else ''} of {shape[1]}x{shape[2]}"
            pictures = jax.ShapeDtypeStruct(shape, jnp.float32)
            self._compiled[key] = compile_ahead(
                name,
                jax.jit(run),
                self.weights.params,
                pictures,
                say=self.say,
                identity=(network, self.features, self.normalize),
            )
        return self._compiled[key]


def normalized(vectors: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors divided by their lengths."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), _SMALLEST_NORM)
