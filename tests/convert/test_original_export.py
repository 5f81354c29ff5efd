"""Export to NVlabs' own layout: what import reads comes out again bit for bit, and what a file cannot say is said."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from safetensors.torch import load_file, save_file

from convert import original as original_files
from convert import original_world_model, torch_writer
from convert.engine import export_model, import_model
from convert.main import main
from convert.sources import Choices, open_model
from convert.torch_files import TorchSource
from convert.torch_writer import write_torch
from sana_jax.errors import CheckpointError, UserError
from sana_jax.weights.safetensors_files import TensorInfo
from tests.benchmarks.conversion import measure, write_random_component
from tests.convert import test_sana_video, test_sana_wm
from tests.convert.cases import as_original, as_original_controlnet, controlnet, same, transformer
from tests.lora import lora_oracle
from tests.parity import dc_ae_oracle
from tests.parity.sana_wm_oracle import torch_model as world_model

LEFT_OUT = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
LONGSANA = "LongSanaVideoPipeline"


@pytest.fixture(autouse=True)
def tiny_networks(tiny_widths, monkeypatch):
    """The tiny networks' widths among those whose heads are known."""
    for width, sizes in test_sana_video.HEAD_SIZES.items():
        monkeypatch.setitem(original_files._VIDEO_HEAD_SIZES, width, sizes)
    monkeypatch.setitem(original_world_model.CROSS_HEADS, 48, 4)


def silent(_: str) -> None:
    pass


def random_state(family: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A state dict under original names, with what originals have besides."""
    if family == "controlnet":
        state = as_original_controlnet(controlnet().state_dict(), transformer().state_dict())
    elif family == "sana-wm":
        state = test_sana_wm.original(world_model("convolved patches").state_dict())
    elif family in ("sana-video", "longsana"):
        state = as_original(test_sana_video.model(dtype).state_dict())
    else:
        state = as_original(transformer(family, dtype).state_dict())
    return {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}


def save(state: dict[str, torch.Tensor], path: Path, family: str) -> None:
    path.parent.mkdir()
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif family == "longsana":
        torch.save({"generator": {f"model.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save({"state_dict": state}, path)


def load(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Section -> tensors, as PyTorch reads them."""
    return {"": load_file(path)} if path.suffix == ".safetensors" else torch.load(path, weights_only=True, mmap=True)


def assert_same_tensors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_same_models(first: Path, second: Path) -> None:
    """Two converted models, or components, have the same files beside the weights, and the same weights."""
    files = {path.relative_to(first) for path in first.rglob("*.json") if "params" not in path.parts}
    assert files == {path.relative_to(second) for path in second.rglob("*.json") if "params" not in path.parts}
    for file in files:
        assert json.loads((first / file).read_text()) == json.loads((second / file).read_text()), file
    for one, two in zip(open_model(first).components, open_model(second).components, strict=True):
        assert one.network.config == two.network.config
        assert one.source.tensors == two.source.tensors
        assert all(same(one.source.read(name), two.source.read(name)) for name in one.source.tensors)


FILES = [
    ("sana-1.0", "pth", torch.float32, Choices(image_size=1024)),
    ("sana-1.5", "safetensors", torch.bfloat16, Choices(image_size=1024)),
    ("sprint", "pth", torch.bfloat16, Choices(image_size=1024)),
    ("patch-2", "safetensors", torch.float16, Choices(image_size=1024)),
    ("controlnet", "pth", torch.float32, Choices(image_size=1024)),
    ("sana-video", "pth", torch.float16, Choices()),
    ("longsana", "pth", torch.float32, Choices()),
    ("longsana", "safetensors", torch.bfloat16, Choices(pipeline=LONGSANA)),
    ("sana-wm", "safetensors", torch.float32, Choices(revision="current")),
    ("sana-wm", "pth", torch.bfloat16, Choices()),
]


@pytest.mark.parametrize(("family", "end", "dtype", "choices"), FILES, ids=lambda value: str(value)[:12])
def test_what_import_reads_comes_out_again(family, end, dtype, choices, tmp_path):
    """original -> ours -> original: the same names and bits; imported again with the options that export names."""
    state = random_state(family, dtype)
    save(state, tmp_path / "first" / f"a.{end}", family)
    import_model(tmp_path / "first" / f"a.{end}", tmp_path / "ours", choices, report=silent)
    lines: list[str] = []
    written = tmp_path / "second" / f"a.{end}"
    export_model(tmp_path / "ours", written, layout="original", report=lines.append)
    wanted = {name: tensor for name, tensor in state.items() if name not in LEFT_OUT}
    if family == "controlnet":  # the transformer beside it is no part of what was imported
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith(("blocks.", "final_layer."))}
        assert any("hold the transformer's blocks too, and this one does not" in line for line in lines)
    prefix = "model." if (family, end) == ("longsana", "pth") else ""
    section = "" if end == "safetensors" else "generator" if prefix else "state_dict"
    assert_same_tensors(load(written).pop(section), {prefix + name: tensor for name, tensor in wanted.items()})
    (said,) = [line for line in lines if line.startswith("not in the file")]
    assert all(name.removesuffix(".weight").removesuffix(".bias") in said for name in set(state) & set(LEFT_OUT))
    options = {name: value for name, value in vars(choices).items() if value != getattr(Choices(), name)}
    advice = [line for line in lines if "import it with" in line]
    assert advice == [
        "the file has no configuration: import it with "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    ] * bool(options)
    assert not any("cannot say" in line or "will not read" in line for line in lines)
    import_model(written, tmp_path / "again", choices, report=silent)
    assert_same_models(tmp_path / "ours", tmp_path / "again")


