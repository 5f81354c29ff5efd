"""SANA-WM's recorded vectors: attention layers, and one set of weights in its three forms."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion.guidance import classifier_free_guidance
from sana_jax.diffusion.samplers import FlowEuler
from sana_jax.diffusion.samplers.world_model import (
    chunk_starts,
    euler_step,
    generate_block,
    listed_schedule,
    read_block,
)
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer, attention_shape, init_params, init_state
from sana_jax.models.sana_wm_state import SanaWMState, cache_frames, visible_frames
from sana_jax.nn.camera_attention import AttentionInputs, CausalLayout, GatedDeltaAttention, RaySoftmaxAttention
from sana_jax.nn.ray_transform import ray_transforms
from sana_jax.nn.rope import rope_3d
from sana_jax.nn.short_convolution import short_convolution
from sana_jax.weights.rules import read_params
from sana_jax.weights.tables.sana_wm import DROPPED, NOT_PARAMETERS, transformer_rules
from tests.golden.golden_files import assert_golden, load_golden
from tests.golden.staircase import staircase, staircase_step
from tests.golden.video_networks import RecordedWeights, channels_last
from tests.kernels.shapes import QUICK_COMPILE

MODULE, WHOLE_MODEL, ROUNDED = 1e-5, 5e-5, 1e-2
GOLDEN = load_golden("wm_model")
HPARAMS = GOLDEN.hparams
GRID = (HPARAMS["T"], HPARAMS["H"], HPARAMS["W"])
STARTS = tuple(HPARAMS["chunk_boundaries"][:-1])
REVISIONS = {"default": "current", "legacy": "legacy"}
CACHE_SLOTS = "out/default_fp32/stream/full_history/"


@pytest.fixture(scope="module", autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def config(variant: str) -> SanaWMConfig:
    net = HPARAMS["net"]
    return SanaWMConfig(
        in_channels=net["in_channels"],
        num_layers=net["depth"],
        hidden_size=net["hidden_size"],
        num_attention_heads=net["num_heads"],
        softmax_every_n=net["softmax_every_n"],
        linear_head_dim=net["linear_head_dim"],
        conv_kernel_size=net["conv_kernel_size"],
        chunk_plucker_channels=net["plucker_channels"],
        chunk_plucker_post_attn_blocks=-1,
        caption_channels=net["caption_channels"],
        mlp_ratio=net["mlp_ratio"],
        revision=REVISIONS[variant.split("_")[0]],
    )


def softmax_dtype(variant: str):
    return jnp.bfloat16 if HPARAMS["variants"][variant]["bf16"] else None


def transformer(variant: str) -> SanaWMTransformer:
    return SanaWMTransformer(config(variant), softmax_dtype=softmax_dtype(variant))


def proof(variant: str, also: bool = False) -> list:
    """Marks: what is compared loosely, or said by another case too, is left to the proofs."""
    return [pytest.mark.prove] if also or variant != "default_fp32" else []


@functools.cache
def params() -> dict:
    """Read through the table; one set of weights for all variants."""
    tensors = {name.removeprefix("w/"): GOLDEN[name] for name in GOLDEN.names("w/")}
    abstract = jax.eval_shape(lambda: init_params(transformer("default_fp32"), jax.random.key(0)))
    rules = transformer_rules(config("default_fp32"), tensors)
    found = read_params(RecordedWeights(tensors), rules, abstract, ignored=(*NOT_PARAMETERS, *DROPPED))
    return jax.tree.map(jnp.asarray, found)


def inputs(timestep: str = "t_frame", camera: bool = True) -> dict[str, np.ndarray]:
    found = {
        "hidden_states": channels_last(GOLDEN["in/x"]),
        "encoder_hidden_states": GOLDEN["in/y"][:, 0],
        "timestep": GOLDEN[f"in/{timestep}"][:, 0],
        "encoder_attention_mask": GOLDEN["in/y_mask"].astype(np.int32),
    }
    if camera:
        found["camera_conditions"] = GOLDEN["in/camera_conditions"]
        found["chunk_plucker"] = channels_last(GOLDEN["in/chunk_plucker"])
    return found


@functools.cache
def compiled(variant: str, starts: tuple[int, ...] | None = None, quirk: bool = True):
    """``(params, inputs) -> velocity``"""
    run = functools.partial(
        transformer(variant).apply,
        block_starts=starts,
        convolution_starts=quirk_starts(starts) if quirk else None,
    )
    return jax.jit(lambda params, inputs: run({"params": params}, **inputs), compiler_options=QUICK_COMPILE)


def quirk_starts(starts: tuple[int, ...] | None, frames: int = GRID[0]) -> tuple[int, ...] | None:
    """Where the recorded short convolution restarts in causal blocks: see trap 6 of the files' notes."""
    size = HPARAMS["chunk"]
    return tuple(range(0, frames, size)) if starts is not None and frames % size == 0 else None


