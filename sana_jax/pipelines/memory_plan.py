"""A memory budget to what keeps within it: residency, tiled decoding, split guidance and quantization.

Weights are counted by their shapes. What the computation takes beside them is estimated: by the tokens of the widest
layer while sampling, and by what the compiler's analysis gave for the autoencoders while decoding.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax

from kernels.typing import PyTree
from sana_jax.autoencoders.base import pixel_frames
from sana_jax.autoencoders.dc_autoencoder import LARGEST_UNTILED
from sana_jax.autoencoders.tiling import tile_starts
from sana_jax.compilation import readable_bytes
from sana_jax.diffusion.samplers import LongSanaSampler
from sana_jax.diffusion.samplers.world_refiner import BLOCK_FRAMES, WINDOW_FRAMES
from sana_jax.errors import UserError
from sana_jax.models.ltx2 import LTX2VideoTransformer
from sana_jax.models.sana_video import state_bytes
from sana_jax.pipelines.families import abstract_params
from sana_jax.pipelines.residency import Residency, check_residency
from sana_jax.pipelines.resolution import Binning, size_to_sample, video_size_to_sample
from sana_jax.quantization.choice import Quantization
from sana_jax.quantization.trees import quantizable_layers, quantized_abstract, stored_formats
from sana_jax.weights.components import Resident
from sana_jax.weights.streamed import StreamedResident
from sana_jax.weights.trees import tree_bytes

# Of the budget, for weights and activations: the rest is the driver's, the libraries' workspaces and fragmentation.
USABLE = 0.92
# What is tried where a stage does not fit: half the bytes of bfloat16, then less than a third.
LEVELS = ("int8", "nvfp4")
# By the compiler's analysis, in float32 (see the autoencoders): bytes per pixel when a picture or a whole clip is
# decoded at once, bytes per pixel and frame, and bytes for one tile; and of these, bytes per pixel of the state of a
# decoder that goes on with a video, for causal ones.
_DECODING = {
    "AutoencoderDC": (2050.0, 0.0, 0.54e9, 0.0),
    "AutoencoderKLWan": (22500.0, 0.0, 1.5e9, 9500.0),
    "AutoencoderKLLTX2Video": (0.0, 200.0, 5e9, 2200.0),
}
# Of the budget, for what is known of the refiner: the weights of one network, keys and values, what others hold; and
# where its transformer's blocks are stacked.
_REFINER_WEIGHTS, _REFINER_BLOCKS = 0.75, "transformer_blocks"
# Arrays of the width of the feed-forward network's middle and of the token stream that are alive together.
_WIDE_ARRAYS, _STREAM_ARRAYS = 2.0, 8.0


@dataclasses.dataclass(frozen=True)
class MemoryBudget:
    """A budget, and what it is to be enough for. None is the model's own.

    Attributes:
        memory: as ``parse_memory`` takes it.
        prompts: how many are read at once.
        samples: pictures or videos that are sampled at once.
        height: pixels.
        width: pixels.
        binning: what becomes of sizes that the model was not trained at.
        frames: of each video; one that is made block after block takes the same memory whatever their number.
        seconds: of each video, in place of ``frames``.
        fps: frames of a second, with ``seconds``.
        guidance_scale: above 1, the network sees every sample twice.
        perturbed: whether perturbed-attention guidance has it see each once more.
        batched: whether what guidance needs must go through the network at once, as with step caching.
        num_cached_blocks: how many blocks a block of LongSANA sees, 0 for all; the state grows with it.
    """

    memory: str
    prompts: int = 1
    samples: int = 1
    height: int | None = None
    width: int | None = None
    binning: Binning | None = None
    frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    guidance_scale: float | None = None
    perturbed: bool = False
    batched: bool = False
    num_cached_blocks: int | None = None


class Stage(NamedTuple):
    """Bytes of one stage: of all weights on the device, of the computation, and of what others hold of both."""

    name: str
    weights: int
    work: int
    unused: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.work


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a budget makes of a model.

    Attributes:
        budget: bytes of the device.
        residency: see ``sana_jax.pipelines.residency``.
        quantization: network -> how; networks that keep their dtype are not there.
        tiling: True where the decoder is to go tile by tile; None leaves it to its own limit.
        guidance_batching: ``split`` where prompt and negative prompt are to go one after another; else ``auto``.
        stages: what each takes.
        already: network -> format of those that were quantised before.
        asked: what it is to be enough for, in words.
    """

    budget: int
    residency: Residency
    quantization: Mapping[str, Quantization]
    tiling: Literal[True] | None
    guidance_batching: Literal["auto", "split"]
    stages: tuple[Stage, ...]
    already: Mapping[str, str] = dataclasses.field(default_factory=dict)
    asked: str = ""

    @property
    def peak(self) -> int:
        """The bytes of the largest stage."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the largest stage keeps within the part of the budget that can be used."""
        return self.peak <= USABLE * self.budget

    @property
    def for_sampling(self) -> int:
        """Bytes of the budget that the sampling program may hold beside what is not its own."""
        return self.budget - sum(stage.unused for stage in self.stages if stage.name == "denoise")

    def lines(self) -> list[str]:
        """The plan, one line each for the choices and for every stage."""
        already = [f"{network}={one} (as asked for or stored)" for network, one in self.already.items()]
        chosen = [f"{network}={one.format}" for network, one in self.quantization.items()]
        formats = ", ".join(already + chosen) or "none"
        tiled = "in tiles" if self.tiling else "as the autoencoder decides"
        return [
            f"memory plan for {readable_bytes(self.budget)}, {readable_bytes(USABLE * self.budget)} of it usable"
            f"{self.asked and '; '}{self.asked}: residency {self.residency}, quantization {formats}, "
            f"decoding {tiled}, guidance {self.guidance_batching}",
            *(
                f"memory plan: {name}: weights {readable_bytes(weights)}, computation about {readable_bytes(work)}"
                for name, weights, work, _ in self.stages
            ),
        ]

    def check_program(self, program_bytes: int | None, working_bytes: int | None, samples: int) -> None:
        """Refuses a sampling program that the budget is not enough for, before it runs.

        Args:
            program_bytes: what the compiler says that it holds, its weights included; None where it does not say.
            working_bytes: the same without its arguments.
            samples: how many it takes at once.

        Raises:
            UserError: it holds more; what is enough is named.
        """
        if program_bytes is None or program_bytes <= self.for_sampling:
            return
        unused = self.budget - self.for_sampling
        least = math.ceil((program_bytes + unused) / 1e8) / 10
        fewer = 0
        if working_bytes:
            fewer = int((self.for_sampling - program_bytes + working_bytes) / (working_bytes / samples))
        less = f"sample about {fewer} at once" if fewer >= 1 else "ask for a smaller size"
        beside = f", beside {readable_bytes(unused)} that others hold" if unused else ""
        raise UserError(
            f"memory {self.budget / 1e9:g}g is not enough: by the compiler's account, sampling {samples} at once holds "
            f"{readable_bytes(program_bytes)}{beside}; nothing was sampled: raise it to {least:g}g, or {less}"
        )

    def check(self, program_bytes: int | None = None, device: jax.Device | None = None) -> str:
        """A line that compares the plan with what happened.

        Args:
            program_bytes: what the compiler says that the sampling program holds; taken where the device keeps no
                account of its memory, as a CPU does not.
            device: this process's first by default.
        """
        device = jax.local_devices()[0] if device is None else device
        used = (device.memory_stats() or {}).get("peak_bytes_in_use")
        source = "the device reports" if used is not None else "the compiler reports for sampling"
        planned = self.peak
        if used is None:
            used = program_bytes
            planned = next((stage.total for stage in self.stages if stage.name == "denoise"), planned)
        if used is None:
            return "memory check: neither the device nor the compiler reports what was used"
        told = f"{source} {readable_bytes(used)} at most, planned were {readable_bytes(planned)}"
        if used > self.budget:
            return f"memory check: EXCEEDED the budget of {readable_bytes(self.budget)}: {told}"
        if used > planned:
            return f"memory check: more than planned, within the budget of {readable_bytes(self.budget)}: {told}"
        return f"memory check: kept: {told}"


