"""PyTorch files are read as torch.load reads them, and nothing in them is ever called."""

from __future__ import annotations

import collections
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from convert.torch_files import TorchSource
from sana_jax.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def save(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def expected(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def check(source: TorchSource, tensors: dict[str, torch.Tensor]) -> None:
    assert list(source.tensors) == list(tensors)
    for name, tensor in tensors.items():
        found, wanted = source.read(name), expected(tensor)
        assert found.dtype == wanted.dtype == source.tensors[name].dtype
        assert found.shape == wanted.shape == source.tensors[name].shape
        assert found.tobytes() == wanted.tobytes()
        assert found.flags.c_contiguous


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)


def test_every_dtype_and_shape(tmp_path):
    tensors = {str(dtype): (10 * torch.randn(3, 5)).abs().to(dtype) for dtype in DTYPES}
    tensors |= {"bool": torch.rand(7) > 0.5, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    check(TorchSource(save(tmp_path / "a.pth", tensors)), tensors)


def test_views_that_share_a_storage(tmp_path):
    whole = torch.randn(6, 8)
    tensors = {
        "whole": whole,
        "transposed": whole.T,
        "rows": whole[2:5],
        "columns": whole[:, 1:7:2],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "half of one": whole.to(torch.bfloat16)[:, 4:],
    }
    assert not tensors["columns"].is_contiguous()
    check(TorchSource(save(tmp_path / "a.pth", tensors)), tensors)


def test_modules_and_parameters(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    check(TorchSource(save(tmp_path / "state.pth", module.state_dict())), module.state_dict())
    parameters = dict(module.named_parameters())
    check(TorchSource(save(tmp_path / "parameters.pth", parameters)), parameters)


def test_prefixes_of_wrappers_are_taken_off(tmp_path):
    tensors = {"module.a": torch.randn(2), "module.b.c": torch.randn(3)}
    source = TorchSource(save(tmp_path / "a.pth", {"state_dict": tensors}))
    assert list(source.tensors) == ["a", "b.c"]
    some = {"module.a": torch.randn(2), "b": torch.randn(3)}
    assert list(TorchSource(save(tmp_path / "b.pth", some)).tensors) == ["module.a", "b"]


def test_training_checkpoints(tmp_path):
    raw, average = {"a": torch.zeros(3), "b": torch.ones(2)}, {"a": torch.ones(3)}
    rest = {"epoch": 3, "step": 10**12, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 1e-4, "x": None}}
    both = save(tmp_path / "both.pth", {"state_dict": raw, "state_dict_ema": average, **rest})
    with pytest.raises(CheckpointError, match=r"state_dict \(2 tensors\), state_dict_ema \(1 tensors\); choose one"):
        TorchSource(both)
    check(TorchSource(both, "params"), raw)
    chosen = TorchSource(both, "ema")
    check(chosen, average)
    assert chosen.section == "state_dict_ema"
    assert chosen.sections == {"state_dict": 2, "state_dict_ema": 1}
    lone = save(tmp_path / "lone.pth", {"state_dict": collections.OrderedDict(raw), **rest})
    check(TorchSource(lone), raw)
    with pytest.raises(CheckpointError, match="it has state_dict"):
        TorchSource(lone, "ema")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        TorchSource(save(tmp_path / "bare.pth", raw), "ema")


def test_what_is_not_a_dict_of_tensors(tmp_path):
    for content, message in (
        ([torch.zeros(1)], "holds a list"),
        ({"a": torch.zeros(1), "b": [1]}, r"'b' \(list\)"),
        ({}, "holds nothing"),
        ({3: torch.zeros(1)}, "holds 3 "),
    ):
        with pytest.raises(CheckpointError, match=message):
            TorchSource(save(tmp_path / "a.pth", content))


def test_not_finite(tmp_path):
    source = TorchSource(save(tmp_path / "a.pth", {"a": torch.tensor([1.0, float("nan")])}))
    with pytest.raises(CheckpointError, match="not finite"):
        source.read("a")


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_a_pickle_that_executes_is_refused(tmp_path, protocol):
    trap = tmp_path / "executed"
    torch.save({"a": torch.zeros(1), "b": Touch(trap)}, tmp_path / "a.pth", pickle_protocol=protocol)
    with pytest.raises(CheckpointError, match=r"mkdir|GLOBAL|which no file of weights needs"):
        TorchSource(tmp_path / "a.pth")
    assert not trap.exists()
    # the trap works: the standard library falls into it
    pickle.loads(pickle.dumps(Touch(trap), protocol))
    assert trap.exists()


def test_an_argparse_namespace_is_named(tmp_path):
    import argparse

    with pytest.raises(CheckpointError, match=r"'argparse.Namespace'.*not called"):
        TorchSource(save(tmp_path / "a.pth", {"state_dict": {"a": torch.zeros(1)}, "args": argparse.Namespace(a=1)}))


def test_the_format_before_1_6_is_refused(tmp_path):
    trap = tmp_path / "executed"
    torch.save({"a": Touch(trap)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1.6.*weights_only=True"):
        TorchSource(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Touch(trap)))
    with pytest.raises(CheckpointError, match="can't be read without running it"):
        TorchSource(tmp_path / "b.pth")
    assert not trap.exists()


def rewrite(path: Path, out: Path, change) -> Path:
    """The archive with ``change(name, bytes) -> bytes or None`` applied to every entry."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = change(entry.filename.split("/", 1)[1], old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)
    return out


def test_storages_that_do_not_fit(tmp_path):
    good = save(tmp_path / "good.pth", {"a": torch.arange(100.0)})
    shorter = rewrite(good, tmp_path / "a.pth", lambda name, data: data[:-4] if name == "data/0" else data)
    with pytest.raises(CheckpointError, match="its storage has 396 bytes, not 100"):
        TorchSource(shorter)
    gone = rewrite(good, tmp_path / "b.pth", lambda name, data: None if name == "data/0" else data)
    with pytest.raises(CheckpointError, match="storage 0 is missing"):
        TorchSource(gone)
    other = rewrite(good, tmp_path / "c.pth", lambda name, data: b"big" if name == "byteorder" else data)
    with pytest.raises(CheckpointError, match="big-endian"):
        TorchSource(other)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "d.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(CheckpointError, match="compressed"):
        TorchSource(tmp_path / "d.pth")


def archive(path: Path, program: bytes, storage: bytes = bytes(16)) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", program)
        file.writestr("x/data/0", storage)
    return path


def tensor_program(offset: int, shape: tuple, strides: tuple, size: int = 4) -> bytes:
    """A pickle of one tensor with these numbers."""

    class Storage:
        pass

    class Rebuild:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", size) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Rebuild()})
    return buffer.getvalue()


def test_tensors_that_reach_beyond_their_storage(tmp_path):
    good = TorchSource(
        archive(tmp_path / "good.pth", tensor_program(1, (3,), (1,)), np.arange(4.0, dtype="f4").tobytes())
    )
    assert good.read("a").tolist() == [1.0, 2.0, 3.0]
    for offset, shape, strides in (
        (2, (3,), (1,)),
        (0, (5,), (1,)),
        (0, (2, 2), (3, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (10**12,), (0,)),
        (0, (2**40, 2**40), (1, 1)),
        (0, (2, 2), (1,)),
        (2**63, (1,), (1,)),
        (0, (1.5,), (1,)),
    ):
        with pytest.raises(CheckpointError):
            TorchSource(archive(tmp_path / "bad.pth", tensor_program(offset, shape, strides)))
    with pytest.raises(CheckpointError, match="has 16 bytes"):
        TorchSource(archive(tmp_path / "bad.pth", tensor_program(0, (2,), (1,), size=2**40)))


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b"\x80\x02}",
        b"\x80\x02N.",
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo index that would take 32 GB in the C unpickler
        b"\x80\x02}q\x00r\xff\xff\xff\xff.",
        b"\x80\x02h\x05.",
        b"\x80\x02((((((.",
        b"\x80\x02}K\x01s.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x02" + b"]" + b"q\x00" + b"".join(b"(h\x00h\x00lq\x00" for _ in range(40)) + b".",
        # nested pairs, each twice the one before: hashing or printing the last takes longer than the universe has been
        b"\x80\x02}" + b")q\x00" + b"".join(b"0h\x00h\x00\x86q\x00" for _ in range(100)) + b"K\x01s.",
        b"\x80\x02}" + b")q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(100)) + b"K\x01s.",
        b"\x80\x02" + b"(" * 100_000 + b")" + b"t" * 100_000 + b".",
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x00aX\x01\x00\x00\x00bNK\x01tQ.",
    ],
)
def test_hostile_pickles_end_quickly(tmp_path, program):
    with pytest.raises(CheckpointError):
        TorchSource(archive(tmp_path / "a.pth", program))


def test_torch_is_not_imported(tmp_path):
    save(tmp_path / "a.pth", {"a": torch.randn(2, 3)})
    code = (
        "import sys; from convert.torch_files import TorchSource; "
        f"print(TorchSource({str(tmp_path / 'a.pth')!r}).read('a').shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == "(2, 3) False", done.stderr