def expected(name: str) -> tuple[np.ndarray, bool]:
    """The recorded float64 result where there is one, and whether softmax's inputs were rounded for it."""
    exact = f"out64/{name}"
    return (GOLDEN[exact] if exact in GOLDEN else GOLDEN[f"out/{name}"]), "_bf16/" in name


def assert_recorded(found, name: str, tolerance: float) -> None:
    wanted, rounded = expected(name)
    assert_golden(found, wanted, ROUNDED if rounded else tolerance, name)


# -- attention layers --------------------------------------------------------------------------------------------------

LAYERS = [
    f"{variant}/{layer}/{form}"
    for variant in HPARAMS["variants"]
    for layer in GOLDEN.children(f"out/{variant}/")
    if layer.startswith("attn_block")
    for form in GOLDEN.children(f"out/{variant}/{layer}/")
]


@functools.cache
def compiled_layer(name: str):
    """``(params, tokens, camera) -> output, what the branches have found``"""
    variant, layer, form = name.split("/")
    number, cfg = int(layer.removeprefix("attn_block").split("_")[0]), config(variant)
    starts = STARTS if form == "chunk_causal" else (0,)
    layout = CausalLayout(GRID, starts, (form == "chunk_causal" and quirk_starts(starts)) or starts)
    softmax = cfg.is_softmax(number)
    attention = RaySoftmaxAttention if softmax else GatedDeltaAttention
    module = attention(attention_shape(cfg, jnp.float32, softmax_dtype(variant)))
    layers = cfg.softmax_layers if softmax else cfg.delta_layers

    def run(params, tokens, camera):
        stack = params["softmax_blocks" if softmax else "delta_blocks"]["attn1"]
        own = jax.tree.map(lambda leaf: leaf[layers.index(number)], stack)
        rotation = rope_3d(GRID, cfg.linear_head_dim)
        rays = ray_transforms(camera, GRID[1:], (1, 1), rotation, cfg.linear_head_dim)
        shared = AttentionInputs(rotation, rays, None, visible_frames(starts, GRID[0], None))
        x = tokens.reshape(len(tokens), GRID[0], -1, tokens.shape[-1])
        (out, _), sown = module.apply({"params": own}, x, shared, layout, mutable=["intermediates"])
        return out, {branch: sown["intermediates"][branch][0] for branch in ("main", "camera")}

    return jax.jit(run, compiler_options=QUICK_COMPILE)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "_fp32/" in name else [pytest.mark.prove]) for name in LAYERS]
)
def test_attention_layers(name):
    found, branches = compiled_layer(name)(params(), GOLDEN["in/attn_x"], GOLDEN["in/camera_conditions"])
    results = {"out": found, "main_raw": branches["main"], "cam_raw": branches["camera"]}
    recorded = GOLDEN.children(f"out/{name}/")
    assert "out" in recorded
    for part in recorded:
        wanted, _ = expected(f"{name}/{part}")
        assert_recorded(np.reshape(results[part], wanted.shape), f"{name}/{part}", MODULE)


@pytest.mark.parametrize("case", GOLDEN.children("out/conv_quirk/"))
def test_short_convolution_on_the_plain_grid(case):
    frames = int(case.removeprefix("T"))
    tokens = GRID[1] * GRID[2]
    x = GOLDEN["in/attn_x"][:, : frames * tokens].reshape(1, frames, tokens, -1)
    kernel = GOLDEN["w/blocks.0.attn.conv_k.weight"][:, 0].T
    starts = range(0, frames, HPARAMS["chunk"])
    found, _ = short_convolution(jnp.asarray(x), jnp.asarray(kernel), starts)
    wanted, _ = expected(f"conv_quirk/{case}/out")
    assert_golden(np.reshape(found, wanted.shape), wanted, MODULE, case)
    elsewhere, _ = short_convolution(jnp.asarray(x), jnp.asarray(kernel), [s for s in STARTS if s < frames])
    assert np.abs(elsewhere - found).max() > 0.01


# -- whole networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [pytest.param(name, marks=proof(name)) for name in HPARAMS["variants"]])
def test_bidirectional(variant):
    cases = GOLDEN.children(f"out/{variant}/bidirectional/")
    assert cases
    for case in cases:
        given = inputs(camera=False) if case == "no_camera" else inputs(case)
        found = compiled(variant)(params(), given)
        assert_recorded(np.moveaxis(found, -1, 1), f"{variant}/bidirectional/{case}", WHOLE_MODEL)


