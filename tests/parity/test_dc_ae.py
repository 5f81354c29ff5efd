"""DC-AE beside diffusers' AutoencoderDC: outputs, gradients, half precision, and weights both ways."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from convert.engine import export_model, import_model
from sana_jax.autoencoders import DCAutoencoder, load_autoencoder
from sana_jax.autoencoders.dc_ae import DCDecoder, DCEncoder
from sana_jax.autoencoders.dc_ae_config import DCAEConfig
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights import save_params
from sana_jax.weights.rules import places
from sana_jax.weights.safetensors_files import SafetensorsSource
from sana_jax.weights.tables.dc_ae import dc_ae_rules
from tests.compiling import AS_USERS_COMPILE
from tests.parity import dc_ae_oracle as oracle

OUTPUT_TOLERANCE = 2e-6
GRADIENT_TOLERANCE = 1e-5
BF16_FACTOR = 1.5
# For programs of which only values are wanted, not speed: LLVM's optimiser is most of the compile time.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
NETWORKS = {"encoder": DCEncoder, "decoder": DCDecoder}
PUBLISHED = {
    "f32c32_sana": 312_250_275,
    "f32c32_in": 323_356_460,
    "f32c32_mix": 323_356_460,
    "f64c128_in": None,
    "f64c128_mix": None,
    "f128c512_in": None,
    "f128c512_mix": None,
}


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def network(variant: str, half: str, dtype: jnp.dtype = jnp.float32, quick: bool = True):
    model = NETWORKS[half](oracle.jax_config(variant), dtype)
    options = QUICK_COMPILE if quick else AS_USERS_COMPILE
    return jax.jit(lambda params, x: model.apply({"params": params}, x), compiler_options=options)


def draw_input(variant: str, half: str, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A picture of this size, or latents of one."""
    config = oracle.jax_config(variant)
    if half == "encoder":
        return oracle.draw(oracle.BATCH, *size, config.in_channels, seed=seed)
    latent_size = (length // config.spatial_factor for length in size)
    return oracle.draw(oracle.BATCH, *latent_size, config.latent_channels, seed=seed)


@pytest.mark.parametrize("half", NETWORKS)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_outputs(variant, half):
    errors = {}
    for name, size in oracle.sizes(variant).items():
        # With seed 0 a token of the empty first stage sees others by weights of 0.002 in all, from a query that lies at
        # ReLU's corner: 500 times its rounding, to either side by the version of XLA.
        x = draw_input(variant, half, size, seed=1)
        expected = oracle.torch_output(oracle.torch_model(variant), half, x)
        assert np.std(expected) > 0.3
        found = network(variant, half)(oracle.params_for(variant)[half], x)
        errors[name] = oracle.relative_error(found, expected)
    assert {name: error for name, error in errors.items() if not error <= OUTPUT_TOLERANCE} == {}


@pytest.mark.parametrize("half", NETWORKS)
def test_output_as_users_compile_it(half):
    x = draw_input("sana", half, (64, 64))
    found = network("sana", half, quick=False)(oracle.params_for("sana")[half], x)
    assert oracle.relative_error(found, oracle.torch_output(oracle.torch_model("sana"), half, x)) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("half", NETWORKS)
@pytest.mark.parametrize("variant", ["sana", "in"])
def test_gradients(variant, half):
    x = draw_input(variant, half, (24, 40))
    model = NETWORKS[half](oracle.jax_config(variant))
    weights = oracle.draw(*jax.eval_shape(network(variant, half), oracle.params_for(variant)[half], x).shape, seed=3)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def gradients(params, x):
        return jax.grad(lambda params, x: (model.apply({"params": params}, x) * weights).sum(), (0, 1))(params, x)

    found = dict(zip(("params", "input"), gradients(oracle.params_for(variant)[half], x)))
    _, expected = oracle.torch_output_and_gradients(variant, half, x, weights)
    # Statistics of batch norms have no gradient on either side.
    pairs = jax.tree.map(lambda *pair: pair, found, expected)
    leaves = jax.tree_util.tree_leaves_with_path(pairs, is_leaf=lambda leaf: isinstance(leaf, tuple))
    errors = {
        jax.tree_util.keystr(path): oracle.relative_error(*pair) if pair[1].any() else np.abs(pair[0]).max()
        for path, pair in leaves
    }
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE} == {}


@pytest.mark.parametrize("half", NETWORKS)
@pytest.mark.parametrize("variant", ["sana", "in"])
def test_bfloat16_is_no_worse_than_torch(variant, half):
    """Errors of both beside float32, over several inputs since one can be lucky."""
    errors = []
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), oracle.params_for(variant)[half])
    for seed in range(4):
        x = draw_input(variant, half, (24, 40), seed)
        exact = oracle.torch_output(oracle.torch_model(variant), half, x)
        theirs = oracle.torch_output(oracle.torch_model(variant, torch.bfloat16), half, x)
        ours = network(variant, half, jnp.bfloat16)(params, x)
        assert ours.dtype == jnp.bfloat16
        errors.append([oracle.relative_error(side, exact) for side in (ours.astype(jnp.float32), theirs)])
    ours, theirs = np.mean(errors, 0)
    assert ours <= BF16_FACTOR * theirs, errors


