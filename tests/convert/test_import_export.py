"""Published -> ours -> published: the same bits; diffusers loads what comes back and gives the same numbers."""

from __future__ import annotations

import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch

from convert.engine import export_model, import_model, parse_size
from convert.inspection import inspect_model
from convert.sources import Choices
from sana_jax import SanaControlNetPipeline, SanaPipeline
from sana_jax.contract import Contract, infer_contract
from sana_jax.errors import CheckpointError, UserError
from tests.convert.cases import VARIANTS, controlnet, files_of, tensors_of, transformer
from tests.parity import pipeline_oracle

STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
KINDS = ("sana-1.0", "sprint", "controlnet")


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_whole_pipelines_come_back_bit_for_bit(kind, published, tmp_path):
    source = published(kind)
    lines: list[str] = []
    import_model(source, tmp_path / "ours", report=lines.append)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)

    stems = STEMS | ({"controlnet": "diffusion_pytorch_model"} if kind == "controlnet" else {})
    for folder, stem in stems.items():
        assert tensors_of(source / folder, stem) == tensors_of(tmp_path / "back" / folder, stem)
        assert (tmp_path / "ours" / folder / "params").is_dir()
        assert any(line.startswith(f"{folder}: ") and "parameters" in line for line in lines)
    for config in [
        *(f"{folder}/config.json" for folder in stems),
        "scheduler/scheduler_config.json",
        "model_index.json",
    ]:
        assert json.loads((source / config).read_text()) == json.loads((tmp_path / "back" / config).read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / "tokenizer" / name).read_bytes() == (source / "tokenizer" / name).read_bytes()
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert Contract.from_dict(index.pop("contract")) == infer_contract(source) == infer_contract(tmp_path / "ours")
    assert index == json.loads((source / "model_index.json").read_text())
    assert not [file for file in files_of(tmp_path / "ours") if file.endswith((".safetensors", ".tmp"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours"]


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_an_export_and_draws_the_same(kind, published, tmp_path):
    import_model(published(kind), tmp_path / "ours", report=silent)
    export_model(tmp_path / "ours", tmp_path / "back", max_shard_size="100KB", report=silent)
    outputs, states = [], []
    for directory in (published(kind), tmp_path / "back"):
        pipeline = pipeline_oracle.KINDS[kind][0].from_pretrained(directory)
        pipeline.set_progress_bar_config(disable=True)
        options = {"control_image": pipeline_oracle.picture(64, 64)} if kind == "controlnet" else {}
        latents = torch.from_numpy(pipeline_oracle.noise(1, 64, 64))
        result = pipeline(
            "a red panda",
            height=64,
            width=64,
            num_inference_steps=2,
            latents=latents,
            generator=torch.Generator().manual_seed(0),
            use_resolution_binning=False,
            output_type="np",
            **options,
        )
        outputs.append(result.images)
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        states.append([tensor for module in modules for tensor in module.state_dict().values()])
    assert len(states[0]) == len(states[1]) > 100
    assert all(torch.equal(*pair) for pair in zip(*states))
    # Equal weights that lie elsewhere in their files are aligned otherwise, and PyTorch sums them in another order.
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_single_components_in_every_dtype(variant, dtype, tmp_path):
    transformer(variant, dtype).save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "ours", report=silent)
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "params"]
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "published")
    class_ = diffusers.SanaTransformer2DModel
    loaded, info = class_.from_pretrained(tmp_path / "back", torch_dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    state = transformer(variant, dtype).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_controlnets_alone(tmp_path):
    controlnet().save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "ours", report=silent)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "published")


def test_batch_norm_counts_come_back(tmp_path):
    """The autoencoders with batch norms store counts that are no parameters."""
    from tests.parity.pipeline_oracle import randomise

    types, scales = ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"), ((),) * 4
    vae = diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=(8, 16, 16, 32),
        decoder_block_out_channels=(8, 16, 16, 32),
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm", "rms_norm"),
        decoder_act_fns=("relu", "relu", "silu", "silu"),
    )
    randomise(vae, torch.Generator().manual_seed(0))
    counts = [buffer for name, buffer in vae.named_buffers() if name.endswith("num_batches_tracked")]
    for number, buffer in enumerate(counts):
        buffer.fill_(17 + number)
    vae.save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "ours", report=silent)
    assert (tmp_path / "ours" / "kept_tensors.safetensors").is_file() == bool(counts)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    assert counts
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "published")
    (tmp_path / "ours" / "kept_tensors.safetensors").unlink()
    export_model(tmp_path / "ours", tmp_path / "zeros", report=silent)
    _, info = diffusers.AutoencoderDC.from_pretrained(tmp_path / "zeros", output_loading_info=True)
    assert not any(info.values())