@pytest.mark.parametrize("variant", [pytest.param(name, marks=proof(name)) for name in HPARAMS["variants"]])
def test_all_blocks_at_once(variant):
    cases = GOLDEN.children(f"out/{variant}/chunk_causal/")
    assert cases
    for case in cases:
        explicit = case == "explicit_chunk_index"
        starts = (0, 2, 5) if explicit else STARTS  # the explicit starts are in the recorded name's description
        found = compiled(variant, starts)(params(), inputs("t_frame" if explicit else case))
        assert_recorded(np.moveaxis(found, -1, 1), f"{variant}/chunk_causal/{case}", WHOLE_MODEL)


# -- one block after another -------------------------------------------------------------------------------------------


def windows(case: str) -> dict:
    """What ``init_state`` takes for a recorded case; the two windows are full history and that of the file."""
    if case != "full_history" and case.startswith("window"):
        window, sink = case.removeprefix("window").split("_sink")
        return {"num_cached_blocks": int(window), "sink": bool(int(sink))}
    return {}


def empty_state(variant: str, case: str, batch: int = 1) -> SanaWMState:
    room = cache_frames(list(np.diff(HPARAMS["chunk_boundaries"])), **windows(case))
    dtype = softmax_dtype(variant) or jnp.float32
    return init_state(config(variant), batch, GRID[1:], room, **windows(case), softmax_dtype=dtype)


@functools.cache
def compiled_block(variant: str):
    """``(params, inputs of a block, state, first_frame) -> velocity, state``"""
    run = transformer(variant).apply

    def block(params, inputs, state, first_frame):
        return run({"params": params}, **inputs, state=state, first_frame=first_frame)

    return jax.jit(block, compiler_options=QUICK_COMPILE)


def of_block(given: dict, start: int, end: int) -> dict:
    """The part of the inputs that one block is given."""
    whole = ("encoder_hidden_states", "encoder_attention_mask")
    return {name: array if name in whole else array[:, start:end] for name, array in given.items()}


def stream(variant: str, case: str) -> tuple[np.ndarray, list[SanaWMState]]:
    state, outputs, states = empty_state(variant, case), [], []
    for start, end in itertools.pairwise(HPARAMS["chunk_boundaries"]):
        given = of_block(inputs("t_same"), start, end)
        velocity, state = compiled_block(variant)(params(), given, state, jnp.int32(start))
        outputs.append(velocity)
        states.append(state)
    return np.moveaxis(np.concatenate(outputs, axis=1), -1, 1), states


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        pytest.param(variant, case, marks=proof(variant, case != "full_history"))
        for variant in HPARAMS["variants"]
        if GOLDEN.names(f"out/{variant}/stream/")
        for case in GOLDEN.children(f"out/{variant}/stream/")
    ],
)
def test_one_block_after_another(variant, case):
    """Outputs, and what every block leaves."""
    found, states = stream(variant, case)
    assert_recorded(found, f"{variant}/stream/{case}/output", WHOLE_MODEL)
    prefix = f"out/{variant}/stream/{case}/"
    for name in GOLDEN.names(prefix):
        if "/saved/" in name:
            chunk, _, block, slot = name.removeprefix(prefix).split("/")
            left = slot_of(states, int(chunk.removeprefix("chunk")), int(block.removeprefix("block")), slot)
            assert_golden(np.reshape(left, GOLDEN[name].shape), GOLDEN[name], WHOLE_MODEL, name)


def slot_of(states: list[SanaWMState], block: int, layer: int, slot: str) -> np.ndarray:
    """What a layer holds after a causal block, as the recorded slot of this number has it."""
    state, cfg = states[block], config("default_fp32")
    softmax = cfg.is_softmax(layer)
    layers = cfg.softmax_layers if softmax else cfg.delta_layers
    own = jax.tree.map(lambda leaf: leaf[layers.index(layer)], state.softmax if softmax else state.delta)
    number = int(slot.removeprefix("slot"))
    if number == 9:
        return np.moveaxis(own.last_frame, -1, 1)
    if softmax:  # recorded are the block's own frames
        frames = np.flatnonzero(np.asarray(state.frame_blocks) == block)
        return np.moveaxis(own.attention[number][:, frames], 3, 1)
    held = {
        0: np.swapaxes(own.attention.main.key_value, -1, -2),
        1: own.attention.main.key,
        2: own.attention.camera.key_value,
        3: np.moveaxis(own.attention.tails["conv_k_camera"], 2, 1),
        4: np.moveaxis(own.attention.tails["conv_k"], 2, 1),
    }
    return held[number]