# --- published sizes ------------------------------------------------------------------------------------------------


@functools.cache
def meta_state(member: str) -> dict[str, torch.Tensor]:
    fields = getattr(DCAEConfig, member)().to_dict()
    del fields["_class_name"]
    with torch.device("meta"):
        return AutoencoderDC(**fields).state_dict()


@pytest.mark.parametrize("member", PUBLISHED)
def test_rules_cover_the_published_networks(member):
    config = getattr(DCAEConfig, member)()
    wanted = places(dc_ae_rules(config), oracle.abstract_params(config))
    state = {name: tuple(t.shape) for name, t in meta_state(member).items() if "num_batches_tracked" not in name}
    assert {name: place.shape for name, place in wanted.items()} == state


@pytest.mark.parametrize(("member", "parameters"), PUBLISHED.items())
def test_parameter_counts(member, parameters):
    config = getattr(DCAEConfig, member)()
    flat = jax.tree_util.tree_leaves_with_path(oracle.abstract_params(config))
    counts = dict.fromkeys(NETWORKS, 0)
    for path, leaf in flat:
        # PyTorch does not count the statistics of batch norms among the parameters.
        counts[path[0].key] += 0 if path[-1].key in ("mean", "var") else leaf.size
    fields = {key: value for key, value in config.to_dict().items() if key != "_class_name"}
    with torch.device("meta"):
        expected = sum(p.numel() for p in AutoencoderDC(**fields).parameters())
    assert sum(counts.values()) == expected
    assert parameters in (None, expected)
    if member == "f32c32_sana":
        assert counts == {"encoder": 153_027_104, "decoder": 159_223_171}


# --- directories ----------------------------------------------------------------------------------------------------


def reference(variant: str, dtype: torch.dtype = torch.float32) -> tuple[np.ndarray, ...]:
    """Images, their scaled latents, other latents and their pictures."""
    model, config = oracle.torch_model(variant, dtype), oracle.jax_config(variant)
    images, latents = draw_input(variant, "encoder", (24, 40)), draw_input(variant, "decoder", (24, 40))
    encoded = oracle.torch_output(model, "encoder", images) * config.scaling_factor
    return images, encoded, latents, oracle.torch_output(model, "decoder", latents / config.scaling_factor)


def quiet_load(directory, **options) -> DCAutoencoder:
    return DCAutoencoder.from_directory(directory, say=lambda line: None, **options)


@pytest.mark.parametrize(
    ("variant", "saving"),
    [("sana", {}), ("in", {}), ("sana", {"max_shard_size": "100KB"})],
    ids=["sana", "in", "sana in shards"],
)
def test_published_directory(tmp_path, variant, saving):
    oracle.torch_model(variant).save_pretrained(tmp_path, **saving)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if not saving else 4)
    autoencoder = quiet_load(tmp_path)
    assert not autoencoder.weights.loaded
    images, encoded, latents, decoded = reference(variant)
    assert oracle.relative_error(autoencoder.encode(images), encoded) <= OUTPUT_TOLERANCE
    assert oracle.relative_error(autoencoder.decode(latents), decoded) <= OUTPUT_TOLERANCE
    autoencoder.free()
    assert not autoencoder.weights.loaded
    assert oracle.relative_error(autoencoder.decode(latents), decoded) <= OUTPUT_TOLERANCE
    assert set(autoencoder.programs) == {("encode", images.shape), ("decode", latents.shape)}


def test_bfloat16_variant(tmp_path):
    oracle.torch_model("sana", torch.bfloat16).save_pretrained(tmp_path, variant="bf16")
    images, encoded, latents, decoded = reference("sana")
    torch_errors = [
        oracle.relative_error(theirs, exact)
        for theirs, exact in zip(reference("sana", torch.bfloat16)[1::2], (encoded, decoded))
    ]
    autoencoder = quiet_load(tmp_path, dtype="bfloat16", variant="bf16")
    found = autoencoder.encode(images), autoencoder.decode(latents)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(autoencoder.weights.params)} == {"bfloat16"}
    assert {array.dtype.name for array in found} == {"float32"}
    for ours, theirs, exact in zip(found, torch_errors, (encoded, decoded)):
        assert oracle.relative_error(ours, exact) <= BF16_FACTOR * theirs
    with pytest.raises(FileNotFoundError, match="variants that are there: bf16"):
        quiet_load(tmp_path, variant="fp16")


def test_converted_directory(tmp_path):
    config = oracle.jax_config("in")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    save_params(tmp_path / "params", oracle.params_for("in"))
    autoencoder = load_autoencoder(tmp_path)
    assert isinstance(autoencoder, DCAutoencoder)
    assert autoencoder.config == config
    images, encoded, *_ = reference("in")
    assert oracle.relative_error(autoencoder.encode(images), encoded) <= OUTPUT_TOLERANCE