def parse_memory(text: str) -> int:
    """Bytes of a budget like ``24g``: so many GB (10^9 bytes).

    Raises:
        UserError: another form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:g|gb)", str(text).strip().lower())
    if not found or float(found[1]) <= 0:
        raise UserError(f"memory {text!r} is not allowed; allowed are 24g, 16g, 12g or another number of GB, as in 10g")
    return int(float(found[1]) * 1e9)


def fit_memory(model: Any, memory: str | MemoryBudget, residency: Residency) -> tuple[Any, MemoryPlan]:
    """An opened model as it keeps within a budget, and the plan, which is printed.

    Args:
        model: a ``sana_jax.pipelines.opening.OpenModel``; networks that are quantised already stay as they are.
        memory: the budget; a text is for one picture or video of the model's own size.
        residency: what is kept where there is room for it.

    Raises:
        UserError: a budget that nothing keeps within; the least one that is enough is named.
    """
    from sana_jax.pipelines.opening import quantized_model

    check_residency(residency)
    networks = {
        "text_encoder": getattr(model.text_encoder, "weights", None),
        "transformer": model.transformer_weights,
        "controlnet": model.controlnet_weights,
        "autoencoder": getattr(model.autoencoder, "weights", None),
    }
    networks = {name: weights for name, weights in networks.items() if weights is not None}
    asked = memory if isinstance(memory, MemoryBudget) else MemoryBudget(memory)
    work, words = work_of(model, asked)
    plan = choose_plan(parse_memory(asked.memory), networks, residency, work, words)
    for line in plan.lines():
        print(line)
    if plan.tiling and hasattr(model.autoencoder, "tiling"):
        model.autoencoder.tiling = True
    return quantized_model(model, plan.quantization), plan


def refiner_frame_bytes(transformer: LTX2VideoTransformer, frame_size: tuple[int, int]) -> int:
    """What the keys and values of a latent frame take, of all layers; height and width in pixels."""
    config = transformer.config
    tokens = math.prod(length // factor for length, factor in zip(frame_size, config.vae_scale_factors[1:]))
    width = config.num_attention_heads * config.attention_head_dim
    return 2 * config.num_layers * tokens * width * jax.numpy.dtype(transformer.dtype).itemsize


def refiner_choices(
    found: Mapping[str, Any],
    memory: str,
    chosen: Mapping[str, Quantization],
    *,
    frame_bytes: int = 0,
    held_bytes: int = 0,
) -> dict[str, bool | dict[str, Quantization]]:
    """``stream_blocks`` and ``quantization`` with which a refiner's networks keep within a budget, one at a time.

    Three quarters of it may be weights, keys and values, and what others hold; the rest is for the computation. Keys
    and values are those of the published window, and of the block that joins it where the blocks are not streamed. The
    choice is printed.

    Args:
        found: what ``open_refiner`` makes, before anything is quantised.
        memory: the budget.
        chosen: what is quantised in any case.
        frame_bytes: keys and values of a latent frame.
        held_bytes: what other networks keep on the device.

    Raises:
        UserError: a network that is too large even so; the least budget that is enough is named.
    """
    budget, quantization, streams = parse_memory(memory), dict(chosen), isinstance(found["params"], StreamedResident)
    room = _REFINER_WEIGHTS * budget - held_bytes
    parts = {"text_encoder": found["text_encoder"].weights, "connectors": found["connectors_params"]}
    sizes = {name: tree_bytes(_abstract(weights, chosen.get(name))) for name, weights in parts.items()}
    for name, weights in parts.items():
        if sizes[name] > room and name not in chosen:
            smaller = _quantized_sizes(weights)
            for level in smaller:
                quantization[name], sizes[name] = Quantization(level), smaller[level]
                if sizes[name] <= room:
                    break
    abstract = _abstract(found["params"], chosen.get("transformer"))
    kept = frame_bytes * (WINDOW_FRAMES + BLOCK_FRAMES)
    streams = streams or tree_bytes(abstract) + kept > room
    sizes["transformer"] = tree_bytes(abstract)
    if streams:
        sizes["transformer"] = StreamedResident("transformer", abstract, _REFINER_BLOCKS, dict).num_bytes
        kept = frame_bytes * WINDOW_FRAMES
    formats = ", ".join(f"{name}={one.format}" for name, one in quantization.items()) or "none"
    print(
        f"memory plan for the refiner, {readable_bytes(budget)}: one network at a time, quantization {formats}, blocks "
        f"{'streamed from host memory' if streams else 'on the device'}; weights "
        + ", ".join(f"{name} {readable_bytes(size)}" for name, size in sizes.items())
        + f"; keys and values {readable_bytes(kept)}; held by other networks {readable_bytes(held_bytes)}"
    )
    sizes["transformer"] += kept
    if (largest := max(sizes, key=sizes.get)) and sizes[largest] > room:
        least = math.ceil((sizes[largest] + held_bytes) / _REFINER_WEIGHTS / 1e8) / 10
        beside = " with keys and values" if largest == "transformer" else ""
        raise UserError(
            f"memory {budget / 1e9:g}g is not enough for the refiner: its {largest}{beside} takes "
            f"{readable_bytes(sizes[largest])} beside {readable_bytes(held_bytes)} of other networks, and three "
            f"quarters of it are for these; the least that is enough is {least:g}g"
        )
    return {"stream_blocks": streams, "quantization": quantization}


def _abstract(weights: Resident, choice: Quantization | None) -> PyTree:
    """A network's parameters as shapes, as they are or once they are quantised."""
    abstract = weights.abstract
    if choice is None or stored_formats(abstract):
        return abstract
    return quantized_abstract(abstract, dict.fromkeys(quantizable_layers(abstract, choice.exclude), choice.format))