# -- sampling ----------------------------------------------------------------------------------------------------------


def guided(velocity):
    """Of a batch (negative, positive)."""
    return classifier_free_guidance(velocity[:1], velocity[1:], HPARAMS["cfg"])


def both_captions() -> dict[str, np.ndarray]:
    """The inputs of a guided batch, without latents and times."""
    given = {name: np.repeat(array, 2, axis=0) for name, array in inputs().items()}
    given["encoder_hidden_states"] = np.concatenate([GOLDEN["in/y_uncond"][:, 0], GOLDEN["in/y"][:, 0]])
    return {name: array for name, array in given.items() if name not in ("hidden_states", "timestep")}


@functools.cache
def compiled_sampling(variant: str, with_given: bool):
    """``(params, noise, inputs of a block, state, first_frame, schedule, given) -> block, state``"""
    model = transformer(variant)

    def run(params, noise, given_inputs, state, first_frame, schedule, given):
        def velocity_fn(latents, timestep, state):
            both = (jnp.concatenate([array, array]) for array in (latents, timestep))
            arrays = dict(zip(("hidden_states", "timestep"), both)) | given_inputs
            velocity, after = model.apply({"params": params}, **arrays, state=state, first_frame=first_frame)
            return guided(velocity), after

        block = generate_block(velocity_fn, state, noise, schedule, given)
        return block, read_block(velocity_fn, state, block)

    return jax.jit(run, compiler_options=QUICK_COMPILE)


def sample_in_turn(variant: str, case: str) -> tuple[np.ndarray, list[SanaWMState]]:
    """The video, and the state before every block."""
    plain = case == "plain_schedule"
    schedule = FlowEuler(HPARAMS["shift"]).schedule(3) if plain else listed_schedule(HPARAMS["steps"])
    noise = channels_last(GOLDEN["in/noise"])
    state, blocks, states = empty_state(variant, case, batch=2), [], []
    for start, end in itertools.pairwise(HPARAMS["chunk_boundaries"]):
        states.append(state)
        first = channels_last(GOLDEN["in/first_frame"]) if start == 0 and not plain else None
        given = of_block(both_captions(), start, end)
        run = compiled_sampling(variant, first is not None)
        block, state = run(params(), noise[:, start:end], given, state, jnp.int32(start), schedule, first)
        blocks.append(block)
    return np.moveaxis(np.concatenate(blocks, axis=1), -1, 1), states


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        pytest.param(variant, case, marks=proof(variant, not case.startswith("window")))
        for variant in HPARAMS["variants"]
        for case in sorted({name.split("/")[3] for name in GOLDEN.names(f"out/{variant}/streaming_sampler/")})
        if f"out/{variant}/streaming_sampler/{case}/output" in GOLDEN
    ],
)
def test_sampling_one_block_after_another(variant, case):
    """The video, and what every block is handed of those before."""
    found, states = sample_in_turn(variant, case)
    prefix = f"{variant}/streaming_sampler/{case}"
    assert_recorded(found, f"{prefix}/output", WHOLE_MODEL)
    for name in GOLDEN.names(f"out/{prefix}/chunk"):
        block, *kind = name.removeprefix(f"out/{prefix}/chunk").split("/")
        seen = seen_blocks(states[int(block)])
        if kind[0] == "attended_chunks":
            np.testing.assert_array_equal(seen, GOLDEN[name])
        elif kind[0] == "cache_in":
            handed = handed_slot(states[int(block)], seen, int(kind[1].removeprefix("block")), kind[2])
            assert_golden(np.reshape(handed, GOLDEN[name].shape), GOLDEN[name], WHOLE_MODEL, name)
        elif kind[0] == f"step{len(listed_schedule(HPARAMS['steps']).timesteps) - 1}":
            start, end = HPARAMS["chunk_boundaries"][int(block) :][:2]
            assert_golden(found[:, :, start:end], GOLDEN[name], WHOLE_MODEL, name)


def seen_blocks(state: SanaWMState) -> np.ndarray:
    """The earlier blocks that softmax layers see of the next one."""
    known = np.asarray(state.frame_blocks)
    return np.unique(known[known >= 0])


def handed_slot(state: SanaWMState, seen: np.ndarray, layer: int, slot: str) -> np.ndarray:
    """What a layer is handed, as the recorded slot of this number has it: of softmax, all frames in their order."""
    if not config("default_fp32").is_softmax(layer):
        return slot_of([state], 0, layer, slot)
    return np.concatenate([slot_of([state] * (block + 1), block, layer, slot) for block in seen], axis=2)