@pytest.mark.parametrize("family", ["sprint", "sana-wm"])
def test_a_published_directory(family, tmp_path):
    """published -> original -> ours is published -> ours; SANA-WM's unused buffers included."""
    network = world_model("convolved patches") if family == "sana-wm" else transformer(family)
    network.save_pretrained(tmp_path / "published")
    import_model(tmp_path / "published", tmp_path / "direct", report=silent)
    assert main(["export", str(tmp_path / "published"), str(tmp_path / "a.pth"), "--layout", "original"]) == 0
    choices = Choices(image_size=1024) if family == "sprint" else Choices()
    import_model(tmp_path / "a.pth", tmp_path / "detour", choices, report=silent)
    (one,), (two,) = (open_model(tmp_path / name).components for name in ("direct", "detour"))
    assert one.network.config == two.network.config
    assert one.source.tensors.keys() == two.source.tensors.keys()
    assert any(name.endswith("recall_gate") for name in one.source.tensors) == (family == "sana-wm")
    assert all(same(one.source.read(name), two.source.read(name)) for name in one.source.tensors)


def test_a_controlnet_with_its_transformer(tmp_path):
    """Both are one file, as NVlabs have it, where their embedders are the same; else nothing is written."""
    base, beside = transformer(), controlnet()
    beside.load_state_dict(
        {n: t for n, t in base.state_dict().items() if n in beside.state_dict() and "transformer_blocks" not in n},
        strict=False,
    )
    index = {"_class_name": "SanaControlNetPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    for name, embedders in (("one", beside), ("other", controlnet())):
        base.save_pretrained(tmp_path / name / "transformer")
        embedders.save_pretrained(tmp_path / name / "controlnet")
        index["controlnet"] = ["diffusers", "SanaControlNetModel"]
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    export_model(tmp_path / "one", tmp_path / "a.safetensors", layout="original", report=silent)
    wanted = as_original_controlnet(beside.state_dict(), base.state_dict())
    assert_same_tensors(
        load(tmp_path / "a.safetensors")[""], {name: t for name, t in wanted.items() if name not in LEFT_OUT}
    )
    with pytest.raises(
        CheckpointError, match=r"embedders are not the transformer's.*attention_y_norm\.weight.*and 8 more tensors"
    ):
        export_model(tmp_path / "other", tmp_path / "b.pth", layout="original", report=silent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "one", "other"]


def test_the_name_says_what_a_video_file_cannot(tmp_path, capsys):
    """A bare LongSANA is taken for SANA-Video with a note, or for what --pipeline says."""
    save(random_state("longsana", torch.float32), tmp_path / "x" / "a.safetensors", "longsana")
    file = str(tmp_path / "x" / "a.safetensors")
    for words, name in (([], "SanaVideoPipeline"), (["--pipeline", LONGSANA], LONGSANA)):
        assert main(["inspect", file, *words]) == 0
        out = capsys.readouterr().out
        assert f"{file}: {name} (original)" in out
        assert ("taken for SANA-Video; LongSANA's weights have the same names and shapes" in out) == (not words)
    with pytest.raises(UserError, match="--pipeline cannot be 'SanaPipeline'"):
        main(["inspect", file, "--pipeline", "SanaPipeline"])
    # a transformer without an index is written as what the option says
    test_sana_video.model().save_pretrained(tmp_path / "published")
    for words, section in (([], "state_dict"), (["--pipeline", LONGSANA], "generator")):
        out = tmp_path / f"{section}.pth"
        assert main(["export", str(tmp_path / "published"), str(out), "--layout", "original", *words]) == 0
        assert ("does not say whether it is SANA-Video or LongSANA" in capsys.readouterr().out) == (not words)
        assert list(load(out)) == [section]
    with pytest.raises(UserError, match="has a generator among its parts, so it is LongSANA"):
        main(["inspect", str(tmp_path / "generator.pth"), "--pipeline", "SanaVideoPipeline"])
    with pytest.raises(UserError, match="is a directory: leave the option out"):
        main(["inspect", str(tmp_path / "published"), "--pipeline", LONGSANA])
    torch.save(as_original(transformer().state_dict()), tmp_path / "picture.pth")
    with pytest.raises(UserError, match="is neither: leave the option out"):
        main(["inspect", str(tmp_path / "picture.pth"), "--pipeline", LONGSANA])


def test_what_a_file_cannot_say_is_said(tmp_path):
    lines: list[str] = []
    transformer("sana-1.5", timestep_scale=0.5).save_pretrained(tmp_path / "scaled")
    export_model(tmp_path / "scaled", tmp_path / "a.pth", layout="original", report=lines.append)
    assert any("import takes it otherwise: timestep_scale 0.5, not 1.0" in line for line in lines)
    transformer(sample_size=24).save_pretrained(tmp_path / "odd")
    export_model(tmp_path / "odd", tmp_path / "b.pth", layout="original", report=lines.append)
    assert any("import will not read this file: --image-size 768 is not a published size" in line for line in lines)
    torch.save(as_original(transformer().state_dict()), tmp_path / "c.pth")
    choices = Choices(flow_shift=1.5)
    export_model(tmp_path / "c.pth", tmp_path / "d.safetensors", choices, layout="original", report=lines.append)
    assert "the file has no configuration: import it with --image-size 1024 --flow-shift 1.5" in lines
    save(random_state("longsana", torch.float32), tmp_path / "x" / "e.pth", "longsana")
    import_model(tmp_path / "x" / "e.pth", tmp_path / "long", report=silent)
    scheduler = tmp_path / "long" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "num_cached_blocks": 3, "shift": 5.5}))
    export_model(tmp_path / "long", tmp_path / "f.pth", layout="original", report=lines.append)
    assert "the file cannot say, and import takes it otherwise: num_cached_blocks 3, not None" in lines
    assert "the file has no configuration: import it with --flow-shift 5.5" in lines