class Work(NamedTuple):
    """Bytes that computing takes beside the weights.

    Attributes:
        text: reading the prompts.
        layer: one layer's weights in the compute dtype, which the compiler copies out of the stack.
        sample: all samples in the transformer, without guidance.
        sums: what 8-bit products of them add: the int32 sums of the widest layer.
        samples: how many times as many go through it at once with guidance.
        decode: decoding at once.
        tile: decoding a tile.
        grows: whether a video is made and decoded block after block, all networks beside one another.
        state: what the decoder then keeps from block to block.
        tiled_state: the same where it decodes in tiles, which overlap and have a state each.
        network_state: what the transformer keeps from block to block.
    """

    text: int
    layer: int
    sample: int
    sums: int
    samples: int
    decode: int
    tile: int
    grows: bool = False
    state: int = 0
    tiled_state: int = 0
    network_state: int = 0


def _grows(model: Any) -> bool:
    return isinstance(getattr(model, "sampler", None), LongSanaSampler)


def _sampled_size(model: Any, asked: MemoryBudget) -> tuple[int, int]:
    """Height and width in pixels that an opened model samples for a request."""
    config, defaults, factor = model.transformer.config, model.defaults, model.autoencoder.spatial_factor
    size = asked.height or defaults.height, asked.width or defaults.width
    if not hasattr(config, "sample_size"):  # a world model, which has no table of sizes
        return size
    if isinstance(config.patch_size, int):
        return size_to_sample(*size, asked.binning, config.sample_size, factor)
    return video_size_to_sample(*size, asked.binning, config.sample_size, config.patch_size[1] * factor)


