"""Token encoders in a run's configuration: as options, as help, as JSON, and for a transformer."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from configs.serialization import from_dict, to_dict
from configs.tokens import TokenEncoderConfig, TokensConfig, condition_tokens
from sana_jax.command_line import parse
from sana_jax.errors import UserError
from sana_jax.models.sana import SanaConfig


@dataclasses.dataclass(frozen=True)
class Run:
    """A run."""

    tokens: TokensConfig | None = None
    """Encoders of further conditions."""
    steps: int = 1
    """Steps."""


TOKENS = condition_tokens(
    object=TokenEncoderConfig(kind="vector", width=768, normalize=True),
    zoom=TokenEncoderConfig(kind="scalar", frequencies=6, value_range=(0.0, 2.0)),
)


def read(*words: str) -> Run:
    return parse(Run, list(words), default=Run(TOKENS), prog="python -m thing")


def test_every_field_is_an_option():
    changed = read(
        "--tokens.object.dropout", "0.3", "--tokens.zoom.inject", "after", "--tokens.zoom.value-range", "0", "1"
    )
    assert changed.tokens.object == dataclasses.replace(TOKENS.object, dropout=0.3)
    assert changed.tokens.encoders["zoom"].inject == "after"
    assert changed.tokens.zoom.value_range == (0.0, 1.0)
    assert read() == Run(TOKENS)
    with pytest.raises(UserError, match=r"--tokens\.zoom\.dropout"):
        read("--tokens.zoom.dropuot", "0.2")
    with pytest.raises(UserError, match=r"dropout=1\.5"):
        read("--tokens.zoom.dropout", "1.5")


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("--tokens.object.width", "--tokens.zoom.frequencies", "default: 768", "half periods"):
        assert part in " ".join(text.split())


def test_to_json_and_back():
    written = json.loads(json.dumps(to_dict(Run(TOKENS, 3))))
    found = from_dict(Run, written, "config.json")
    assert found == Run(TOKENS, 3)
    assert list(found.tokens.encoders) == ["object", "zoom"]
    assert from_dict(Run, to_dict(Run()), "config.json") == Run()
    written["tokens"]["zoom"]["frequency"] = 2
    with pytest.raises(UserError, match=r"tokens\.zoom\.frequency"):
        from_dict(Run, written, "config.json")
    assert pickle.loads(pickle.dumps(TOKENS)) == TOKENS


def test_for_a_transformer():
    network = TOKENS.network(SanaConfig())
    assert (network.caption_channels, network.inner_dim) == (2304, 2240)
    assert network.width("zoom") == 2304
    with pytest.raises(UserError, match="name one or more"):
        condition_tokens()
