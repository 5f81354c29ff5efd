"""SigLIP's vision tower against transformers', from random weights: network, files, preprocessing, encoder."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionModel
from transformers import SiglipVisionConfig as TorchVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from sana_jax.errors import CheckpointError, UserError
from sana_jax.image_encoders import Preprocessing, SiglipImageEncoder
from sana_jax.models.siglip import SiglipVision, SiglipVisionConfig, init_params
from sana_jax.weights import save_params
from sana_jax.weights.rules import TreeSource, read_params
from sana_jax.weights.tables.siglip import siglip_rules
from sana_jax.weights.trees import abstract_tree
from tests.parity.gemma_oracle import StateDict, relative_error, to_numpy

torch.set_num_threads(1)
TOLERANCE = 2e-6
# 29 pixels in patches of 8 leave 5 at the right and at the bottom unseen.
TINY = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 29,
    "patch_size": 8,
}  # fmt: skip
VARIANTS = {
    "leftover pixels": {},
    "whole patches": {"image_size": 20, "patch_size": 4, "num_attention_heads": 6, "layer_norm_eps": 1e-3},
    "no head": {"vision_use_head": False, "num_hidden_layers": 2},
}
PREPROCESSOR = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.5, 0.3, 0.7], "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor",
    "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 29, "width": 29},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * draw)
            elif parameter.ndim < 2 or "position" in name or "probe" in name:
                parameter.copy_(0.5 * draw)
            else:
                scale = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(scale * draw / parameter[0].numel() ** 0.5)
    return model.eval()


def torch_model(variant: str) -> SiglipVisionModel:
    config = TorchVisionConfig(**{**TINY, **VARIANTS[variant]}, attn_implementation="eager")
    return randomise(SiglipVisionModel(config), list(VARIANTS).index(variant))


def abstract(config: SiglipVisionConfig) -> dict:
    return abstract_tree(jax.eval_shape(lambda: init_params(SiglipVision(config), jax.random.key(0))))


@pytest.mark.parametrize("scan_blocks", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output(variant, scan_blocks):
    config, model = SiglipVisionConfig(**{**TINY, **VARIANTS[variant]}), torch_model(variant)
    side = config.image_size
    pictures = np.random.default_rng(0).standard_normal((3, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()))
    params = read_params(StateDict(model.state_dict()), siglip_rules(config, ""), abstract(config))
    network = SiglipVision(config, scan_blocks=scan_blocks)
    found = jax.jit(network.apply)({"params": params}, pictures)
    assert relative_error(found.patches, to_numpy(expected.last_hidden_state)) <= TOLERANCE
    if not config.vision_use_head:
        assert found.pooled is None
        return
    assert relative_error(found.pooled, to_numpy(expected.pooler_output)) <= TOLERANCE
    changed = jax.tree.map(lambda leaf: leaf, params)
    changed["head"]["probe"] = params["head"]["probe"] * 1.01
    other = jax.jit(network.apply)({"params": changed}, pictures)
    assert relative_error(other.pooled, found.pooled) > 10 * TOLERANCE


def test_bfloat16_stays_near():
    config, model = SiglipVisionConfig(**TINY), torch_model("leftover pixels")
    pictures = np.random.default_rng(0).standard_normal((2, 29, 29, 3)).astype(np.float32)
    with torch.no_grad():
        exact = to_numpy(model(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())).pooler_output)
        theirs = torch_model("leftover pixels").to(torch.bfloat16)
        rough = to_numpy(theirs(torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())).pooler_output)
    params = read_params(StateDict(model.state_dict()), siglip_rules(config, ""), abstract(config))
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    found = jax.jit(SiglipVision(config, dtype=jnp.bfloat16).apply)({"params": params}, pictures)
    assert found.pooled.dtype == jnp.bfloat16
    ours = relative_error(np.asarray(found.pooled, np.float32), exact)
    assert ours <= 1.5 * relative_error(rough, exact)


def test_every_tensor_goes_out_and_in_again():
    config, model = SiglipVisionConfig(**TINY), torch_model("leftover pixels")
    state = StateDict(model.state_dict())
    rules = siglip_rules(config, "")
    out = TreeSource(read_params(state, rules, abstract(config)), rules)
    assert set(out.tensors) == set(state.tensors)
    for name in out.tensors:
        np.testing.assert_array_equal(out.read(name), state.read(name))


# --- configurations -------------------------------------------------------------------------------------------------


def test_published_configurations():
    """A whole SigLIP names what differs from the defaults only; transformers writes everything."""
    assert SiglipVisionConfig.from_dict({"model_type": "siglip", "vision_config": {"hidden_size": 1152,
        "image_size": 384, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_attention_heads": 16,
        "num_hidden_layers": 27, "patch_size": 14}}).num_patches == 729  # fmt: skip
    assert (
        SiglipVisionConfig.from_dict({"model_type": "siglip", "text_config": {}, "vision_config": {}}).num_patches
        == 196
    )
    written = TorchVisionConfig(**TINY).to_dict()
    assert SiglipVisionConfig.from_dict(written) == SiglipVisionConfig(**TINY)
    whole = SiglipConfig(vision_config=TINY, text_config={}).to_dict()
    assert SiglipVisionConfig.from_dict(whole) == SiglipVisionConfig(**TINY)
    again = TorchVisionConfig(**SiglipVisionConfig(**TINY).to_dict())
    assert again.image_size == 29


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"model_type": "siglip2", "vision_config": {}}, "one fixed resolution"),
        ({"model_type": "clip"}, "siglip"),
        ({"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ({"num_attention_heads": 7}, "a divisor of 768"),
        ({"image_size": 10**9}, "image_size"),
        ({"model_type": "siglip", "vision_config": [1]}, "vision_config"),
        ({"rope_theta": 3}, "rope_theta"),
    ],
)
def test_bad_configurations(values, part):
    with pytest.raises(UserError, match=part):
        SiglipVisionConfig.from_dict(values)


# --- the encoder ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with a whole SigLIP as published, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("siglip")
    text = SiglipTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    model = SiglipModel(SiglipConfig(vision_config=TINY, text_config=text.to_dict()))
    randomise(model, 7)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return directory, model.vision_model


def photographs() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    sizes = ((50, 31), (29, 29), (17, 90))
    smooth = [Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in sizes]
    return [picture.resize(size, Image.Resampling.BICUBIC) for picture, size in zip(smooth, sizes)]


@pytest.mark.parametrize(
    "change", [{}, {"resample": 2}, {"do_resize": False}, {"do_normalize": False}, {"do_rescale": False}]
)
def test_preprocessing(change):
    pictures = photographs() if change.get("do_resize", True) else photographs()[1:2]
    values = {**PREPROCESSOR, **change}
    processor = SiglipImageProcessorPil(**{key: value for key, value in values.items() if "class" not in key})
    expected = processor(pictures, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    found = Preprocessing.from_dict(values)(pictures)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"image_processor_type": "CLIPImageProcessor"}, {"size": {"shortest_edge": 224}}, {"do_center_crop": True},
     {"image_std": [0, 1, 1]}, {"image_mean": [1, 2]}, {"resample": 9}, {"do_resize": "yes"}, {"rescale_factor": None}],
)  # fmt: skip
def test_preprocessing_that_is_not_done_here(change):
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        Preprocessing.from_dict({**PREPROCESSOR, **change})


def test_encoder(whole, capsys):
    directory, model = whole
    encoder = SiglipImageEncoder.from_directory(directory, batch_size=2)
    assert not encoder.weights.loaded
    pictures = photographs()
    with torch.no_grad():
        expected = model(torch.from_numpy(encoder.preprocessing(pictures).transpose(0, 3, 1, 2).copy()))
    found = encoder.encode(pictures)
    assert found.dtype == np.float32
    assert found.shape == (3, *encoder.shape) == (3, 48)
    assert relative_error(found, to_numpy(expected.pooler_output)) <= TOLERANCE
    assert capsys.readouterr().out.count("compiling") == 1  # the last, smaller part was filled up
    patches = dataclasses.replace(encoder, features="patches")
    assert relative_error(patches.encode(pictures), to_numpy(expected.last_hidden_state)) <= TOLERANCE
    assert patches.shape == (9, 48)
    unit = dataclasses.replace(encoder, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit.encode(pictures), axis=-1), 1, rtol=1e-6)
    assert len({encoder.id, patches.id, unit.id}) == 3
    assert SiglipImageEncoder.from_directory(directory).id == encoder.id
    encoder.free()
    assert not encoder.weights.loaded
    np.testing.assert_array_equal(encoder.encode(pictures[:2]), found[:2])


def test_a_converted_directory_and_a_tower_alone(whole, tmp_path):
    directory, model = whole
    encoder = SiglipImageEncoder.from_directory(directory)
    expected = encoder.encode(photographs())
    for name in ("converted", "alone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        (tmp_path / name / "config.json").write_text(json.dumps(encoder.config.to_dict()))
    save_params(tmp_path / "converted" / "params", encoder.weights.params)
    model.save_pretrained(tmp_path / "alone")
    (tmp_path / "alone" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    for name in ("converted", "alone"):
        np.testing.assert_array_equal(
            SiglipImageEncoder.from_directory(tmp_path / name).encode(photographs()), expected
        )


def test_encoder_refuses(whole, tmp_path):
    directory, _ = whole
    with pytest.raises(UserError, match="float16"):
        SiglipImageEncoder.from_directory(directory, dtype="float16")
    with pytest.raises(UserError, match="no pictures"):
        SiglipImageEncoder.from_directory(directory).encode([])
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        SiglipImageEncoder.from_directory(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, "size": {"height": 8, "width": 8}}))
    with pytest.raises(UserError, match="8x8"):
        SiglipImageEncoder.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model", **TINY, "hidden_size": 24}))
    with pytest.raises(CheckpointError, match="of another shape"):
        SiglipImageEncoder.from_directory(tmp_path)
