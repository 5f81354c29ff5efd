"""The networks of a model: their inputs, where both sides are listened to, and how both are called."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.families import Network
from convert.verify.taps import Tap, layer_taps
from sana_jax.weights.rules import places

_CAPTION_TOKENS = 24
WORLD_MODEL = "SanaWMTransformer3DModel"
_LTX2 = ("SanaWMLTX2RefinerTransformer3DModel", "LTX2VideoTransformer3DModel")

WHOLE, EXACT, PIXELS_KIND = "whole", "exact", "pixels"


class Inputs(NamedTuple):
    """What the user chooses: pixels, how many of them one latent pixel stands for, the seed of everything random."""

    height: int
    width: int
    factor: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Pass:
    """One network, as both sides run it.

    Attributes:
        taps: where they are listened to.
        theirs: (PyTorch's network, its dtype) -> results in our layout, by name.
        ours: (our parameters, dtype) -> the same; under ``jax.jit`` what the pipelines run.
        compiled: whether to compare that too; where a ``Whole`` does, it is not needed.
    """

    taps: tuple[Tap, ...]
    theirs: Callable[[Any, Any], dict[str, np.ndarray]]
    ours: Callable[[Any, Any], dict[str, Any]]
    compiled: bool = True


@dataclasses.dataclass(frozen=True)
class Whole:
    """Something that a component does as a whole, for the user.

    Attributes:
        kinds: name -> ``whole`` (relative error), ``exact`` (equal numbers) or ``pixels`` (largest difference).
        theirs: (PyTorch's network, its dtype) -> arrays by name.
        ours: (our parameters, dtype, a function that prints a line) -> the same.
    """

    kinds: dict[str, str]
    theirs: Callable[[Any, Any], dict[str, np.ndarray]]
    ours: Callable[[Any, Any, Callable[[str], None]], dict[str, np.ndarray]]


def to_torch(array: np.ndarray, dtype: Any = None) -> Any:
    """An array as a tensor; floating-point ones in ``dtype``."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def from_torch(tensor: Any) -> np.ndarray:
    """A tensor as an array, float32 if it is floating-point."""
    import torch

    tensor = tensor.detach()
    return (tensor.to(torch.float32) if tensor.is_floating_point() else tensor).numpy()


def first(array: np.ndarray) -> np.ndarray:
    """Channels-last pictures (B, H, W, C) as PyTorch has them."""
    return array.transpose(0, 3, 1, 2)


def last(array: np.ndarray) -> np.ndarray:
    """The inverse of ``first``."""
    return array.transpose(0, 2, 3, 1)


def normal(seed: int, *names_and_shape: Any) -> np.ndarray:
    """Unit normal numbers of a shape, a function of the seed and a name: ``normal(seed, "latents", 2, 3)``."""
    name, *shape = names_and_shape
    generator = np.random.default_rng([seed, *name.encode()])
    return generator.standard_normal(shape).astype(np.float32)


# -- transformer and ControlNet --------------------------------------------------------------------------------------


def _before_blocks() -> Iterator[Tap]:
    yield Tap("time_embed", "time_embed", ("time_embed",), select=(1, 0), names=("embedding", "six modulations"))
    yield Tap("caption_projection", "caption_projection", ("caption_projection",))
    yield Tap("caption_norm", "caption_norm", ("caption_norm",))


def blocks_taps(
    layers: int, positions: bool, *, patches: str = "patch_embed", channels_first: bool = True
) -> Iterator[Tap]:
    """Taps of blocks with two attentions and a feed-forward network, as most of the family's transformers have them."""
    for layer in range(layers):
        name = f"transformer_blocks.{layer}"
        at = functools.partial(Tap, call=layer)
        if layer == 0:
            told = "with positions" if positions else "tokens"
            yield at(f"{patches}: {told}", name, ("transformer_blocks",), of_input=True)
        attn1, ff = ("transformer_blocks", "attn1"), ("transformer_blocks", "ff")
        yield at(f"{name}: norm and modulation before attn1", f"{name}.attn1", attn1, of_input=True)
        yield at(f"{name}.attn1", f"{name}.attn1", attn1)
        yield at(f"{name}.attn2", f"{name}.attn2", ("transformer_blocks", "attn2"))
        for attention in ("attn1", "attn2"):
            path = ("transformer_blocks", attention, "to_out")
            told = f"{name}.{attention}: attention itself"
            yield at(told, f"{name}.{attention}.to_out.0", path, of_input=True, detail=True)
        told = f"{name}: norm and modulation before ff"
        yield at(told, f"{name}.ff", ff, of_input=True, channels_first=channels_first)
        yield at(f"{name}.ff", f"{name}.ff", ff, channels_first=channels_first)
        yield at(name, name, ("transformer_blocks",))


def draw_caption(config: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A caption of all tokens and one that ends early."""
    mask = np.ones((2, _CAPTION_TOKENS), np.int32)
    mask[0, _CAPTION_TOKENS // 3 :] = 0
    return normal(seed, "caption", 2, _CAPTION_TOKENS, config.caption_channels), mask


def latent_size(inputs: Inputs) -> tuple[int, int]:
    """Rows and columns of latent pixels."""
    return inputs.height // inputs.factor, inputs.width // inputs.factor


def transformer_passes(network: Network, inputs: Inputs, fp16_saturation: bool) -> tuple[list[Pass], list[Whole]]:
    """SANA, SANA-1.5, SANA-Sprint: two pictures, two times, two captions of which one has padding."""
    from sana_jax.models.sana import SanaTransformer

    config = network.config
    latents = normal(inputs.seed, "latents", 2, *latent_size(inputs), config.in_channels)
    caption, mask = draw_caption(config, inputs.seed)
    sprint = config.guidance_embeds
    # The times at which the pipelines run: 0 to 1000 times the factor, or Sprint's noise level.
    time = np.array([0.98, 0.3], np.float32) if sprint else np.array([999.0, 412.5], np.float32) * config.timestep_scale
    time = time.astype(np.float32)
    guidance = np.array([4.5, 2.0], np.float32) * np.float32(config.guidance_embeds_scale) if sprint else None

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        given = {} if guidance is None else {"guidance": to_torch(guidance, dtype)}
        out = model(
            hidden_states=to_torch(first(latents), dtype),
            encoder_hidden_states=to_torch(caption, dtype),
            encoder_attention_mask=to_torch(mask),
            timestep=to_torch(time),
            return_dict=False,
            **given,
        )[0]
        return {"output": last(from_torch(out))}

    def ours(params: Any, dtype: Any) -> dict[str, Any]:
        network = SanaTransformer(config, dtype=dtype, fp16_saturation=fp16_saturation)
        out = network.apply(
            {"params": params},
            jnp.asarray(latents, dtype),
            jnp.asarray(caption, dtype),
            jnp.asarray(time),
            None if guidance is None else jnp.asarray(guidance),
            encoder_attention_mask=jnp.asarray(mask),
        )
        return {"output": out}

    taps = (
        *_before_blocks(),
        *blocks_taps(config.num_layers, config.interpolation_scale is not None),
        Tap("norm_out", "proj_out", ("proj_out",), of_input=True),
        Tap("proj_out", "proj_out", ("proj_out",)),
    )
    return [Pass(taps, theirs, ours)], []


def video_transformer_passes(network: Network, inputs: Inputs, fp16_saturation: bool) -> tuple[list[Pass], list[Whole]]:
    """SANA-Video: two videos of three latent frames, a time for each frame, two captions of which one has padding."""
    from sana_jax.models.sana_video import SanaVideoTransformer

    config, frames = network.config, 3
    size = latent_size(inputs)
    latents = normal(inputs.seed, "latents", 2, frames, *size, config.in_channels)
    caption, mask = draw_caption(config, inputs.seed)
    # the first frame of the second video is clean, as in image-to-video
    time = np.array([[999.0] * frames, [0.0] + [412.5] * (frames - 1)], np.float32)
    tokens = (size[0] // config.patch_size[1]) * (size[1] // config.patch_size[2])

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        out = model(
            hidden_states=to_torch(np.moveaxis(latents, -1, 1), dtype),
            encoder_hidden_states=to_torch(caption, dtype),
            encoder_attention_mask=to_torch(mask),
            timestep=to_torch(np.repeat(time, tokens, axis=1)),
            return_dict=False,
        )[0]
        return {"output": np.moveaxis(from_torch(out), 1, -1)}

    def ours(params: Any, dtype: Any) -> dict[str, Any]:
        out = SanaVideoTransformer(config, dtype=dtype).apply(
            {"params": params},
            jnp.asarray(latents, dtype),
            jnp.asarray(caption, dtype),
            jnp.asarray(time),
            jnp.asarray(mask),
        )
        return {"output": out}

    # PyTorch embeds a frame's time once for each of its tokens, so the embedder's results are not compared one by one;
    # the modulation is, where it is used.
    taps = (
        *(tap for tap in _before_blocks() if tap.module != "time_embed"),
        *blocks_taps(config.num_layers, False, patches="patch_embedding", channels_first=False),
        Tap("norm_out", "proj_out", ("proj_out",), of_input=True),
        Tap("proj_out", "proj_out", ("proj_out",)),
    )
    return [Pass(taps, theirs, ours)], []


def controlnet_passes(network: Network, inputs: Inputs, fp16_saturation: bool) -> tuple[list[Pass], list[Whole]]:
    """A ControlNet: as the transformer, and a control picture's latent."""
    from sana_jax.models.controlnet import SanaControlNet

    config = network.config
    size = (2, *latent_size(inputs), config.in_channels)
    latents, control = normal(inputs.seed, "latents", *size), normal(inputs.seed, "control", *size)
    caption, mask = draw_caption(config, inputs.seed)
    time = np.array([999.0, 412.5], np.float32)

    def name(layer: int) -> str:
        return f"controlnet_blocks.{layer}: residual"

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        out = model(
            hidden_states=to_torch(first(latents), dtype),
            controlnet_cond=to_torch(first(control), dtype),
            encoder_hidden_states=to_torch(caption, dtype),
            encoder_attention_mask=to_torch(mask),
            timestep=to_torch(time),
            return_dict=False,
        )[0]
        return {name(layer): from_torch(residual) for layer, residual in enumerate(out)}

    def ours(params: Any, dtype: Any) -> dict[str, Any]:
        out = SanaControlNet(config, dtype=dtype, fp16_saturation=fp16_saturation).apply(
            {"params": params},
            jnp.asarray(latents, dtype),
            jnp.asarray(control, dtype),
            jnp.asarray(caption, dtype),
            jnp.asarray(time),
            encoder_attention_mask=jnp.asarray(mask),
        )
        return {name(layer): out[layer] for layer in range(config.num_layers)}

    taps = (
        Tap("input_block", "input_block", ("input_block",)),
        *_before_blocks(),
        *blocks_taps(config.num_layers, config.interpolation_scale is not None),
    )
    return [Pass(taps, theirs, ours)], []


# -- autoencoder -----------------------------------------------------------------------------------------------------


def autoencoder_passes(network: Network, inputs: Inputs, fp16_saturation: bool) -> tuple[list[Pass], list[Whole]]:
    """DC-AE: encoder and decoder block by block, then encoding and decoding as the pipelines do them."""
    from sana_jax.autoencoders.dc_ae import DCDecoder, DCEncoder
    from sana_jax.autoencoders.dc_autoencoder import DCAutoencoder

    config = network.config
    factor = config.spatial_factor
    picture = smooth_picture(inputs, config.in_channels)[None]
    latents = normal(inputs.seed, "latents", 1, inputs.height // factor, inputs.width // factor, config.latent_channels)

    def encode(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        return {"encoder: output": last(from_torch(model.encoder(to_torch(first(picture), dtype))))}

    def decode(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        return {"decoder: output": last(from_torch(model.decoder(to_torch(first(latents), dtype))))}

    def our_encode(params: Any, dtype: Any) -> dict[str, Any]:
        return {"encoder: output": DCEncoder(config, dtype).apply({"params": params["encoder"]}, jnp.asarray(picture))}

    def our_decode(params: Any, dtype: Any) -> dict[str, Any]:
        return {"decoder: output": DCDecoder(config, dtype).apply({"params": params["decoder"]}, jnp.asarray(latents))}

    def whole(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        scale = model.config.scaling_factor
        encoded = model.encode(to_torch(first(picture), dtype), return_dict=False)[0] * scale
        decoded = model.decode(to_torch(first(latents), dtype) / scale, return_dict=False)[0]
        return {"encode a picture": last(from_torch(encoded)), "decode a latent": _pixels(last(from_torch(decoded)))}

    def our_whole(params: Any, dtype: Any, say: Callable[[str], None]) -> dict[str, np.ndarray]:
        autoencoder = DCAutoencoder.from_params(config, params, dtype, say=say)
        decoded = np.asarray(autoencoder.decode(latents))
        return {"encode a picture": np.asarray(autoencoder.encode(picture)), "decode a latent": _pixels(decoded)}

    kinds = {"encode a picture": WHOLE, "decode a latent": PIXELS_KIND}
    passes = [
        Pass(tuple(_stages(network, "encoder", "down_blocks")), encode, our_encode, compiled=False),
        Pass(tuple(_stages(network, "decoder", "up_blocks")), decode, our_decode, compiled=False),
    ]
    return passes, [Whole(kinds, whole, our_whole)]


def video_autoencoder_passes(network: Network, inputs: Inputs, fp16_saturation: bool) -> tuple[list[Pass], list[Whole]]:
    """Wan and LTX-2: encoding and decoding as the pipelines do them. Modules are not compared one by one.

    PyTorch's Wan takes one latent frame after another, so that its modules are called once for each and ours once for
    all.
    """
    from sana_jax.autoencoders import LTX2VideoAutoencoder, WanAutoencoder

    config = network.config
    kind = WanAutoencoder if network.class_name == WanAutoencoder.class_name else LTX2VideoAutoencoder
    picture = smooth_picture(inputs, config.in_channels)
    # a picture that moves to the right
    frames = 1 + 2 * config.temporal_factor
    video = np.stack([np.roll(picture, 2 * frame, 1) for frame in range(frames)])[None]
    size = (inputs.height // config.spatial_factor, inputs.width // config.spatial_factor)
    latents = normal(inputs.seed, "latents", 1, 3, *size, config.latent_channels)

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        import torch

        # Wan's are in its configuration, LTX-2's among its tensors.
        known = model if kind is LTX2VideoAutoencoder else config
        mean, std = (
            torch.as_tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1)
            for values in (known.latents_mean, known.latents_std)
        )
        std = std / getattr(config, "scaling_factor", 1.0)
        mode = model.encode(to_torch(np.moveaxis(video, -1, 1), dtype)).latent_dist.mode()
        encoded = (mode.to(torch.float32) - mean) * (1.0 / std)
        scaled = to_torch(np.moveaxis(latents, -1, 1)) / (1.0 / std) + mean
        decoded = model.decode(scaled.to(dtype), return_dict=False)[0]
        encoded, decoded = (np.moveaxis(from_torch(tensor), 1, -1) for tensor in (encoded, decoded))
        return {"encode a video": encoded, "decode latents": _pixels(decoded)}

    def ours(params: Any, dtype: Any, say: Callable[[str], None]) -> dict[str, np.ndarray]:
        autoencoder = kind.from_params(config, params, dtype, say=say)
        decoded = np.asarray(autoencoder.decode(latents))
        return {"encode a video": np.asarray(autoencoder.encode(video)), "decode latents": _pixels(decoded)}

    return [], [Whole({"encode a video": WHOLE, "decode latents": PIXELS_KIND}, theirs, ours)]


def _pixels(decoded: np.ndarray) -> np.ndarray:
    return np.clip(decoded / 2 + 0.5, 0, 1)


def _stages(network: Network, half: str, blocks: str) -> Iterator[Tap]:
    def tap(path: str, module: str, channels_first: bool = True, **more: Any) -> Tap:
        return Tap(f"{half}.{module}", f"{half}.{module}", (path,), channels_first=channels_first, **more)

    yield tap("conv_in", "conv_in")
    own = network.abstract[half]
    numbers = [tuple(map(int, name.split("_")[-2:])) for name in own if name.startswith(blocks)]
    for i, j in sorted(numbers):
        name, block = f"{half}.{blocks}.{i}.{j}", own[f"{blocks}_{i}_{j}"]
        yield tap(f"{blocks}_{i}_{j}", f"{blocks}.{i}.{j}")
        if "attn" in block:
            path = (f"{blocks}_{i}_{j}", "attn", "to_out")
            yield Tap(f"{name}.attn: attention itself", f"{name}.attn.to_out", path, of_input=True, detail=True)
    if half == "decoder":
        yield tap("norm_out", "norm_out", False)
    yield tap("conv_out", "conv_out")


def smooth_picture(inputs: Inputs, channels: int = 3) -> np.ndarray:
    """A picture (H, W, channels) in [-1, 1] with something on every scale."""
    small = np.random.default_rng([inputs.seed, 7]).uniform(-1, 1, (5, 6, channels))
    rows = np.linspace(0, 3.999, inputs.height)
    columns = np.linspace(0, 4.999, inputs.width)

    def mix(array: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
        low = at.astype(int)
        weight = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        return np.take(array, low, axis) * (1 - weight) + np.take(array, low + 1, axis) * weight

    return mix(mix(small, rows, 0), columns, 1).astype(np.float32)


# -- text encoder ----------------------------------------------------------------------------------------------------


def text_encoder_passes(network: Network, inputs: Inputs, fp16_saturation: bool) -> tuple[list[Pass], list[Whole]]:
    """Gemma-2 and Gemma-3: two rows of tokens, of which one ends early."""
    from sana_jax.models.gemma import Gemma

    config = network.config
    ids = np.random.default_rng([inputs.seed, 3]).integers(0, config.vocab_size, (2, _CAPTION_TOKENS)).astype(np.int32)
    mask = np.ones_like(ids)
    kept = _CAPTION_TOKENS - 4  # every token of the padding still sees some of the text, in a window too
    mask[0, kept:] = 0

    def rows(states: np.ndarray) -> dict[str, np.ndarray]:
        # what padding gives is of no consequence
        return {"hidden states": np.concatenate([states[0, :kept], states[1]])}

    def theirs(model: Any, dtype: Any) -> dict[str, np.ndarray]:
        out = model(input_ids=to_torch(ids.astype(np.int64)), attention_mask=to_torch(mask), use_cache=False)
        return rows(from_torch(out[0]))

    def ours(params: Any, dtype: Any) -> dict[str, Any]:
        out = Gemma(config, dtype=dtype).apply({"params": params}, jnp.asarray(ids), jnp.asarray(mask))
        return {"hidden states": jnp.concatenate([out[0, :kept], out[1]])}

    return [Pass(tuple(_gemma_taps(config.num_hidden_layers)), theirs, ours)], []


def _gemma_taps(layers: int) -> Iterator[Tap]:
    for layer in range(layers):
        name, at = f"layers.{layer}", functools.partial(Tap, call=layer)
        if layer == 0:
            yield at("embed_tokens", name, ("layers",), of_input=True)
        for part in ("self_attn", "mlp"):
            yield at(f"{name}.{part}", f"{name}.{part}", ("layers", part))
        path = ("layers", "self_attn", "o_proj")
        yield at(f"{name}.self_attn: attention itself", f"{name}.self_attn.o_proj", path, of_input=True, detail=True)
        yield at(name, name, ("layers",))
    yield Tap("norm", "norm", ("norm",))


# -- all -------------------------------------------------------------------------------------------------------------


def with_layers(run: Pass, network: Network, model: Any, prefix: str = "") -> tuple[Tap, ...]:
    """A pass's taps and, within them, one for every layer with weights."""
    tensors = {name.removeprefix(prefix): place for name, place in places(network.rules, network.abstract).items()}
    names = {tap.module for tap in run.taps if not tap.of_input}
    halves = [half for half in ("encoder", "decoder") if run.taps[0].module.startswith(f"{half}.")]
    inside = (halves[0],) if halves else ()
    # A ControlNet's last layers are mapped, not called one by one; what they give is the network's result.
    own = [tap for tap in layer_taps(tensors, model, inside) if tap.path != ("controlnet_blocks",)]
    if network.class_name == "SanaVideoTransformer3DModel":
        own = [tap for tap in own if tap.path[0] != "time_embed"]  # once for each frame, and for each token there
    if network.class_name == WORLD_MODEL:
        return run.taps  # its two stacks are called in turn, under names that do not tell them apart
    if network.class_name in _LTX2:
        own = [tap for tap in own if tap.path[0] != "time_embed"]
    if network.class_name.startswith("Gemma3"):
        own = [tap for tap in own if tap.path[-1] not in ("q_norm", "k_norm")]  # heads before tokens there
    layers = [tap for tap in own if tap.module not in names]
    return (*run.taps, *layers)


def by_layer(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Results as float32 arrays."""
    return {name: np.asarray(value, np.float32) for name, value in jax.device_get(values).items()}