def test_merge_writes_the_layout_too(published, tmp_path):
    pipeline = SanaPipeline.from_pretrained(published("sana-1.0"))
    settings = {"r": 2, "lora_alpha": 2, "target_modules": lora_oracle.ALL_LINEAR}
    lora = str(lora_oracle.make_lora(pipeline, tmp_path / "lora", settings))
    source = str(published("sana-1.0") / "transformer")
    assert main(["merge", source, lora, str(tmp_path / "merged")]) == 0
    assert main(["merge", source, lora, str(tmp_path / "a.pth"), "--layout", "original"]) == 0
    export_model(tmp_path / "merged", tmp_path / "b.pth", layout="original", report=silent)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize(
    ("source", "destination", "words", "message"),
    [
        ("t", "a.pt", ["--layout", "original"], r"its name must end in \.safetensors or \.pth"),
        ("t", "a", ["--layout", "original"], r"its name must end in \.safetensors or \.pth"),
        ("t", "a.pth", [], "add --layout original"),
        ("t", "a.safetensors", [], "add --layout original"),
        ("t", "a.pth", ["--layout", "nvlabs"], "--layout cannot be 'nvlabs'"),
        ("t", "a.pth", ["--layout", "original", "--max-shard-size", "1GB"], "--max-shard-size 1GB: --layout original"),
        ("t", "a.pth", ["--layout", "original", "--pipeline", LONGSANA], "is neither: leave the option out"),
        ("t", "there.pth", ["--layout", "original"], "exists already; delete it or name another file"),
        ("t", "there.pth/a.pth", ["--layout", "original"], "writing .* failed"),
        ("vae", "a.pth", ["--layout", "original"], r"no network with an original layout \(AutoencoderDC\)"),
        ("short", "a.pth", ["--layout", "original"], "the weights do not fit"),
    ],
)
def test_refused(source, destination, words, message, tmp_path):
    (tmp_path / "there.pth").write_bytes(b"precious")
    if source == "vae":
        dc_ae_oracle.torch_model("sana").save_pretrained(tmp_path / source)
    else:
        transformer().save_pretrained(tmp_path / source)
    if source == "short":
        config = json.loads((tmp_path / source / "config.json").read_text())
        (tmp_path / source / "config.json").write_text(json.dumps({**config, "num_layers": 4}))
    with pytest.raises(UserError, match=message) as caught:
        main(["export", str(tmp_path / source), str(tmp_path / destination), *words])
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source, "there.pth"])
    assert (tmp_path / "there.pth").read_bytes() == b"precious"


