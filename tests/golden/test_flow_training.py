"""Flow-matching training against recorded vectors: tables, noising, losses, densities, chunk timesteps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import flow
from sana_jax.diffusion.chunk_timesteps import (
    MIXTURE_MODES,
    ChunkMixture,
    ChunkTimesteps,
    IncrementalTimesteps,
    TimestepDraws,
    process_timesteps,
)
from sana_jax.diffusion.timesteps import TimestepDensity, density_from_draw, timestep_index
from tests.golden.golden_files import GoldenFile, assert_golden, assert_golden_exact, load_golden

TABLE_TOLERANCE = 1e-12
DENSITY_TOLERANCE = 5e-6
VALUE_TOLERANCE = 1e-5
LOSS_TOLERANCE = 2e-5
# The uniform of the reference that decides "one timestep for all chunks" was held at this value.
SAME_TIMESTEP_UNIFORM = 0.5


@pytest.fixture(scope="module")
def golden() -> GoldenFile:
    return load_golden("flow_training")


def _shifts(golden: GoldenFile) -> dict[str, float]:
    """Folder of the file -> flow shift; a folder's number may have lost the shift's decimals."""
    folders, shifts = golden.children("out/sigmas/"), {}
    for shift in golden.hparams["shifts"]:
        spellings = (f"shift{shift:g}", f"shift{shift}", f"shift{int(shift)}")
        shifts[next(folder for folder in spellings if folder in folders)] = shift
    assert sorted(shifts) == folders
    return shifts


def test_sigma_tables(golden):
    for folder, shift in _shifts(golden).items():
        recorded = golden[f"out/sigmas/{folder}"]
        sigmas = flow.training_sigmas(shift, len(recorded))
        assert_golden(sigmas, recorded, TABLE_TOLERANCE, folder)
        assert sigmas[0] == 0.0


def test_timestep_tables_are_the_truncated_map(golden):
    for folder, shift in _shifts(golden).items():
        recorded = golden[f"out/timestep_map/{folder}"]
        assert_golden_exact(flow.training_timesteps(shift, len(recorded)), recorded.astype(np.int64), folder)


def _channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_noising_targets_and_losses(golden, kind):
    x0, noise, offset = (_channels_last(golden[f"in/{kind}/{name}"]) for name in ("x0", "noise", "model_offset"))
    index = golden[f"in/{kind}/index"]
    if kind == "video":
        index = index[:, 0]
    for folder, shift in _shifts(golden).items():
        where = f"{kind}/{folder}"
        num_levels = len(golden[f"out/sigmas/{folder}"])
        level = flow.noise_level(jnp.asarray(index), shift, num_levels)
        recorded_timestep = golden[f"out/{where}/model_timestep"].reshape(index.shape)
        assert_golden_exact(level.timestep, recorded_timestep, f"{where}/model_timestep")

        noisy = flow.add_noise(x0, noise, level.sigma)
        assert_golden(noisy, _channels_last(golden[f"out64/{where}/x_t"]), VALUE_TOLERANCE, f"{where}/x_t")
        target = flow.velocity_target(x0, noise)
        assert_golden_exact(target, _channels_last(golden[f"out/{where}/target"]), f"{where}/target")

        told = flow.align_leading(level.timestep.astype(jnp.float32), noisy, "timestep")
        output = 0.3 * noisy + jnp.cos(told / 100.0) + offset
        assert_golden(output, _channels_last(golden[f"out/{where}/output"]), VALUE_TOLERANCE, f"{where}/output")
        loss = flow.flow_matching_loss(output, target)
        assert_golden(loss, golden[f"out64/{where}/loss"], LOSS_TOLERANCE, f"{where}/loss")

        assert_golden(flow.x0_from_velocity(noisy, target, level.sigma), x0, VALUE_TOLERANCE, f"{where}/x0")


def _density(golden: GoldenFile, name: str) -> TimestepDensity:
    hparams = golden.hparams
    settings = {
        "uniform": {},
        "logit_normal": {"mean": hparams["lm"], "std": hparams["ls"]},
        "stretched_logit_normal": {
            "mean": hparams["lm"],
            "std": hparams["ls"],
            "p_low": hparams["pl"],
            "p_high": hparams["ph"],
        },
        "mode": {"mode_scale": hparams["ms"]},
        "logit_normal_trigflow": {"mean": hparams["tm"], "std": hparams["ts"]},
    }
    return TimestepDensity(name, **settings[name])


def test_densities(golden):
    names = golden.children("out/density/")
    assert names
    for name in names:
        density = _density(golden, name)
        match name:
            case "logit_normal":
                draw = golden[f"rng/density/{name}/normal"]
            case "logit_normal_trigflow":
                draw = golden[f"rng/density/{name}/randn"] * np.float32(density.std) + np.float32(density.mean)
            case _:
                draw = golden[f"rng/density/{name}/rand"]
        u = density_from_draw(jnp.asarray(draw), density)
        assert u.dtype == jnp.float32
        assert_golden(u, golden[f"out64/density/{name}/u"], DENSITY_TOLERANCE, name)
        if name != "logit_normal_trigflow":  # an angle, not an index
            assert_golden_exact(timestep_index(u), golden[f"out/density/{name}/index"], name)


def test_the_recorded_logit_normal_draw_is_the_standard_draw_scaled(golden):
    density = _density(golden, "logit_normal")
    scaled = density.mean + density.std * golden["rng/density/logit_normal/standard_normal"]
    assert_golden(scaled, golden["rng/density/logit_normal/normal"], DENSITY_TOLERANCE)


class _Recording:
    """Reads the recorded draws of one case in the order in which they were drawn."""

    def __init__(self, golden: GoldenFile, prefix: str):
        self._golden = golden
        self._names = golden.names(prefix)
        assert self._names, f"no draws recorded under {prefix}"

    def next(self, *kinds: str) -> np.ndarray:
        assert self._names, f"no draw left, expected {kinds}"
        name = self._names.pop(0)
        assert name.rsplit("/", 1)[-1].split("_", 1)[1] in kinds, f"next draw is {name}, expected {kinds}"
        return self._golden[name]

    def path(self, anchor_chunk: np.ndarray, num_chunks: int) -> np.ndarray:
        """The uniforms behind a sequence, (B, F): leftwards chunks first, and only where a clip needs them.

        A sequence that is drawn forwards from the first chunk on has the anchor -1.
        """
        uniforms = np.full((len(anchor_chunk), num_chunks), np.nan)
        leftwards = [(chunk, anchor_chunk > chunk) for chunk in reversed(range(num_chunks - 1))]
        rightwards = [(chunk, anchor_chunk < chunk) for chunk in range(num_chunks)]
        for chunk, needed in leftwards + rightwards:
            if needed.any():
                self.next("categorical_idx")
                uniforms[needed, chunk] = self.next("categorical_u")
        return np.nan_to_num(uniforms)

    def path_below(self, batch: int, num_chunks: int) -> np.ndarray:
        """The uniforms of the strategy that draws each earlier chunk below the next, (B, F), in their own float32."""
        uniforms = np.zeros((batch, num_chunks), np.float32)
        for chunk in reversed(range(num_chunks - 1)):
            uniforms[:, chunk] = self.next("rand")
        return uniforms

    def assert_finished(self) -> None:
        assert not self._names, f"draws left over: {self._names}"


def _incremental_sizes(golden: GoldenFile) -> dict[str, tuple[int, int]]:
    """Chunks and levels of the recorded samplers."""
    hparams = golden.hparams
    (long,) = set(golden.children("out/incremental/")) - {"small"}
    return {"small": (hparams["F"], hparams["T"]), long: (hparams["F2"], hparams["T2"])}


def test_incremental_tables(golden):
    sizes = {f"incremental/{folder}": size for folder, size in _incremental_sizes(golden).items()}
    sizes["process/time_sampler"] = (len(golden.hparams["chunks"]), flow.NUM_TRAIN_TIMESTEPS)
    for where, (num_chunks, num_levels) in sizes.items():
        sampler = IncrementalTimesteps(num_chunks, num_levels)
        assert_golden(sampler.log_upward, golden[f"out/{where}/log_s"], TABLE_TOLERANCE, f"{where}/log_s")
        assert_golden(sampler.log_downward, golden[f"out/{where}/log_e"], TABLE_TOLERANCE, f"{where}/log_e")


def test_incremental_sequences(golden):
    """In float64, in which the recorded uniforms were compared with the cumulative probabilities."""
    anchor, curf = golden["in/incremental/small/anchor"], golden["in/incremental/small/curf"]
    sizes = _incremental_sizes(golden)
    cases = [(folder, case) for folder in sizes for case in golden.children(f"rng/incremental/{folder}/")]
    assert cases
    for folder, case in cases:
        where = f"incremental/{folder}/{case}"
        sampler = IncrementalTimesteps(*sizes[folder])
        recording = _Recording(golden, f"rng/{where}/")
        recorded = golden[f"out/{where}"]
        with jax.enable_x64(True):
            if case.startswith("forward_only"):
                start = np.arange(len(recorded)) if case.endswith("start") else np.zeros(len(recorded), np.int64)
                # it is drawn as around a further chunk before the first, of which that is the level
                before_first = np.full(len(recorded), -1)
                uniform = recording.path(before_first, sampler.num_chunks)
                longer = IncrementalTimesteps(sampler.num_chunks + 1, sampler.num_levels)
                uniform = np.pad(uniform, ((0, 0), (1, 0)))
                result = longer.sample(before_first + 1, start, uniform)[:, 1:]
            else:
                chunk = curf if case == "anchored" else recording.next("randint")
                level = recording.next("randint") if case == "random" else anchor
                result = sampler.sample(chunk, level, recording.path(chunk, sampler.num_chunks))
        recording.assert_finished()
        assert_golden_exact(result, recorded, where)


def _settings(golden: GoldenFile, case: str) -> ChunkTimesteps:
    hparams = golden.hparams
    stretched = case.startswith("stretched")
    recorded = hparams["process_cases"].get(case)
    if recorded is None:  # the one case that is described by its name
        assert case == "stretched_chunk_uniform"
        recorded = {"chunk_index": hparams["chunks"], "num_frames": hparams["nf"], "chunk_sampling_strategy": "uniform"}
    mean, std = recorded.get("logit_mean", hparams["lm"]), recorded.get("logit_std", hparams["ls"])
    quantiles = {"p_low": hparams["pl"], "p_high": hparams["ph"]} if stretched else {}
    density = TimestepDensity("stretched_logit_normal" if stretched else "logit_normal", mean, std, **quantiles)
    chunk_starts, mixture = recorded.get("chunk_index"), recorded.get("chunk_mixture_probs")
    strategy = "per_sample" if chunk_starts is None else recorded.get("chunk_sampling_strategy", "uniform")
    strategy = "mixture" if mixture else strategy
    draws_sequence = strategy in ("incremental", "mixture")
    return ChunkTimesteps(
        num_frames=recorded.get("num_frames", 1),
        chunk_starts=chunk_starts,
        strategy=strategy,
        density=density,
        sequence="uniform_below" if draws_sequence and "time_sampler" not in recorded else "path_counting",
        same_timestep_prob=0.0 if mixture else recorded.get("same_timestep_prob", 0.0),
        mixture=ChunkMixture(**mixture) if mixture else None,
        image_to_video=recorded.get("do_i2v", False),
        noise_multiplier=float(recorded.get("noise_multiplier", 0.0)),
    )


def _recorded_draws(golden: GoldenFile, case: str, settings: ChunkTimesteps) -> TimestepDraws:
    recording = _Recording(golden, f"rng/process/{case}/")
    batch, num_chunks = len(recording.next("randint")), settings.num_chunks
    draw_of_density = lambda: recording.next("normal", "rand")  # noqa: E731
    draws = TimestepDraws(*(np.zeros(batch) for _ in TimestepDraws._fields))
    draws = draws._replace(base=draw_of_density(), same_timestep=np.float32(SAME_TIMESTEP_UNIFORM))
    same_for_all = settings.same_timestep_prob > SAME_TIMESTEP_UNIFORM
    if settings.strategy == "uniform":
        chunks = np.zeros((batch, num_chunks), np.float32)
        draws = draws._replace(chunks=chunks if same_for_all else draw_of_density().reshape(batch, num_chunks))
    elif settings.strategy in ("incremental", "mixture") and not same_for_all:
        mixing = settings.strategy == "mixture"
        mode = recording.next("rand") if mixing else np.zeros(batch, np.float32)
        draws = draws._replace(mode=mode, anchor=draw_of_density())
        anchor_chunk, cleans = np.zeros(batch, np.int64), False
        if mixing or settings.sequence == "path_counting":
            anchor_chunk = recording.next("randint")
        draws = draws._replace(anchor_chunk=anchor_chunk)
        if mixing:
            drawn_mode = np.searchsorted(settings.mixture.upper_bounds, mode)
            last = drawn_mode >= MIXTURE_MODES.index("last_chunk_anchor")
            cleans = (drawn_mode == MIXTURE_MODES.index("teacher_forcing_clean")).any() and num_chunks > 1
            anchor_chunk = np.where(last, num_chunks - 1, anchor_chunk)
        if settings.sequence == "path_counting":
            draws = draws._replace(path=recording.path(anchor_chunk, num_chunks))
        else:
            draws = draws._replace(path=recording.path_below(batch, num_chunks))
        if cleans:
            draws = draws._replace(clean_prefix=recording.next("randint"))
    elif settings.strategy == "incremental":
        draws = draws._replace(
            anchor=np.zeros(batch, np.float32),
            anchor_chunk=np.zeros(batch, np.int64),
            path=np.zeros((batch, num_chunks), np.float32),
        )
    if settings.image_to_video:
        draws = draws._replace(first_frame=recording.next("randint")[:, 0])
    recording.assert_finished()
    return draws


def test_process_timesteps(golden):
    cases = [case for case in golden.children("out/process/") if case != "time_sampler"]
    assert set(golden.hparams["process_cases"]) <= set(cases)
    for case in cases:
        settings = _settings(golden, case)
        recorded = golden[f"out/process/{case}"]
        with jax.enable_x64(True):
            index = process_timesteps(_recorded_draws(golden, case, settings), settings)
        assert index.dtype == jnp.int32
        assert_golden_exact(index, recorded if recorded.ndim == 1 else recorded[:, 0], case)