def test_shards(tmp_path):
    transformer(dtype=torch.bfloat16).save_pretrained(tmp_path / "published", max_shard_size="40KB")
    assert len(list((tmp_path / "published").glob("*-of-*.safetensors"))) > 2
    import_model(tmp_path / "published", tmp_path / "ours", report=silent)
    export_model(tmp_path / "ours", tmp_path / "back", max_shard_size="50KB", report=silent)
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "published")
    index = json.loads((tmp_path / "back" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    names = set(index["weight_map"].values())
    assert {path.name for path in (tmp_path / "back").glob("*.safetensors")} == names
    sizes = [sum(len(data) for _, _, data in tensors_of(tmp_path / "back").values())]
    assert index["metadata"]["total_size"] == sizes[0]
    assert max((tmp_path / "back" / name).stat().st_size for name in names) < 65_000
    _, info = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())


def test_a_text_encoder_that_is_a_whole_language_model(tmp_path, published):
    """Its head is left out, and the rest has the names that it had."""
    from transformers import Gemma2ForCausalLM, Gemma2Model

    encoder = Gemma2Model.from_pretrained(published("sana-1.0") / "text_encoder")
    whole = Gemma2ForCausalLM(encoder.config)
    whole.model.load_state_dict(encoder.state_dict())
    whole.save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "ours", report=silent)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    before, after = tensors_of(tmp_path / "published", "model"), tensors_of(tmp_path / "back", "model")
    before.pop("lm_head.weight", None)
    assert after == before


