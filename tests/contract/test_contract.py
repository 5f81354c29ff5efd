"""What weights need of the computation: recognised, carried along, enforced."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs.published import PUBLISHED_TRANSFORMERS
from sana_jax.contract import Contract, contract_of, family_name, infer_contract, license_of, names_of
from sana_jax.errors import UserError
from sana_jax.models.controlnet import SanaControlNetConfig
from sana_jax.models.sana import SanaConfig

ORIGINAL = "Sana_1600M_1024px_diffusers"
SCHEDULER = {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0}


def contract(name, config=None, stored=("float32",), **kwargs) -> Contract:
    config = config or PUBLISHED_TRANSFORMERS[name].config
    return contract_of(config, names=[name], stored={"transformer": stored}, **kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_the_original_weights_are_refused_but_with_their_saturation(dtype, stored):
    found = contract(ORIGINAL, stored=(stored,))
    assert found.fp16_saturation is True
    with pytest.raises(UserError, match=r"±65504.*--emulate-fp16-saturation.*Sana_1600M_1024px_BF16"):
        found.check(dtype)
    assert found.check(dtype, emulate_fp16_saturation=True) is None
    assert found.check("float16") is None


@pytest.mark.parametrize(
    "path",
    [
        f"/models/{ORIGINAL}",
        f"/cache/models--Efficient-Large-Model--{ORIGINAL}/snapshots/0123abcd",
        f"/models/{ORIGINAL}/transformer",
        "/w/Sana_1600M_1024px/checkpoints/Sana_1600M_1024px.pth",
        "/w/sana_1600m_1024px",
        "/w/my_Sana_1600M_1024px_copy",
    ],
)
def test_names_that_tell(path):
    found = contract_of(SanaConfig(), names=names_of(path), stored={"transformer": ["float32"]})
    assert found.fp16_saturation is True
    assert found.source == "Sana_1600M_1024px"


def test_the_bf16_checkpoint_is_another_one():
    for path in ("/m/Sana_1600M_1024px_BF16_diffusers", "/c/models--o--Sana_1600M_1024px_BF16_diffusers/snapshots/ab"):
        found = contract_of(SanaConfig(), names=names_of(path), stored={"transformer": ["float32"]})
        assert found.fp16_saturation is False
        assert found.compute_dtype == "bfloat16"
        assert found.check("float32") is None
        with pytest.raises(UserError, match="leave the option out"):
            found.check("float32", emulate_fp16_saturation=True)
        with pytest.raises(UserError, match="allowed are bfloat16, float32"):
            found.check("float16")


def test_a_renamed_directory_is_recognised_by_float16_storage():
    unnamed = contract("model", SanaConfig(), stored=("float16",))
    assert unnamed.fp16_saturation is True
    assert contract("model", SanaConfig(), stored=("bfloat16",)).fp16_saturation is False
    doubtful = contract("model", SanaConfig(), stored=("float32",))
    assert doubtful.fp16_saturation is None
    assert "sources conflict" in doubtful.check("float32")
    assert doubtful.check("float32", emulate_fp16_saturation=True) is None
    # networks with normalised q and k were never trained in float16
    assert contract("model", SanaConfig.sana15_1600m(), stored=("float16",)).fp16_saturation is False


@pytest.mark.parametrize(
    "name", ["Sana_600M_512px_diffusers", "Sana_600M_1024px_diffusers", "Sana_1600M_512px_MultiLing_diffusers"]
)
def test_where_sources_conflict_a_line_says_so(name):
    found = contract(name, stored=("float16",))
    assert found.dtypes[0] == "float16"
    assert "--emulate-fp16-saturation" in found.check("bfloat16")
    assert found.check("float16") is None


@pytest.mark.parametrize("name", [n for n, p in PUBLISHED_TRANSFORMERS.items() if p.dtype == "bfloat16"])
def test_newer_checkpoints_take_both_wide_dtypes(name):
    found = contract(name, scheduler=SCHEDULER)
    assert found.check("bfloat16") is None
    assert found.check("float32") is None
    assert found.compute_dtype == "bfloat16"
    sprint = PUBLISHED_TRANSFORMERS[name].config.guidance_embeds
    assert found.flow_shift == (None if sprint else 3.0)
    assert found.image_size == 32 * PUBLISHED_TRANSFORMERS[name].config.sample_size


def test_own_small_networks_have_no_warning():
    tiny = SanaConfig.sana_600m(num_layers=2)
    found = contract("mine", tiny)
    assert found.check("float32") is None
    assert found.check("bfloat16") is None
    assert found.compute_dtype == "float32"
    assert found.family == "SANA of 2 blocks, width 1152"


def test_families():
    names = {family_name(published.config) for published in PUBLISHED_TRANSFORMERS.values()}
    assert names == {
        "SANA 0.6B",
        "SANA 1.6B",
        "SANA-1.5 1.6B",
        "SANA-1.5 4.8B",
        "SANA-Sprint 0.6B",
        "SANA-Sprint 1.6B",
    }
    assert family_name(SanaControlNetConfig.controlnet_600m()) == "ControlNet 0.6B"
    assert family_name(SanaControlNetConfig()) == "ControlNet 1.6B"
    assert family_name(SanaControlNetConfig(num_layers=3)) == "ControlNet of 3 blocks, width 2240"


def test_dtypes_of_the_other_networks():
    for stored, wide in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")):
        found = contract_of(SanaConfig(), names=["x"], stored={"vae": [stored], "text_encoder": [stored]})
        assert found.autoencoder_dtype == found.text_encoder_dtype == wide


def test_there_and_back():
    found = contract(ORIGINAL, scheduler=SCHEDULER, license="nvidia")
    assert Contract.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    "values",
    [
        3,
        [],
        {},
        {"family": 3},
        {"family": "x", "colour": 1},
        {"family": "x", "dtypes": "float32"},
        {"family": "x", "dtypes": []},
        {"family": "x", "dtypes": ["int8"]},
        {"family": "x", "dtypes": [[]]},
        {"family": "x", "fp16_saturation": "no"},
        {"family": "x", "autoencoder_dtype": "float16"},
        {"family": "x", "autoencoder_dtype": None},
        {"family": "x", "flow_shift": True},
        {"family": "x", "size_multiple": 0},
        {"family": "x", "license": "x" * 10_000},
    ],
)
def test_damaged_contracts(values):
    with pytest.raises(UserError):
        Contract.from_dict(values, "contract of model_index.json")


def model_directory(path, card=None, index=None):
    from sana_jax.weights.safetensors_files import TensorInfo, write_safetensors

    for folder, stem, dtype in (
        ("transformer", "diffusion_pytorch_model", np.float16),
        ("vae", "diffusion_pytorch_model", np.float32),
        ("text_encoder", "model", np.float16),
    ):
        array = np.zeros(2, dtype)
        info = {"a": TensorInfo(array.dtype, (2,))}
        write_safetensors(path / folder / f"{stem}.safetensors", info, [("a", array)])
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (path / "transformer" / "config.json").write_text(json.dumps(SanaConfig().to_dict()))
    (path / "model_index.json").write_text(json.dumps(index or {"_class_name": "SanaPipeline"}))
    if card is not None:
        (path / "README.md").write_text(card)
    return path


def test_a_directory(tmp_path):
    card = "---\nlicense: other\nlicense_name: some-licence\nlicense_link: https://x/LICENSE\ntags: [a]\n---\n# Model\n"
    found = infer_contract(model_directory(tmp_path / "model", card))
    assert found == Contract(
        family="SANA 1.6B",
        dtypes=("float16",),
        fp16_saturation=True,
        autoencoder_dtype="float32",
        text_encoder_dtype="bfloat16",
        flow_shift=3.0,
        sampler="dpm_solver",
        image_size=1024,
        license="some-licence https://x/LICENSE",
        source="model",
    )
    named = model_directory(tmp_path / "other", index={"_name_or_path": "org/Sana_1600M_1024px_BF16_diffusers"})
    assert infer_contract(named).fp16_saturation is False


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: 'mit'\n---\n", "mit"),
        ("# No front matter\nlicense: mit\n", None),
        ("---\ntags: []\n---\nlicense: mit\n", None),
        ("", None),
        (None, None),
    ],
)
def test_licences_are_read_and_never_invented(tmp_path, card, license):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == license


def test_a_card_that_is_not_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---")
    assert license_of(tmp_path) is None