@pytest.mark.parametrize("variant", ["sana", "in"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_the_import(tmp_path, variant, dtype):
    """Tensor by tensor, the counts of batch norms too."""
    model = oracle.torch_model(variant, dtype)
    model.save_pretrained(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours", report=lambda line: None)
    export_model(tmp_path / "ours", tmp_path / "back", report=lambda line: None)
    source, back = (
        SafetensorsSource(tmp_path / folder / "diffusion_pytorch_model.safetensors") for folder in ("theirs", "back")
    )
    assert any(name.endswith("num_batches_tracked") for name in source.tensors) == (variant == "in")
    assert back.tensors == source.tensors
    for key in source.tensors:
        assert back.read(key).tobytes() == source.read(key).tobytes()
    loaded = AutoencoderDC.from_pretrained(tmp_path / "back", torch_dtype=dtype, low_cpu_mem_usage=False).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


def test_export_without_counts_has_zeros(tmp_path):
    """Weights that were trained here have none."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(oracle.jax_config("in").to_dict()))
    save_params(tmp_path / "ours" / "params", oracle.params_for("in"))
    export_model(tmp_path / "ours", tmp_path / "back", report=lambda line: None)
    back = SafetensorsSource(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    counts = [back.read(name) for name in back.tensors if name.endswith("num_batches_tracked")]
    assert len(counts) == 1
    assert not any(counts)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dc_ae") / "vae"
    oracle.torch_model("sana").save_pretrained(directory)
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
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL'; allowed here: AutoencoderDC"),
        ({"colour": 3}, "unknown fields .'colour'."),
        ({"latent_channels": "32"}, "latent_channels='32' is not allowed; allowed is a whole number"),
        ({"latent_channels": True}, "latent_channels=True"),
        ({"scaling_factor": None}, "scaling_factor=None is not allowed; allowed is a positive number"),
        ({"scaling_factor": 0}, "scaling_factor=0"),
        ({"encoder_out_shortcut": 1}, "encoder_out_shortcut=1 is not allowed; allowed is true or false"),
        ({"encoder_block_types": "Transformer"}, "'ResBlock' or 'EfficientViTBlock', one for all stages or a list"),
        ({"decoder_block_types": ["ResBlock"]}, "one value for each of the 4 stages"),
        ({"decoder_norm_types": [["rms_norm"]] * 4}, "decoder_norm_types"),
        ({"decoder_conv_act_fn": "gelu"}, "'relu' or 'silu'"),
        ({"upsample_block_type": ["interpolate"]}, "upsample_block_type"),
        ({"downsample_block_type": "max"}, "downsample_block_type='max'"),
        ({"encoder_block_out_channels": 8}, "encoder_block_out_channels=8"),
        ({"encoder_block_out_channels": [8, 16.0, 16, 32]}, "encoder_block_out_channels"),
        ({"encoder_block_out_channels": [8, 16, 24, 32]}, "widths that divide four times"),
        ({"encoder_layers_per_block": [1, 0, 1, 1]}, "0 for the first stage"),
        ({"encoder_qkv_multiscales": [[], [], [4], [5]]}, "odd kernel sizes"),
        ({"encoder_qkv_multiscales": 5}, "encoder_qkv_multiscales=5"),
        ({"latent_channels": 5}, "multiple of latent_channels=5"),
        ({"attention_head_dim": 64}, "attention_head_dim or more"),
    ],
    ids=str,
)
def test_bad_configurations_are_named(tiny_directory, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        DCAutoencoder.from_directory(changed_config(tiny_directory, tmp_path, **changes))


def test_weights_of_another_network_are_refused(tiny_directory, tmp_path):
    with pytest.raises(CheckpointError, match=r"does not fit its config.json: .*encoder.down_blocks.0.1.conv1.weight"):
        DCAutoencoder.from_directory(changed_config(tiny_directory, tmp_path, encoder_layers_per_block=[2, 1, 1, 1]))


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 60, 64, 3), "images of 60x64; height and width must be multiples of 8"),
        ("encode", (1, 64, 64, 4), r"images of shape \(1, 64, 64, 4\); allowed is \(batch, height, width, 3\)"),
        ("encode", (64, 64, 3), "images of shape"),
        ("encode", (1, 0, 64, 3), "images of shape"),
        ("decode", (1, 8, 8, 3), r"latents of shape \(1, 8, 8, 3\); allowed is \(batch, height, width, 8\)"),
    ],
)
def test_bad_arrays_are_named(method, shape, message):
    autoencoder = DCAutoencoder.from_params(oracle.jax_config("sana"), oracle.params_for("sana"))
    with pytest.raises(UserError, match=message):
        getattr(autoencoder, method)(np.zeros(shape, np.float32))
    # The networks by themselves, as a trainer uses them, say the same.
    half = {"encode": "encoder", "decode": "decoder"}[method]
    with pytest.raises(UserError, match=message):
        NETWORKS[half](oracle.jax_config("sana")).init(jax.random.key(0), jnp.zeros(shape))