@pytest.mark.parametrize("missing", ["tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_a_model_that_lacks_a_file_does_not_fit(missing, published, tmp_path):
    """Each is read when the model is sampled, whatever else lies beside it."""
    source = shutil.copytree(published("sana-1.0"), tmp_path / "published")
    (source / missing).unlink()
    lines: list[str] = []
    assert not inspect_model(source, report=lines.append)
    assert any("DOES NOT FIT" in line and missing in line for line in lines)
    assert "everything fits" not in lines
    with pytest.raises(FileNotFoundError, match=re.escape(f"{source / missing} is missing")):
        import_model(source, tmp_path / "ours", report=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_damaged_tokenizer_does_not_fit(published, tmp_path):
    source = shutil.copytree(published("sana-1.0"), tmp_path / "published")
    (source / "tokenizer" / "tokenizer.json").write_text("{}")
    assert not inspect_model(source, report=silent)
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        import_model(source, tmp_path / "ours", report=silent)


def test_variants(tmp_path, published):
    source = tmp_path / "published"
    shutil.copytree(published("sana-1.0"), source)
    transformer(dtype=torch.bfloat16).save_pretrained(source / "transformer", variant="bf16", max_shard_size="40KB")
    lines: list[str] = []
    import_model(source, tmp_path / "ours", Choices(variant="bf16"), report=lines.append)
    assert any("vae: no variant bf16, so diffusion_pytorch_model.safetensors is read" in line for line in lines)
    with pytest.raises(FileNotFoundError, match=r"'bf61'; variants that are there: .* transformer: plain, bf16; vae"):
        import_model(source, tmp_path / "typo", Choices(variant="bf61"), report=silent)
    export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    assert {dtype for dtype, _, _ in tensors_of(tmp_path / "back" / "transformer").values()} == {"bfloat16"}
    assert {dtype for dtype, _, _ in tensors_of(tmp_path / "back" / "vae").values()} == {"float32"}
    import_model(source, tmp_path / "plain", report=silent)
    export_model(tmp_path / "plain", tmp_path / "plain back", report=silent)
    assert {dtype for dtype, _, _ in tensors_of(tmp_path / "plain back" / "transformer").values()} == {"float32"}


def test_a_published_directory_can_be_exported_at_once(published, tmp_path):
    export_model(published("sana-1.0"), tmp_path / "back", max_shard_size="100KB", report=silent)
    for folder, stem in STEMS.items():
        assert tensors_of(tmp_path / "back" / folder, stem) == tensors_of(published("sana-1.0") / folder, stem)


@pytest.mark.parametrize("kind", ["sana-1.0", "controlnet"])
def test_diffusers_loads_an_export_of_what_a_pipeline_of_ours_saved(kind, published, tmp_path):
    """Our index names neither the tokenizer nor the ControlNet, and no libraries; an export has all of them."""
    ours = SanaControlNetPipeline if kind == "controlnet" else SanaPipeline
    ours.from_pretrained(published(kind)).save_pretrained(tmp_path / "saved")
    export_model(tmp_path / "saved", tmp_path / "back", report=silent)
    index, expected = (json.loads((d / "model_index.json").read_text()) for d in (tmp_path / "back", published(kind)))
    assert index == {name: value for name, value in expected.items() if name != "_diffusers_version"}
    theirs, back = (pipeline_oracle.KINDS[kind][0].from_pretrained(d) for d in (published(kind), tmp_path / "back"))
    assert back.tokenizer(pipeline_oracle.PROMPTS).input_ids == theirs.tokenizer(pipeline_oracle.PROMPTS).input_ids
    for name, part in theirs.components.items():
        if isinstance(part, torch.nn.Module):
            found = back.components[name].state_dict()
            assert all(torch.equal(found[key], tensor) for key, tensor in part.state_dict().items())


def test_a_dry_run_writes_nothing_and_names_every_byte(published, tmp_path):
    source = published("sana-1.0")
    lines: list[str] = []
    import_model(source, tmp_path / "ours", dry_run=True, report=lines.append)
    assert not list(tmp_path.iterdir())
    text = "\n".join(lines)
    for folder, stem in STEMS.items():
        file = source / folder / f"{stem}.safetensors"
        assert re.search(rf"would read +{file.stat().st_size:,} bytes  {re.escape(str(file))}", text)
    assert "would write" in text
    assert "transformer/params/" in text
    export_model(source, tmp_path / "back", max_shard_size="100KB", dry_run=True, report=lines.append)
    assert not list(tmp_path.iterdir())
    assert "diffusion_pytorch_model-00001-of-" in "\n".join(lines)


def test_a_destination_with_something_in_it_stays_as_it_is(published, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    for dry_run in (False, True):
        with pytest.raises(CheckpointError, match="exists already"):
            import_model(published("sana-1.0"), tmp_path / "ours", dry_run=dry_run, report=silent)
    with pytest.raises(CheckpointError, match="exists already"):
        export_model(published("sana-1.0"), tmp_path / "ours", report=silent)
    assert files_of(tmp_path) == {"ours/mine.txt": 4}
    (tmp_path / "ours" / "mine.txt").unlink()
    export_model(published("sana-1.0"), tmp_path / "ours", report=silent)  # an empty one is as good as none


def test_a_disk_that_is_too_small(published, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for convert in (import_model, export_model):
        with pytest.raises(CheckpointError, match=r"are needed and 1000 bytes"):
            convert(published("sana-1.0"), tmp_path / "ours", report=silent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("convert", [import_model, export_model])
def test_a_write_that_fails_leaves_nothing(published, tmp_path, monkeypatch, convert):
    import convert.engine as engine

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "_write_small", fail)
    with pytest.raises(CheckpointError, match="No space left on device; nothing was left there"):
        convert(published("sana-1.0"), tmp_path / "ours", report=silent)
    assert not list(tmp_path.iterdir())


def test_everything_that_does_not_fit_is_said_at_once(published, tmp_path):
    source = tmp_path / "published"
    shutil.copytree(published("sana-1.0"), source)
    config = json.loads((source / "transformer" / "config.json").read_text())
    (source / "transformer" / "config.json").write_text(json.dumps({**config, "num_layers": 4}))
    (source / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        import_model(source, tmp_path / "ours", report=silent)
    assert "transformer_blocks.3.attn1.to_q.weight [32, 32]" in str(caught.value)
    assert "vae: " in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_our_own_weights_are_not_imported_again(published, tmp_path):
    import_model(published("sana-1.0"), tmp_path / "ours", report=silent)
    with pytest.raises(UserError, match="use export"):
        import_model(tmp_path / "ours", tmp_path / "twice", report=silent)


def test_damaged_weights_of_ours_are_not_exported(tmp_path):
    transformer().save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "ours", report=silent)
    biggest = max((tmp_path / "ours" / "params").rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(biggest.read_bytes())
    content[len(content) // 2] ^= 1
    biggest.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export_model(tmp_path / "ours", tmp_path / "back", report=silent)
    assert not (tmp_path / "back").exists()


def test_options_without_meaning_are_errors(published, tmp_path):
    for choices in (
        Choices(weights="ema"),
        Choices(checkpoint_step=3),
        Choices(image_size=1024),
        Choices(flow_shift=3.0),
    ):
        with pytest.raises(UserError, match="leave it out"):
            import_model(published("sana-1.0"), tmp_path / "ours", choices, report=silent)
    with pytest.raises(UserError, match="--components-from"):
        import_model(published("sana-1.0"), tmp_path / "ours", components_from=published("sprint"), report=silent)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500), ("12", 12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "5 bananas", "nan", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="5GB"):
        parse_size(text)
