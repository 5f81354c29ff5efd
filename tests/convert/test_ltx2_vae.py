"""The LTX-2 autoencoder by itself on the command line: inspect, import, verify, export."""

from __future__ import annotations

import pytest
import torch

from convert import main as command
from convert.verify import verify_model
from sana_jax.weights.recognition import looks_like
from tests.convert.cases import tensors_of
from tests.parity import ltx2_vae_oracle as oracle


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """With a scaling factor."""
    directory = tmp_path_factory.mktemp("ltx2") / "vae"
    oracle.torch_model("another order").save_pretrained(directory)
    return directory


def run(*arguments) -> None:
    command.main([str(argument) for argument in arguments])


def test_there_and_back(published, tmp_path, capsys):
    count = sum(parameter.numel() for parameter in oracle.torch_model("another order").parameters())
    run("inspect", published)
    assert f"LTX-2 autoencoder f4t2c8, {count:,} parameters" in capsys.readouterr().out
    run("import", published, tmp_path / "ours")
    run("export", tmp_path / "ours", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(published)


def test_recognition():
    names = oracle.torch_model("another order").state_dict()
    assert looks_like(names).startswith("looks like the LTX-2 autoencoder: has ")


def test_verify_compares_and_finds_a_fault(published, monkeypatch):
    lines: list[str] = []
    size = {"height": 12, "width": 20}
    assert verify_model(published, report=lines.append, **size), lines
    assert any("encode a video" in line for line in lines)
    assert any("decode latents" in line for line in lines)

    # the same names and shapes, but another function of frames
    def faulty(self, *arguments, run=oracle.AutoencoderKLLTX2Video.decode, **options):
        (frames,) = run(self, *arguments, **options)
        return (torch.roll(frames, 1, 2),)

    monkeypatch.setattr(oracle.AutoencoderKLLTX2Video, "decode", faulty)
    assert not verify_model(published, report=lines.append, **size)
