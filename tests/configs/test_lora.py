"""The options of a LoRA run: what is allowed, how they are given, and what is warned of."""

from __future__ import annotations

import pytest

from configs.lora import LoraConfig, lora_warnings
from sana_jax.command_line import parse
from sana_jax.errors import UserError
from sana_jax.models.sana import SanaConfig


def test_scale():
    assert LoraConfig().scale == 1.0
    assert LoraConfig(rank=8, alpha=4).scale == 0.5


def test_command_line():
    words = ["--rank", "8", "--alpha", "12.5", "--targets", "attention", "proj_out", "--init", "kaiming"]
    config = parse(LoraConfig, words, prog="train")
    assert config == LoraConfig(8, 12.5, 0.0, "kaiming", ("attention", "proj_out"))
    assert parse(LoraConfig, ["--alpha", "None"], LoraConfig(alpha=3), prog="train").alpha is None


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0},
        {"rank": 4096},
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"targets": ()},
    ],
)
def test_refused(values):
    with pytest.raises(UserError, match=f"--lora.{next(iter(values))} .* is not allowed; allowed is"):
        LoraConfig(**values)


def test_warnings():
    network, distilled = SanaConfig(), SanaConfig.sprint_1600m()
    assert lora_warnings(1e-4, network) == lora_warnings(1e-6, network) == lora_warnings(1e-2, network) == []
    assert lora_warnings(None, network) == []  # an optimizer that finds its own
    (low,), (high,) = lora_warnings(5e-7, network), lora_warnings(0.05, network)
    assert "5e-07 a LoRA will hardly learn" in low
    assert "0.05 a LoRA is likely to fall apart" in high
    (line,) = lora_warnings(1e-4, distilled)
    assert "diffusion loss on a distilled model is experimental" in line
    assert all("\n" not in line for line in (low, high, line))
