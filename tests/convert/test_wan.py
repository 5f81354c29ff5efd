"""The Wan autoencoder by itself on the command line: inspect, import, verify, export."""

from __future__ import annotations

import pytest
import torch

from convert import main as command
from convert.verify import verify_model
from sana_jax.autoencoders import blockwise
from tests.convert.cases import tensors_of
from tests.parity import wan_oracle


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wan") / "vae"
    wan_oracle.torch_model("two levels").save_pretrained(directory)
    return directory


def run(*arguments) -> None:
    command.main([str(argument) for argument in arguments])


def test_there_and_back(published, tmp_path, capsys):
    run("inspect", published)
    assert "Wan autoencoder f2t2c4" in capsys.readouterr().out
    run("import", published, tmp_path / "ours")
    run("export", tmp_path / "ours", tmp_path / "back")
    assert tensors_of(tmp_path / "back") == tensors_of(published)


def test_verify_compares_and_finds_a_fault(published, monkeypatch):
    monkeypatch.setattr(blockwise, "compile_ahead", wan_oracle.quick_compile)
    lines: list[str] = []
    size = {"height": 6, "width": 10}
    assert verify_model(published, report=lines.append, **size), lines
    assert any("encode a video" in line for line in lines)
    assert any("decode latents" in line for line in lines)

    # the same names and shapes, but another function of frames
    def faulty(self, *arguments, run=wan_oracle.AutoencoderKLWan.decode, **options):
        (frames,) = run(self, *arguments, **options)
        return (torch.roll(frames, 1, 2),)

    monkeypatch.setattr(wan_oracle.AutoencoderKLWan, "decode", faulty)
    assert not verify_model(published, report=lines.append, **size)