def _asked_frames(model: Any, asked: MemoryBudget) -> int:
    from sana_jax.pipelines.video_base import DEFAULT_FPS, DEFAULT_FRAMES, frames_of_seconds

    if isinstance(model.transformer.config.patch_size, int):
        return 1
    defaults, factor = model.defaults, model.autoencoder.temporal_factor
    if _grows(model):
        return pixel_frames(2 * model.sampler.block_frames - 1, factor)  # the first block at its longest
    if asked.seconds is not None:
        fps = asked.fps or defaults.fps or DEFAULT_FPS
        return frames_of_seconds(asked.seconds, fps, factor, say=lambda _: None)  # the call says it
    return asked.frames or defaults.frames or DEFAULT_FRAMES


def work_of(model: Any, asked: MemoryBudget) -> tuple[Work, str]:
    """The estimate for what is asked of an opened model, and that in words.

    Raises:
        UserError: a size that the model does not sample.
    """
    config, defaults, autoencoder = model.transformer.config, model.defaults, model.autoencoder
    itemsize = jax.numpy.dtype(model.transformer.dtype).itemsize
    factor = autoencoder.spatial_factor
    height, width = _sampled_size(model, asked)
    pixels, frames = height * width, _asked_frames(model, asked)
    latent_frames = 1 + (frames - 1) // getattr(autoencoder, "temporal_factor", 1)
    is_video = not isinstance(config.patch_size, int)
    patch = config.patch_size[-1] if is_video else config.patch_size
    tokens = latent_frames * pixels // (factor * patch) ** 2
    hidden = getattr(config, "mlp_hidden", 0)
    sample = tokens * itemsize * int(_WIDE_ARRAYS * 2 * hidden + _STREAM_ARRAYS * _width(config))
    name = autoencoder.to_config().get("_class_name", "")
    per_pixel, per_frame, tile, per_state = _DECODING.get(name, (0.0, 0.0, 0.0, 0.0))
    scale = jax.numpy.dtype(getattr(autoencoder, "dtype", "float32")).itemsize / 4
    # Videos are decoded one after another, and pictures too from so many pixels on; tiles are of all pictures.
    tiles = 1 if is_video else asked.samples
    together = tiles if tiles * pixels <= LARGEST_UNTILED else 1
    decode = (per_pixel + per_frame * frames) * pixels * scale
    tile = min(tile * scale, decode) * tiles
    text_config = getattr(model.text_encoder, "config", None)
    text = 3 * 4 * 1024 * getattr(text_config, "intermediate_size", 0) * asked.prompts
    guidance = defaults.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
    parts = 1 + (guidance > 1 and not getattr(config, "guidance_embeds", False)) + asked.perturbed
    # of the network itself: weights that are quantised already have other leaves
    layers = quantizable_layers(abstract_params(model.transformer))
    layer = itemsize * sum(math.prod(shape[-2:]) for shape in layers.values())
    sums = 4 * tokens * 2 * hidden
    sample, sums = sample * asked.samples, sums * asked.samples
    if asked.batched:  # nothing is left to split
        sample, sums, parts = sample * parts, sums * parts, 1
    of_frames = f"{frames} frames of " if is_video else ""
    words = f"{asked.samples} x {of_frames}{height}x{width} pixels at once"
    work = Work(text, layer, sample, sums, parts, int(decode * together), int(tile))
    if _grows(model):
        cached = model.sampler.num_cached_blocks if asked.num_cached_blocks is None else asked.num_cached_blocks
        work = _with_states(model, work, (height, width), per_state * scale, cached or None)
        held = readable_bytes(work.state + work.network_state)
        words = f"blocks of up to {frames} frames of {height}x{width} pixels with {held} kept from block to block"
    return work, words


