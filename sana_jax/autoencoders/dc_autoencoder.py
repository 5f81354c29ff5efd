"""The deep-compression autoencoder as pipelines use it: weights on disk, compiled per shape, in tiles if large."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.typing import Array, Float, PyTree
from sana_jax.autoencoders.dc_ae import DCDecoder, DCEncoder, check_input, init_params
from sana_jax.autoencoders.dc_ae_config import CLASS_NAME, DCAEConfig
from sana_jax.autoencoders.tiling import Tiles, tiled_decode, tiled_encode
from sana_jax.compilation import compile_ahead
from sana_jax.component_config import load_from_config
from sana_jax.dtypes import parse_dtype
from sana_jax.weights.components import Resident, open_component
from sana_jax.weights.tables.dc_ae import NOT_PARAMETERS, dc_ae_rules

_FLOAT16 = {"float16": "DC-AE's activations pass its largest number, 65504, and give NaN"}
# Pixels of the pictures that go through the networks at once; larger ones are cut into tiles. By the compiler's own
# analysis of f32c32 in float32, activations of 2048x2048 pixels take 8.6 GB when decoded and 5.3 GB when encoded, and
# four times that at 4096x4096, which few devices have.
LARGEST_UNTILED = 2048 * 2048


class DCAutoencoder:
    """Pictures to latents of about unit variance, and back.

    Weights are read at the first ``encode`` or ``decode`` and dropped by ``free``. Every shape is compiled once and
    kept. Pictures of more than 2048x2048 pixels go tile by tile: decoding one with f32c32 in float32 would need 8.6 GB
    beside the weights, and 34 GB at 4096x4096 (the compiler's own analysis); a tile of 512x512 needs 0.54 GB. A batch
    that has more pixels than that altogether goes picture by picture.

    Args:
        config: the shape.
        weights: parameters ``{"encoder": ..., "decoder": ...}``.
        dtype: compute dtype, float32 or bfloat16; pictures and latents are float32 outside.
        tiling: True cuts whatever is larger than a tile, False never cuts, None decides by size.
        tiles: how to cut; None for tiles of 512 pixels that overlap by 64.
        say: prints a line: what is being compiled, and that tiling has set in.

    Raises:
        UserError: another dtype.
    """

    def __init__(
        self,
        config: DCAEConfig,
        weights: Resident,
        dtype: Any = jnp.float32,
        *,
        tiling: bool | None = None,
        tiles: Tiles | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.config = config
        self.weights = weights
        self.dtype = jnp.dtype(parse_dtype(dtype, "autoencoder dtype", _FLOAT16))
        self.tiling = tiling
        self.tiles = Tiles.for_factor(config.spatial_factor) if tiles is None else tiles
        self.programs: dict[tuple[str, tuple[int, ...]], jax.stages.Compiled] = {}
        self._say = say

    @classmethod
    def from_params(cls, config: DCAEConfig, params: PyTree, dtype: Any = jnp.float32, **options: Any) -> DCAutoencoder:
        """An autoencoder of parameters that are there already, of any dtype; options as in the constructor."""
        return cls(config, Resident.of("vae", params), dtype, **options)

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike[str], *, dtype: Any = None, variant: str | None = None, **options: Any
    ) -> DCAutoencoder:
        """A model directory's ``vae``, published or converted; names and shapes are compared, weights read later.

        Args:
            directory: with ``config.json`` and the weights.
            dtype: of computation and of the parameters; None for float32.
            variant: ``bf16``, ... of published weights.
            options: as in the constructor.

        Raises:
            FileNotFoundError: no ``config.json`` or no weights.
            UserError: a configuration of another class or with other fields, or a dtype that is not allowed.
            CheckpointError: weights that do not fit or are damaged.
        """

        def load(values: dict[str, Any]) -> DCAutoencoder:
            config = DCAEConfig.from_dict(values)
            wanted = jnp.dtype(parse_dtype(jnp.float32 if dtype is None else dtype, "autoencoder dtype", _FLOAT16))
            abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wanted), abstract)
            rules = dc_ae_rules(config)
            weights = open_component(directory, rules, abstract, variant=variant, ignored=NOT_PARAMETERS)
            return cls(config, weights, wanted, **options)

        return load_from_config(directory, {CLASS_NAME: load})

    @property
    def spatial_factor(self) -> int:
        """Picture rows that one latent row stands for."""
        return self.config.spatial_factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.config.latent_channels

    @property
    def image_channels(self) -> int:
        """Channels of the pictures."""
        return self.config.in_channels

    def to_config(self) -> dict[str, Any]:
        """What ``vae/config.json`` holds."""
        return self.config.to_dict()

    def free(self) -> None:
        """Drops the weights; the next ``encode`` or ``decode`` reads them again."""
        self.weights.free()

    def encode(self, images: Float[Array, "B H W P"], *, tiling: bool | None = None) -> Float[Array, "B h w C"]:
        """Pictures in [-1, 1] to latents, times the scaling factor.

        Args:
            images: height and width are multiples of ``spatial_factor``.
            tiling: overrides the autoencoder's own setting.

        Raises:
            UserError: sizes or channels that the network does not take.
        """
        check_input("images", images, self.image_channels, self.spatial_factor)
        run = functools.partial(self._run, "encode")
        if not self._tiles_set_in("encoding", *images.shape[1:3], tiling):
            return self._in_memory(run, images, images.shape)
        return jnp.asarray(tiled_encode(run, images, self.spatial_factor, self.tiles))

    def decode(self, latents: Float[Array, "B h w C"], *, tiling: bool | None = None) -> Float[Array, "B H W P"]:
        """Latents to pictures around [-1, 1], not clamped.

        Args:
            latents: as ``encode`` gives them, of any height and width.
            tiling: overrides the autoencoder's own setting.

        Raises:
            UserError: another number of axes or channels.
        """
        check_input("latents", latents, self.latent_channels, 1)
        run = functools.partial(self._run, "decode")
        batch, *size, _ = latents.shape
        height, width = (length * self.spatial_factor for length in size)
        if not self._tiles_set_in("decoding", height, width, tiling):
            return self._in_memory(run, latents, (batch, height, width))
        return jnp.asarray(tiled_decode(run, latents, self.spatial_factor, self.tiles))

    def _tiles_set_in(self, what: str, height: int, width: int, tiling: bool | None) -> bool:
        tiling = self.tiling if tiling is None else tiling
        if tiling is None:
            tiling = height * width > LARGEST_UNTILED
        if not tiling or not self.tiles.cut(height, width):
            return False
        self._say(self.tiles.announcement(what, height, width))
        return True

    def _in_memory(self, run: Callable[[Array], Array], x: Array, shape: tuple[int, ...]) -> Array:
        """Runs a batch at once, or picture by picture if it has too many pixels altogether; the result is the same."""
        batch, height, width = shape[:3]
        if batch == 1 or batch * height * width <= LARGEST_UNTILED:
            return run(x)
        return jnp.concatenate([run(x[i : i + 1]) for i in range(batch)])

    def _run(self, what: str, x: Array) -> Array:
        """Runs the compiled network on one batch of one shape."""
        x = jnp.asarray(x, jnp.float32)
        half = self.weights.params["encoder" if what == "encode" else "decoder"]
        key = (what, x.shape)
        if key not in self.programs:
            shape = "x".join(map(str, x.shape))
            self.programs[key] = compile_ahead(
                f"DC-AE {what} of {shape}, {self.dtype.name}",
                self._functions[what],
                half,
                x,
                say=self._say,
                identity=(what, self.config, self.dtype),
            )
        return self.programs[key](half, x)

    @functools.cached_property
    def _functions(self) -> dict[str, Callable[[PyTree, Array], Array]]:
        encoder, decoder = DCEncoder(self.config, self.dtype), DCDecoder(self.config, self.dtype)
        scale = self.config.scaling_factor

        def encode(params: PyTree, images: Array) -> Array:
            return encoder.apply({"params": params}, images).astype(jnp.float32) * scale

        def decode(params: PyTree, latents: Array) -> Array:
            return decoder.apply({"params": params}, latents / scale).astype(jnp.float32)

        return {"encode": jax.jit(encode), "decode": jax.jit(decode)}
