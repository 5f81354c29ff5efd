"""The Wan autoencoder beside diffusers' AutoencoderKLWan: outputs, half precision, and weights both ways."""

from __future__ import annotations

import contextlib
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from convert.engine import export_model, import_model
from sana_jax.autoencoders import WanAutoencoder, blockwise, load_autoencoder
from sana_jax.autoencoders.base import mean_and_log_variance
from sana_jax.autoencoders.wan import WanDecoder, WanEncoder
from sana_jax.autoencoders.wan_config import WanConfig
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights import save_params
from sana_jax.weights.rules import places
from sana_jax.weights.safetensors_files import SafetensorsSource
from sana_jax.weights.tables.wan import wan_rules
from tests.compiling import as_users_compile
from tests.parity import wan_oracle as oracle

TOLERANCE = 2e-6
BF16_FACTOR = 1.5
# For programs of which only values are wanted, not speed: LLVM's optimiser is most of the compile time.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
# Frames, and the height and width of the latents.
SIZES = {
    "published order": [(1, 2, 3), (5, 3, 5), (9, 1, 1), (13, 2, 1)],
    "another order": [(1, 2, 3), (5, 3, 5), (9, 1, 2)],
}
# From the third latent frame on all are computed alike: the fourth is for `make prove`.
CASES = [
    pytest.param(variant, size, marks=[pytest.mark.prove] if size[0] == 13 else [])
    for variant, sizes in SIZES.items()
    for size in sizes
]


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def quick(monkeypatch):
    """Autoencoders compile in less time than users' do."""
    monkeypatch.setattr(blockwise, "compile_ahead", oracle.quick_compile)


@functools.cache
def network(variant: str, half: str, dtype: jnp.dtype = jnp.float32):
    model = {"encoder": WanEncoder, "decoder": WanDecoder}[half](oracle.jax_config(variant), dtype)
    return jax.jit(lambda params, x: model.apply({"params": params}, x)[0], compiler_options=QUICK_COMPILE)


def draw_videos(variant: str, size: tuple[int, int, int], seed: int = 0, batch: int = 2) -> np.ndarray:
    frames, *latent = size
    height, width = (length * oracle.jax_config(variant).spatial_factor for length in latent)
    return oracle.draw(batch, frames, height, width, 3, seed=seed)


def draw_latents(variant: str, size: tuple[int, int, int], seed: int = 0, batch: int = 2) -> np.ndarray:
    frames = 1 + (size[0] - 1) // oracle.jax_config(variant).temporal_factor
    return oracle.draw(batch, frames, *size[1:], 4, seed=seed)


@pytest.mark.parametrize(("variant", "size"), CASES, ids=str)
def test_encoding_whole_is_diffusers_frame_by_frame(variant, size):
    videos = draw_videos(variant, size)
    expected = oracle.torch_moments(oracle.torch_model(variant), videos)
    found = network(variant, "encoder")(oracle.params_for(variant)["encoder"], videos)
    assert np.std(expected) > 0.3
    assert oracle.relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize(("variant", "size"), CASES, ids=str)
def test_decoding_whole_is_diffusers_frame_by_frame(variant, size):
    latents = draw_latents(variant, size)
    expected = oracle.torch_decoded(oracle.torch_model(variant), latents)
    found = network(variant, "decoder")(oracle.params_for(variant)["decoder"], latents)
    assert np.std(expected) > 0.05
    assert np.abs(expected).max() < 1  # nothing was clamped
    assert oracle.relative_error(found, expected) <= TOLERANCE