def _with_states(model: Any, work: Work, size: tuple[int, int], per_pixel: float, cached: int | None) -> Work:
    """The work of a video that is made block after block: what is kept between them stands by itself.

    ``per_pixel`` is the state's size of a causal decoder; a block sees ``cached`` earlier ones, None for all.
    """
    autoencoder, config, pixels = model.autoencoder, model.transformer.config, math.prod(size)
    if not getattr(getattr(autoencoder, "config", None), "decoder_causal", True):
        per_pixel = 0.0  # it keeps a latent frame
    covered = one = pixels
    if (tiles := getattr(autoencoder, "tiles", None)) is not None and tiles.cut(*size):
        cuts = list(zip(size, tiles.size, tiles.stride))
        covered = math.prod(sum(min(cut[1], cut[0] - start) for start in tile_starts(*cut)) for cut in cuts)
        one = math.prod(min(length, side) for length, side, _ in cuts)
    token = config.patch_size[-1] * autoencoder.spatial_factor
    grid = size[0] // token, size[1] // token
    return work._replace(
        grows=True,
        decode=max(0, work.decode - int(per_pixel * pixels)),
        tile=max(0, work.tile - int(per_pixel * one)),
        state=int(per_pixel * pixels),
        tiled_state=int(per_pixel * covered),
        network_state=state_bytes(config, grid, num_cached_blocks=cached, dtype=model.transformer.dtype).total,
    )


def _width(config: Any) -> int:
    return getattr(config, "inner_dim", 0) or config.hidden_size