def test_a_full_disk_a_dry_run_and_a_failure_leave_nothing(tmp_path, monkeypatch):
    transformer().save_pretrained(tmp_path / "t")
    lines: list[str] = []
    out = tmp_path / "a.pth"
    export_model(tmp_path / "t", out, layout="original", dry_run=True, report=lines.append)
    assert any("would write" in line and line.endswith("-> a.pth") for line in lines)
    with monkeypatch.context() as full:
        full.setattr("convert.engine.disk_shortage", lambda *_: "2 bytes are needed and 1 is free")
        with pytest.raises(CheckpointError, match=r"not writing .*a\.pth: 2 bytes are needed"):
            export_model(tmp_path / "t", out, layout="original", report=silent)

    def fails(path, name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sana_jax.weights.safetensors_files.SafetensorsSource.read", fails)
    with pytest.raises(CheckpointError, match=r"writing .*a\.pth failed: No space left on device"):
        export_model(tmp_path / "t", out, layout="original", report=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


# -- the .pth file itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [1 << 32, 50], ids=["plain", "zip64"])
def test_torch_reads_what_was_written(large, tmp_path, monkeypatch):
    """All dtypes and odd shapes, their bytes in any order, mapped in place; with zip64's records from 50 bytes on."""
    monkeypatch.setattr(torch_writer, "_LARGE", min(large, torch_writer._LARGE))
    rng = np.random.default_rng(0)
    arrays = {"joined": rng.normal(size=(6, 5)).astype(np.float32), "scalar": np.array(3.5, np.float32)}
    for dtype in (np.float16, np.float64, ml_dtypes.bfloat16, np.int64, np.int32, np.uint8, np.bool_):
        arrays[np.dtype(dtype).name] = rng.integers(0, 9, (3, 1, 7)).astype(dtype)
    arrays["empty"] = np.zeros((0, 4), np.float16)
    pieces = [(name, 0, array) for name, array in arrays.items() if name != "joined"]
    pieces += [("joined", 40 * part, arrays["joined"][2 * part : 2 * part + 2]) for part in range(3)]
    random.Random(1).shuffle(pieces)
    path = tmp_path / "a.pth"
    write_torch(path, "state_dict", {name: TensorInfo(a.dtype, a.shape) for name, a in arrays.items()}, pieces)
    assert zipfile.ZipFile(path).testzip() is None
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)["state_dict"]
        assert list(loaded) == list(arrays)
        for name, tensor in loaded.items():
            found = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if name == "bfloat16" else tensor.numpy()
            assert same(found, arrays[name]), name
            assert tensor.is_contiguous()
            assert not mmap or tensor.data_ptr() % 64 == 0
    source = TorchSource(path)
    assert all(same(source.read(name), array) for name, array in arrays.items())


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([("a", 0, np.zeros(3, np.float32))], "12 of 16 bytes were given"),
        ([("a", 0, np.zeros(3, np.float32)), ("a", 8, np.zeros(2, np.float32))], "begins at byte 8 and not at 12"),
        ([("a", 4, np.zeros(3, np.float32))], "begins at byte 4 and not at 0"),
    ],
)
def test_pieces_that_are_not_all_bytes(pieces, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_torch(tmp_path / "a.pth", "state_dict", {"a": TensorInfo(np.dtype(np.float32), (4,))}, pieces)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="have no dtype complex64"):
        write_torch(tmp_path / "a.pth", "state_dict", {"a": TensorInfo(np.dtype(np.complex64), (4,))}, [])