def test_log_variance_is_clamped():
    moments = np.array([1.0, 2.0, -31.0, 25.0], np.float32).reshape(1, 1, 1, 1, 4)
    mean, log_variance = mean_and_log_variance(jnp.asarray(moments))
    assert (mean.ravel().tolist(), log_variance.ravel().tolist()) == ([1.0, 2.0], [-30.0, 20.0])


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_bfloat16_is_no_worse_than_torch(half):
    """Errors of both beside float32, over several inputs since one can be lucky."""
    variant, size = "published order", (5, 3, 5)
    draw, run = {
        "encoder": (draw_videos, oracle.torch_moments),
        "decoder": (draw_latents, oracle.torch_decoded),
    }[half]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), oracle.params_for(variant)[half])
    errors = []
    for seed in range(4):
        x = draw(variant, size, seed)
        exact = run(oracle.torch_model(variant), x)
        theirs = run(oracle.torch_model(variant, torch.bfloat16), x)
        ours = network(variant, half, jnp.bfloat16)(params, x)
        assert ours.dtype == jnp.bfloat16
        errors.append([oracle.relative_error(side, exact) for side in (ours.astype(jnp.float32), theirs)])
    ours, theirs = np.mean(errors, 0)
    assert ours <= BF16_FACTOR * theirs, errors


# --- published size -------------------------------------------------------------------------------------------------


def test_the_published_network():
    """Defaults, names, shapes and numbers of parameters are those of Wan 2.1."""
    with torch.device("meta"):
        model = AutoencoderKLWan()
    config = WanConfig.from_dict(dict(model.config))
    assert config == WanConfig()
    assert (config.temporal_factor, config.spatial_factor) == (4, 8)
    params = oracle.abstract_params(config)
    wanted = places(wan_rules(config), params)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: place.shape for name, place in wanted.items()} == state
    counts = {half: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for half, tree in params.items()}
    # beside the two halves, as diffusers counts them, there are quant_conv and post_quant_conv
    quant, post_quant = 32 * 32 + 32, 16 * 16 + 16
    assert counts == {"encoder": 53_595_872 + quant, "decoder": 73_295_331 + post_quant}
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters()) == 126_892_531


# --- directories ----------------------------------------------------------------------------------------------------


def pipelines_encode(variant: str, videos: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """As the image-to-video pipeline of diffusers does it."""
    mean, inverse_std = oracle.statistics(variant)
    with torch.no_grad():
        mode = oracle.torch_model(variant, dtype).encode(oracle.channels_first(videos).to(dtype)).latent_dist.mode()
        return oracle.channels_last((mode.float() - mean) * inverse_std)


def pipelines_decode(variant: str, latents: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """As the pipelines of diffusers do it."""
    mean, inverse_std = oracle.statistics(variant)
    with torch.no_grad():
        z = oracle.channels_first(latents) / inverse_std + mean
        return oracle.channels_last(oracle.torch_model(variant, dtype).decode(z.to(dtype)).sample.float())


def quiet_load(directory, **options) -> WanAutoencoder:
    return WanAutoencoder.from_directory(directory, say=lambda line: None, **options)


def test_frames_are_clamped(quick):
    variant = "another order"
    latents, params = draw_latents(variant, (3, 2, 1), batch=1), oracle.params_for(variant)
    louder = jax.tree.map(lambda leaf: 5 * leaf, params["decoder"]["conv_out"])
    params = {"decoder": params["decoder"] | {"conv_out": louder}}
    found = np.asarray(WanAutoencoder.from_params(oracle.jax_config(variant), params).decode(latents))
    assert 0.01 < (np.abs(found) == 1).mean() < 0.9
    assert oracle.relative_error(found, np.clip(5 * pipelines_decode(variant, latents), -1, 1)) <= TOLERANCE


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "200KB"}], ids=["one file", "shards"])
def test_published_directory(tmp_path, saving):
    """One file as users compile it."""
    with as_users_compile() if not saving else contextlib.nullcontext():
        check_published_directory(tmp_path, saving)