def choose_plan(
    budget: int, networks: Mapping[str, Resident], residency: Residency, work: Work, asked: str = ""
) -> MemoryPlan:
    """The first plan that keeps within the budget, from the one that changes least to the one that saves most.

    ``asked`` is what the work is for, in words.

    Raises:
        UserError: there is none; the least budget that is enough is named.
    """
    tried = []
    for plan in _plans(budget, networks, residency, work):
        if plan.fits:
            return dataclasses.replace(plan, asked=asked)
        tried.append(plan)
    plan = min(tried, key=lambda one: one.peak)
    kept = "the text encoder freed" if work.grows else "one network at a time"
    least = -(-plan.peak // int(USABLE * 1e8)) / 10
    stage = max(plan.stages, key=lambda one: one.total)
    raise UserError(
        f"memory {budget / 1e9:g}g is not enough{asked and ' for '}{asked}: with {kept}, quantised and "
        f"in tiles, {stage.name} still takes {readable_bytes(stage.total)}; ask for less, or raise it: the least that "
        f"is enough is {least:g}g"
    )


def _plans(budget: int, networks: Mapping[str, Resident], residency: Residency, work: Work) -> Iterator[MemoryPlan]:
    sizes = {name: {None: weights.num_bytes} for name, weights in networks.items()}
    for name, weights in networks.items():
        if name != "autoencoder":
            sizes[name] |= _quantized_sizes(weights)

    already = {
        name: "+".join(sorted(set(stored_formats(one.abstract or {}).values()))) for name, one in networks.items()
    }
    already = {name: formats for name, formats in already.items() if formats}

    def plan(residency, tiling, split, chosen):
        held = {name: sizes[name][chosen.get(name)] for name in networks}
        quantization = {name: Quantization(one) for name, one in chosen.items()}
        batching = "split" if split else "auto"
        sums = work.sums if "int8" in (chosen | already).get("transformer", "") else 0
        stages = _stages(held, residency, work._replace(sample=work.sample + sums), tiling, split)
        return MemoryPlan(budget, residency, quantization, tiling, batching, stages, already)

    yield plan(residency, None, False, {})
    tiling = True if work.tile < work.decode else None
    if work.grows:
        yield from _growing_plans(plan, sizes, (None,) if tiling is None else (None, tiling))
        return
    steps = [("one_at_a_time", None, False), ("one_at_a_time", tiling, False)]
    if work.samples > 1:
        steps.append(("one_at_a_time", tiling, True))
    for step in steps:
        last = plan(*step, {})
        yield last
    chosen: dict[str, str] = {}
    for level in LEVELS:
        for network, stage in (("text_encoder", "text"), ("transformer", "denoise")):
            total = next(one.total for one in last.stages if one.name == stage)
            if total > USABLE * budget and level in sizes.get(network, {}):
                chosen[network] = level
        last = plan(*steps[-1], chosen)
        yield last


def _growing_plans(
    plan: Callable[..., MemoryPlan], sizes: Mapping[str, Mapping[str | None, int]], tilings: Sequence[bool | None]
) -> Iterator[MemoryPlan]:
    """Plans of a video that is made block after block, for which all networks but the text encoder stay in memory.

    ``plan`` makes one. Tiles take less to decode, and more between blocks; so each choice is tried without and with.
    """
    chosen: dict[str, str] = {}

    def tries() -> list[MemoryPlan]:
        return [plan("text_encoder_freed", tiling, False, dict(chosen)) for tiling in tilings]

    yield from (last := tries())
    for level in LEVELS:
        for network in ("text_encoder", "transformer"):
            stages = last[0].stages[:1] if network == "text_encoder" else last[0].stages
            too_large = any(one.total > USABLE * last[0].budget for one in stages)
            if too_large and level in sizes.get(network, {}):
                chosen[network] = level
                yield from (last := tries())


def _quantized_sizes(weights: Resident) -> dict[str, int]:
    abstract = weights.abstract
    if abstract is None or stored_formats(abstract) or not (layers := quantizable_layers(abstract)):
        return {}
    return {level: tree_bytes(quantized_abstract(abstract, dict.fromkeys(layers, level))) for level in LEVELS}


def _stages(
    sizes: Mapping[str, int], residency: Residency, work: Work, tiling: bool | None, split: bool
) -> tuple[Stage, ...]:
    """Every stage of a later call, when networks that stay are there already."""
    state = work.tiled_state if tiling else work.state
    held = state + work.network_state
    alone = {
        "text": ("text_encoder",),
        "denoise": ("transformer", "controlnet"),
        "decode": ("autoencoder",),
    }
    computing = {
        "text": work.text,
        "denoise": work.layer + work.sample * (1 if split else work.samples) + held,
        "decode": (work.tile if tiling else work.decode) + held,
    }
    stages = []
    for name, own in alone.items():
        there = set(sizes)
        if residency == "one_at_a_time":
            there = set(own)
        elif residency == "text_encoder_freed" and name != "text":
            there -= {"text_encoder"}
        unused = sum(sizes[network] for network in there & set(sizes) if network not in own)
        unused += state if name == "denoise" else 0
        stages.append(Stage(name, sum(sizes.get(network, 0) for network in there), computing[name], unused))
    return tuple(stages)