@pytest.mark.prove
def test_a_file_of_more_than_four_gigabytes(tmp_path):
    """The last tensors lie beyond what 32 bits reach, and one tensor is itself larger."""
    large, last = np.zeros(2**31 + 3, np.float16), np.arange(7, dtype=np.float32)
    large[-1] = 2.5
    arrays = {"first": last + 1, "large": large, "last": last}
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    path = tmp_path / "a.pth"
    write_torch(path, "state_dict", infos, ((name, 0, array) for name, array in arrays.items()))
    assert path.stat().st_size > 1 << 32
    loaded = torch.load(path, weights_only=True, mmap=True)["state_dict"]
    assert torch.equal(loaded["last"], torch.from_numpy(last))
    assert torch.equal(loaded["first"], torch.from_numpy(last + 1))
    assert (loaded["large"].shape, float(loaded["large"][-1])) == ((2**31 + 3,), 2.5)
    assert same(TorchSource(path).read("last"), last)


@pytest.mark.prove
@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_an_export_holds_a_few_arrays_at_a_time(end, tmp_path):
    """As ``test_a_conversion_holds_a_few_arrays_at_a_time``: joining q, k and v keeps neither in memory."""
    config = {"num_layers": 48, "num_attention_heads": 16, "attention_head_dim": 32, "cross_attention_dim": 512}
    config |= {"num_cross_attention_heads": 4, "cross_attention_head_dim": 128, "caption_channels": 256}
    config["_class_name"] = "SanaTransformer2DModel"
    sizes, peaks = {}, {}
    for name, layers in (("small", 1), ("large", 48)):
        sizes[name] = write_random_component(tmp_path / name, {**config, "num_layers": layers}, "bfloat16")
        ours, back = str(tmp_path / f"{name} ours"), str(tmp_path / f"{name}.{end}")
        measure(["import", str(tmp_path / name), ours])
        _, peaks[name] = measure(["export", ours, back, "--layout", "original"])
    extra = peaks["large"] - peaks["small"]
    assert extra < 1.2 * sizes["large"], f"{extra / sizes['large']:.2f} x the checkpoint"
