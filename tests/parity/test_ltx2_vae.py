"""The LTX-2 autoencoder beside diffusers' AutoencoderKLLTX2Video: outputs, tiles, half precision, weights both ways."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video

from convert.engine import export_model, import_model
from convert.families import parameter_count
from sana_jax.autoencoders import LTX2VideoAutoencoder, load_autoencoder
from sana_jax.autoencoders.ltx2 import LTX2Decoder, LTX2Encoder
from sana_jax.autoencoders.ltx2_config import LTX2AutoencoderConfig
from sana_jax.autoencoders.tiling import FrameTiles, Tiles
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights.rules import places
from sana_jax.weights.safetensors_files import SafetensorsSource
from sana_jax.weights.tables.ltx2_vae import ltx2_vae_rules
from tests.parity import ltx2_vae_oracle as oracle

TOLERANCE = 3e-6
BF16_FACTOR = 1.5
PUBLISHED, OTHER, ONE_STAGE = oracle.VARIANTS
# Latent frames, height and width.
CASES = [(PUBLISHED, (3, 2, 3)), (OTHER, (3, 3, 5)), (OTHER, (1, 2, 2)), (ONE_STAGE, (2, 5, 2))]
WHOLE_VIDEO = FrameTiles(10**6, 10**6)
WHOLE_FRAMES = Tiles((10**6, 10**6), (10**6, 10**6))


@pytest.fixture(autouse=True, scope="module")
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def network(variant: str, half: str, dtype: jnp.dtype = jnp.float32, **changes):
    kind = {"encoder": LTX2Encoder, "decoder": LTX2Decoder}[half]
    model = kind(oracle.jax_config(variant, **changes), dtype)
    return jax.jit(lambda params, x: model.apply({"params": params}, x)[0])


def draw_videos(variant: str, latent_size: tuple[int, int, int], seed: int = 0, batch: int = 2) -> np.ndarray:
    config, (frames, height, width) = oracle.jax_config(variant), latent_size
    side = config.spatial_factor
    return oracle.draw(batch, 1 + (frames - 1) * config.temporal_factor, height * side, width * side, 3, seed=seed)


@pytest.mark.parametrize(("variant", "size"), CASES, ids=str)
def test_encoding(variant, size):
    videos = draw_videos(variant, size)
    expected = oracle.torch_moments(oracle.torch_model(variant), videos)
    found = network(variant, "encoder")(oracle.params_for(variant)["encoder"], videos)
    assert np.std(expected) > 0.3
    assert oracle.relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize("causal", [False, True], ids=["not causal", "causal"])
@pytest.mark.parametrize(("variant", "size"), CASES, ids=str)
def test_decoding(variant, size, causal):
    """The published class decodes causally when it is told to, whatever its configuration says."""
    latents = oracle.draw(2, *size, oracle.LATENT_CHANNELS)
    expected = oracle.torch_decoded(oracle.torch_model(variant), latents, causal)
    found = network(variant, "decoder", decoder_causal=causal)(oracle.params_for(variant)["decoder"], latents)
    assert np.std(expected) > 0.05
    assert np.abs(expected).max() < 1
    assert oracle.relative_error(found, expected) <= TOLERANCE


def test_an_encoder_that_is_not_causal():
    model = oracle.randomise(AutoencoderKLLTX2Video(**oracle.fields(ONE_STAGE, encoder_causal=False)), 2)
    videos = draw_videos(ONE_STAGE, (3, 2, 3))
    expected = oracle.torch_moments(model, videos)
    found = network(ONE_STAGE, "encoder", encoder_causal=False)(oracle.params_for(ONE_STAGE)["encoder"], videos)
    assert oracle.relative_error(found, expected) <= TOLERANCE
    causal = oracle.torch_moments(oracle.torch_model(ONE_STAGE), videos)
    assert oracle.relative_error(causal, expected) > 1e-2  # or the comparison would say nothing


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_bfloat16_is_no_worse_than_torch(half):
    """Errors of both beside float32, over several inputs since one can be lucky."""
    run = {"encoder": oracle.torch_moments, "decoder": oracle.torch_decoded}[half]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), oracle.params_for(ONE_STAGE)[half])
    errors = []
    for seed in range(4):
        x = draw_videos(ONE_STAGE, (3, 3, 5), seed) if half == "encoder" else oracle.draw(2, 3, 3, 5, 8, seed=seed)
        exact = run(oracle.torch_model(ONE_STAGE), x)
        theirs = run(oracle.torch_model(ONE_STAGE, torch.bfloat16), x)
        ours = network(ONE_STAGE, half, jnp.bfloat16)(params, x)
        assert ours.dtype == jnp.bfloat16
        errors.append([oracle.relative_error(side, exact) for side in (ours.astype(jnp.float32), theirs)])
    ours, theirs = np.mean(errors, 0)
    assert ours <= BF16_FACTOR * theirs, errors


# --- tiles ----------------------------------------------------------------------------------------------------------


def autoencoder_of(variant: str, **options) -> LTX2VideoAutoencoder:
    options = {"say": lambda line: None} | options
    return LTX2VideoAutoencoder.from_params(oracle.jax_config(variant), oracle.params_for(variant), **options)


def torch_tiled(variant: str, tiles: Tiles, frame_tiles: FrameTiles) -> AutoencoderKLLTX2Video:
    model = AutoencoderKLLTX2Video(**oracle.fields(variant))
    model.load_state_dict(oracle.torch_model(variant).state_dict())
    (height, width), (row, column) = tiles.size, tiles.stride
    model.enable_tiling(height, width, frame_tiles.size, row, column, frame_tiles.stride)
    model.use_framewise_decoding = True
    return model.eval()


# Latents are of 4 pixels and 2 frames: tiles of 4x5 every 3x3, pieces of 4 every 3 with one more before them.
SOME_TILES, SOME_FRAMES = Tiles((16, 20), (12, 12)), FrameTiles(8, 6)


@pytest.mark.parametrize(
    ("tiles", "frame_tiles"),
    [(SOME_TILES, WHOLE_VIDEO), (WHOLE_FRAMES, SOME_FRAMES), (SOME_TILES, SOME_FRAMES)],
    ids=["space", "time", "both"],
)
def test_decoding_in_tiles(tiles, frame_tiles):
    """Cutting, networks, blending and statistics together; tiles and pieces of unequal sizes."""
    latents = oracle.draw(1, 9, 5, 8, oracle.LATENT_CHANNELS)
    expected = oracle.pipelines_decode(torch_tiled(ONE_STAGE, tiles, frame_tiles), latents)
    autoencoder = autoencoder_of(ONE_STAGE, tiles=tiles, frame_tiles=frame_tiles)
    assert np.abs(expected).max() < 1
    assert oracle.relative_error(autoencoder.decode(latents, tiling=True), expected) <= TOLERANCE
    whole = oracle.pipelines_decode(oracle.torch_model(ONE_STAGE), latents)
    assert oracle.relative_error(expected, whole) > 1e-2  # or the comparison would say nothing


def test_encoding_in_tiles():
    videos = draw_videos(ONE_STAGE, (2, 7, 8), batch=1)
    expected = oracle.pipelines_encode(torch_tiled(ONE_STAGE, SOME_TILES, WHOLE_VIDEO), videos)
    autoencoder = autoencoder_of(ONE_STAGE, tiles=SOME_TILES)
    assert oracle.relative_error(autoencoder.encode(videos, tiling=True), expected) <= TOLERANCE


@pytest.mark.parametrize("frames", [6, 7])
def test_lengths_in_pieces(frames):
    """Whatever is left for the last piece, nothing included."""
    latents = oracle.draw(1, frames, 2, 2, oracle.LATENT_CHANNELS)
    expected = oracle.pipelines_decode(torch_tiled(ONE_STAGE, WHOLE_FRAMES, SOME_FRAMES), latents)
    found = autoencoder_of(ONE_STAGE, tiles=WHOLE_FRAMES, frame_tiles=SOME_FRAMES).decode(latents, tiling=True)
    assert found.shape == expected.shape
    assert oracle.relative_error(found, expected) <= TOLERANCE


# --- published size -------------------------------------------------------------------------------------------------


def test_the_published_network():
    """Names, shapes and numbers of parameters, and the defaults of the published class."""
    published = {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
    with torch.device("meta"):
        model = AutoencoderKLLTX2Video(**published)
        assert LTX2AutoencoderConfig.from_dict(dict(AutoencoderKLLTX2Video().config)) == LTX2AutoencoderConfig()
    config = LTX2AutoencoderConfig.from_dict(dict(model.config))
    assert config == LTX2AutoencoderConfig.published()
    assert (config.temporal_factor, config.spatial_factor) == config.decoder_factors == (8, 32)
    params = oracle.abstract_params(config)
    wanted = places(ltx2_vae_rules(config), params)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(state) == 184
    assert {name: place.shape for name, place in wanted.items()} == state
    counts = {half: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for half, tree in params.items()}
    assert counts == {"encoder": 694_098_881, "decoder": 528_380_720, "statistics": 256}
    assert parameter_count(params) == sum(p.numel() for p in model.parameters()) == 1_222_479_601


# --- directories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [OTHER, ONE_STAGE])
def test_published_directory(tmp_path, variant):
    """With statistics, and with a scaling factor in one of them."""
    model = oracle.torch_model(variant)
    model.save_pretrained(tmp_path)
    autoencoder = load_autoencoder(tmp_path)
    assert isinstance(autoencoder, LTX2VideoAutoencoder)
    assert not autoencoder.weights.loaded
    videos, latents = draw_videos(variant, (3, 2, 3)), oracle.draw(2, 3, 2, 3, oracle.LATENT_CHANNELS)
    encoded, decoded = oracle.pipelines_encode(model, videos), oracle.pipelines_decode(model, latents)
    assert np.abs(decoded).max() < 1
    assert oracle.relative_error(autoencoder.encode(videos), encoded) <= TOLERANCE
    assert oracle.relative_error(autoencoder.decode(latents), decoded) <= TOLERANCE
    # the first latent of a clip is that of its first frame as a picture
    first = autoencoder.encode(videos[:, :1])
    assert oracle.relative_error(first, encoded[:, :1]) <= TOLERANCE
    autoencoder.free()
    assert not autoencoder.weights.loaded


def test_bfloat16_variant_keeps_its_statistics(tmp_path):
    oracle.torch_model(ONE_STAGE, torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    videos = draw_videos(ONE_STAGE, (2, 3, 5))
    exact = oracle.pipelines_encode(oracle.torch_model(ONE_STAGE), videos)
    theirs = oracle.pipelines_encode(oracle.torch_model(ONE_STAGE, torch.bfloat16), videos)
    autoencoder = LTX2VideoAutoencoder.from_directory(tmp_path, dtype="bfloat16", variant="bf16", say=lambda line: None)
    found = autoencoder.encode(videos)
    params = autoencoder.weights.params
    assert {leaf.dtype.name for half in ("encoder", "decoder") for leaf in jax.tree.leaves(params[half])} == {
        "bfloat16"
    }
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params["statistics"])} == {"float32"}
    assert oracle.relative_error(found, exact) <= BF16_FACTOR * oracle.relative_error(theirs, exact)


@pytest.mark.parametrize(("variant", "dtype"), [(PUBLISHED, torch.float32), (OTHER, torch.bfloat16)])
def test_export_is_the_import(tmp_path, variant, dtype):
    """Tensor by tensor, and the converted directory opens as well."""
    oracle.torch_model(variant, dtype).save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours", report=lambda line: None)
    export_model(tmp_path / "ours", tmp_path / "back", report=lambda line: None)
    source, back = (
        SafetensorsSource(tmp_path / folder / "diffusion_pytorch_model.safetensors") for folder in ("theirs", "back")
    )
    assert back.tensors == source.tensors
    for key in source.tensors:
        assert back.read(key).tobytes() == source.read(key).tobytes()
    ours = load_autoencoder(tmp_path / "ours")
    assert isinstance(ours, LTX2VideoAutoencoder)
    assert ours.config == oracle.jax_config(variant)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ltx2") / "vae"
    oracle.torch_model(PUBLISHED).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKLLTXVideo"}, "'AutoencoderKLLTXVideo'; allowed here: AutoencoderKLLTX2Video"),
        ({"timestep_conditioning": True}, "timestep_conditioning=True is not allowed; allowed is False .no published"),
        ({"decoder_inject_noise": [False, True, False, False]}, "decoder_inject_noise"),
        ({"spatio_temporal_scaling": False}, "every stage of a published encoder halves something"),
        ({"patch_size_t": 2}, "patch_size_t=2"),
        ({"down_block_types": ["LTXVideoDownBlock3D"] * 4}, "down_block_types"),
        ({"downsample_type": ["conv"] * 4}, "a list of 4, each of them spatial, temporal, spatiotemporal"),
        ({"block_out_channels": [8, 16, 16, 28]}, "a multiple of the 8 pixels"),
        ({"layers_per_block": [1, 1, 1, 1]}, "layers_per_block=.*allowed is a list of 5 whole numbers"),
        ({"decoder_block_out_channels": [8, 16, 16]}, "the width that the stage below hands on"),
        ({"upsample_factor": [2, 2, 3]}, "divide by 3"),
        ({"upsample_residual": [True]}, "upsample_residual"),
        ({"out_channels": 4}, "out_channels=4 is not allowed; allowed is in_channels=3"),
        ({"latent_channels": "8"}, "latent_channels='8' is not allowed; allowed is a whole number"),
        ({"scaling_factor": 0}, "scaling_factor=0"),
        ({"decoder_spatial_padding_mode": "circular"}, "one of zeros, reflect"),
        ({"spatial_compression_ratio": 64}, "spatial_compression_ratio=64 is not allowed; allowed is 32, as"),
        ({"temporal_compression_ratio": 16}, "temporal_compression_ratio=16"),
        ({"encoder_causal": None}, "encoder_causal=None"),
        ({"colour": 3}, "unknown fields .'colour'."),
    ],
    ids=str,
)
def test_bad_configurations_are_named(tiny_directory, tmp_path, changes, message):
    config = json.loads((tiny_directory / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tiny_directory / "diffusion_pytorch_model.safetensors"
    (tmp_path / weights.name).symlink_to(weights)
    with pytest.raises(UserError, match=message):
        LTX2VideoAutoencoder.from_directory(tmp_path)


def test_halves_of_other_factors_are_refused():
    """The configuration is one of two networks, which are not each other's inverse."""
    config = oracle.jax_config(PUBLISHED, upsample_type=("spatiotemporal", "spatiotemporal", "temporal"))
    with pytest.raises(UserError, match=r"of \(frames, rows\) \(8, 32\) per latent with a decoder of \(8, 16\)"):
        LTX2VideoAutoencoder.from_params(config, {})


def test_weights_of_another_shape_are_named(tiny_directory, tmp_path):
    config = dataclasses.replace(oracle.jax_config(PUBLISHED), layers_per_block=(2, 1, 1, 1, 1))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    weights = tiny_directory / "diffusion_pytorch_model.safetensors"
    (tmp_path / weights.name).symlink_to(weights)
    with pytest.raises(CheckpointError, match=r"encoder\.down_blocks\.0\.resnets\.1\.conv1\.conv"):
        load_autoencoder(tmp_path)