@pytest.mark.parametrize("case", ["ltx_plain", "ltx_cond", "ltx_cond_noguide"])
def test_frames_that_are_given_stay(case):
    """A toy velocity of each frame's own time. ``ltx_cond_noise`` adds noise to given frames, which are clean here."""
    golden = load_golden("samplers")
    settings = golden.hparams["cases"][case]
    assert not any(settings["frame_weights"].values())
    schedule = FlowEuler(settings["shift"]).schedule(settings["steps"])
    latents = channels_last(golden[f"in/{settings['input']}"])
    given = np.isin(np.arange(latents.shape[1]), [int(frame) for frame in settings["frame_weights"]])
    np.testing.assert_allclose(schedule.timesteps, golden[f"out/{case}/timesteps"], rtol=1e-6)

    def velocity(latents, sigma, condition):
        return jnp.tanh(latents @ golden["in/W"].T + golden[f"in/{condition}"]) + sigma * golden["in/u"]

    for step in range(settings["steps"]):
        sigma, following = (np.where(given, 0, schedule.sigmas[place]) for place in (step, step + 1))
        pair = (velocity(latents, sigma[:, None, None, None], kind) for kind in ("uncond_vid", "cond_vid"))
        latents = euler_step(latents, classifier_free_guidance(*pair, settings["scale"]), sigma, following)
        assert_golden(np.moveaxis(latents, -1, 1), golden[f"out/{case}/trajectory"][step], 1e-5, f"step {step}")
    assert_golden(np.moveaxis(latents, -1, 1), golden[f"out64/{case}/final"], 1e-5, "final")


def test_first_frames_of_causal_blocks():
    for frames, size, strategy, starts in load_golden("wm_camera").hparams["chunk_starts_table"]:
        assert list(chunk_starts(frames, size, strategy)) == starts, (frames, size, strategy)
    assert list(chunk_starts(HPARAMS["T"], HPARAMS["chunk"], HPARAMS["strategy"])) == list(STARTS)


def test_listed_steps():
    recorded = [name for name in GOLDEN.names("out64/") if name.endswith("scheduler_timesteps")]
    assert recorded
    schedule = listed_schedule(HPARAMS["steps"])
    for name in recorded:
        prefix = name.removesuffix("scheduler_timesteps")
        np.testing.assert_array_equal(schedule.timesteps, GOLDEN[name])
        np.testing.assert_array_equal(schedule.sigmas, GOLDEN[f"{prefix}scheduler_sigmas"])
        np.testing.assert_array_equal(np.trunc(schedule.timesteps), GOLDEN[f"{prefix}model_timesteps"])


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, marks=proof(variant))
        for variant in HPARAMS["variants"]
        if GOLDEN.names(f"out/{variant}/chunk_flow_euler/")
    ],
)
def test_sampling_in_a_staircase(variant):
    prefix = f"{variant}/chunk_flow_euler"
    schedule = FlowEuler(HPARAMS["shift"]).schedule(HPARAMS["ksteps"])
    plan = staircase(len(STARTS), schedule, HPARAMS["interval"])
    if f"out64/{prefix}/timestep_matrix" in GOLDEN:
        np.testing.assert_array_equal(plan.starts, GOLDEN[f"out64/{prefix}/chunk_start_steps"])
        assert_golden(plan.timesteps, GOLDEN[f"out64/{prefix}/timestep_matrix"], 1e-6)
    given = HPARAMS["conditioned_frames"]
    assert given == list(range(len(given)))
    first = channels_last(GOLDEN["in/first_frame"])[:, : len(given)]
    latents = jnp.concatenate([first, channels_last(GOLDEN["in/noise"])[:, len(given) :]], axis=1)
    for step in range(plan.timesteps.shape[1]):
        starts = STARTS[: plan.active(step)]

        def velocity_fn(seen, timestep, starts=starts):
            both = {"hidden_states": seen, "timestep": timestep}
            both = {name: np.concatenate([array, array]) for name, array in both.items()}
            arrays = of_block(both_captions(), 0, seen.shape[1]) | both
            return guided(compiled(variant, starts)(params(), arrays))

        latents = staircase_step(plan, step, STARTS, latents, velocity_fn, len(given))
        recorded = f"out/{prefix}/step{step:02d}/latent"
        if recorded in GOLDEN:
            wanted = GOLDEN[recorded]
            assert_golden(np.moveaxis(latents, -1, 1)[:, :, : wanted.shape[2]], wanted, WHOLE_MODEL, recorded)
    assert_recorded(np.moveaxis(latents, -1, 1), f"{prefix}/output", WHOLE_MODEL)