def check_published_directory(tmp_path, saving):
    variant = "published order"
    oracle.torch_model(variant).save_pretrained(tmp_path, **saving)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(saving)
    autoencoder = quiet_load(tmp_path)
    assert not autoencoder.weights.loaded
    videos = draw_videos(variant, (5, 2, 3), batch=1)
    expected = pipelines_encode(variant, videos)
    assert oracle.relative_error(autoencoder.encode(videos), expected) <= TOLERANCE
    if saving:
        return
    latents = draw_latents(variant, (5, 2, 3), batch=1)
    decoded = pipelines_decode(variant, latents)
    assert np.abs(decoded).max() < 1
    assert oracle.relative_error(autoencoder.decode(latents), decoded) <= TOLERANCE
    mean, log_variance = autoencoder.posterior(videos)
    moments = oracle.torch_moments(oracle.torch_model(variant), videos)
    found = np.concatenate([mean, log_variance], -1)
    assert oracle.relative_error(found, moments) <= TOLERANCE
    autoencoder.free()
    assert not autoencoder.weights.loaded
    assert oracle.relative_error(autoencoder.encode(videos), expected) <= TOLERANCE
    assert len(autoencoder.programs) == 2


def test_statistics_are_applied_to_the_last_bit():
    """What surrounds the networks is exactly what diffusers' pipelines compute."""
    variant = "published order"
    autoencoder = WanAutoencoder.from_params(oracle.jax_config(variant), oracle.params_for(variant))
    latents = 3 * oracle.draw(1, 2, 30, 40, 4)
    mean, inverse_std = oracle.statistics(variant)
    z = oracle.channels_first(latents)
    np.testing.assert_array_equal(autoencoder._denormalised(latents), oracle.channels_last(z / inverse_std + mean))
    found = autoencoder._normalised(jnp.asarray(latents))
    np.testing.assert_array_equal(found, oracle.channels_last((z - mean) * inverse_std))


def test_bfloat16_variant(tmp_path, quick):
    variant = "published order"
    oracle.torch_model(variant, torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    videos = draw_videos(variant, (5, 3, 5))
    exact, theirs = (pipelines_encode(variant, videos, dtype) for dtype in (torch.float32, torch.bfloat16))
    autoencoder = quiet_load(tmp_path, dtype="bfloat16", variant="bf16")
    found = autoencoder.encode(videos)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(autoencoder.weights.params)} == {"bfloat16"}
    assert found.dtype == jnp.float32
    assert oracle.relative_error(found, exact) <= BF16_FACTOR * oracle.relative_error(theirs, exact)
    with pytest.raises(FileNotFoundError, match="variants that are there: bf16"):
        quiet_load(tmp_path, variant="fp16")


@pytest.mark.parametrize("variant", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_the_import(tmp_path, variant, dtype):
    """Tensor by tensor, and the converted directory opens as well."""
    model = oracle.torch_model(variant, dtype)
    model.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours", report=lambda line: None)
    export_model(tmp_path / "ours", tmp_path / "back", report=lambda line: None)
    source, back = (
        SafetensorsSource(tmp_path / folder / "diffusion_pytorch_model.safetensors") for folder in ("theirs", "back")
    )
    assert back.tensors == source.tensors
    for key in source.tensors:
        assert back.read(key).tobytes() == source.read(key).tobytes()
    loaded = AutoencoderKLWan.from_pretrained(tmp_path / "back", torch_dtype=dtype, low_cpu_mem_usage=False)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    ours = load_autoencoder(tmp_path / "ours")
    assert isinstance(ours, WanAutoencoder)
    assert ours.config == oracle.jax_config(variant)


def test_converted_directory(tmp_path, quick):
    variant = "another order"
    config = oracle.jax_config(variant)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    save_params(tmp_path / "params", oracle.params_for(variant))
    autoencoder = load_autoencoder(tmp_path)
    assert autoencoder.to_config() == config.to_dict()
    assert (autoencoder.temporal_factor, autoencoder.spatial_factor, autoencoder.latent_channels) == (2, 4, 4)
    latents = draw_latents(variant, (3, 2, 1), batch=1)
    assert oracle.relative_error(autoencoder.decode(latents), pipelines_decode(variant, latents)) <= TOLERANCE


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wan") / "vae"
    oracle.torch_model("published order").save_pretrained(directory)
    return directory


def changed_config(source, target, **changes):
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    (target / "diffusion_pytorch_model.safetensors").symlink_to(source / "diffusion_pytorch_model.safetensors")
    return target


@pytest.mark.parametrize("dtype", ["float16", np.float16, "int8", "bf16"])
def test_other_dtypes_are_refused(tiny_directory, dtype):
    with pytest.raises(UserError, match="choose float32 or bfloat16"):
        load_autoencoder(tiny_directory, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL'; allowed here: AutoencoderKLWan"),
        ({"is_residual": True}, "is_residual=True is not allowed; allowed is False .Wan 2.2's"),
        ({"patch_size": 2}, "patch_size=2 is not allowed; allowed is None .Wan 2.2's"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"colour": 3}, "unknown fields .'colour'."),
        ({"z_dim": "4"}, "z_dim='4' is not allowed; allowed is a whole number"),
        ({"base_dim": True}, "base_dim=True"),
        ({"base_dim": 7}, "an even width"),
        ({"decoder_base_dim": 0}, "decoder_base_dim=0"),
        ({"dim_mult": 4}, "dim_mult=4"),
        ({"dim_mult": [1, 2.0, 2, 3]}, "dim_mult"),
        ({"temperal_downsample": [False, True]}, "true or false for each of 3 levels"),
        ({"temperal_downsample": [0, 1, 1]}, "true or false for each of 3 levels"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal=8 is not allowed; allowed is 4, as the levels say"),
        ({"scale_factor_spatial": None}, "scale_factor_spatial=None"),
        ({"out_channels": 4}, "out_channels=4 is not allowed; allowed is in_channels=3"),
        ({"latents_mean": [0.0]}, "a number for each of z_dim=4 channels"),
        ({"latents_std": [1, 1, 1, 0]}, "a positive number for each of z_dim=4 channels"),
        ({"latents_std": None}, "latents_std=None"),
    ],
    ids=str,
)
def test_bad_configurations_are_named(tiny_directory, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        WanAutoencoder.from_directory(changed_config(tiny_directory, tmp_path, **changes))


def test_weights_of_another_network_are_refused(tiny_directory, tmp_path):
    with pytest.raises(CheckpointError, match=r"does not fit its config.json: .*missing: .*resnets.2"):
        WanAutoencoder.from_directory(changed_config(tiny_directory, tmp_path, num_res_blocks=2))


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 4, 16, 16, 3), r"4 frames; a video has 1 \+ 4·k of them .*, the nearest are 1 or 5"),
        ("encode", (1, 80, 16, 16, 3), "the nearest are 77 or 81"),
        ("encode", (1, 5, 20, 16, 3), "videos of 20x16; height and width must be multiples of 8"),
        ("encode", (1, 5, 16, 16, 4), r"videos of shape .*; allowed is \(batch, frames, height, width, 3\)"),
        ("encode", (5, 16, 16, 3), "videos of shape"),
        ("encode", (1, 0, 16, 16, 3), "videos of shape"),
        ("decode", (1, 2, 8, 8, 3), r"latents of shape .*; allowed is \(batch, frames, height, width, 4\)"),
    ],
)
def test_bad_arrays_are_named(method, shape, message):
    variant = "published order"
    autoencoder = WanAutoencoder.from_params(oracle.jax_config(variant), oracle.params_for(variant))
    with pytest.raises(UserError, match=message):
        getattr(autoencoder, method)(np.zeros(shape, np.float32))
    # The networks by themselves, as a trainer uses them, say the same.
    half = {"encode": WanEncoder, "decode": WanDecoder}[method]
    with pytest.raises(UserError, match=message):
        half(oracle.jax_config(variant)).init(jax.random.key(0), jnp.zeros(shape))
