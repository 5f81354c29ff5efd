"""Options that a run would not read are refused; what a resumed run may change, and what has only moved."""

from __future__ import annotations

import dataclasses

import pytest

from configs import load_preset
from configs.changes import COMPUTED_OTHERWISE, PLACES, differing_fields, with_absolute_places
from configs.schema import RunConfig
from configs.unread import check_unread
from sana_jax.errors import UserError
from train.main import read_command_line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sprint", "--flow.caption-dropout", "0.3"], r"--flow.caption-dropout 0.3 .* 0.1 for Sprint"),
        (["sprint", "--flow.density", "uniform"], r"--flow.density uniform .* for Sprint"),
        (["sprint", "--flow.flow-shift", "5"], r"--flow.flow-shift 5.0 .* None for Sprint"),
        (["digits", "--model-variant", "bf16"], r"--model-variant bf16 .* None without --model"),
        (["digits", "--compute.emulate-fp16-saturation"], r"--compute.emulate-fp16-saturation True .* False without"),
        (["digits", "--flow.embedded-guidance", "4.5"], r"--flow.embedded-guidance 4.5 .* None for a network"),
        (
            ["finetune", "--data.clip-threshold", "20"],
            r"--data.clip-threshold 20.0 .* 25.0 where --data",
        ),
        (["finetune", "--data.clip-temperature", "1"], r"--data.clip-temperature 1.0 .* 0.1 where"),
        (["dreambooth", "--prior.num-inference-steps", "9"], r"--prior.caption None .* where other --prior options"),
        (["digits", "--ema.no-enabled", "--ema.decay", "0.5"], r"--ema.decay 0.5 would not be used with --ema.no"),
        (
            ["digits", "--optimizer.name=schedule_free_adamw", "--optimizer.schedule=constant", "--ema.no-warmup"],
            r"--ema.warmup False would not be used with --optimizer.name schedule_free_adamw",
        ),
        (["digits", "--max-nonfinite", "5"], r"--max-nonfinite 5 would not be used with --nonfinite error"),
        (
            ["digits", "--validation.sigmas", "0.2", "0.4"],
            r"--validation.sigmas 0.2 0.4 would not .* --validation.every 0",
        ),
        (
            ["digits", "--validation.samples", "8"],
            r"--validation.samples 8 would not be used with --validation.every 0",
        ),
        (["digits", "--validation.seed", "8"], r"--validation.seed 8 would not be used with --validation.every 0"),
        (["digits", "--preview.every=0", "--preview.seed", "3"], r"--preview.seed 3 would .* with --preview.every 0"),
        (["digits", "--preview.every=0", "--preview.per-caption", "1"], r"--preview.per-caption 1 would not be used"),
        (["digits", "--preview.every=0", "--preview.captions", "3"], r"--preview.captions 3 would not be used"),
        (["digits", "--preview.prompts", "a", "--preview.captions", "3"], r"--preview.captions 3 .* --preview.prompts"),
        (
            ["lora", "--model", "m", "--data.cache", "c", "--data.caption", "x"],
            r"--data.caption x would .* --data.cache",
        ),
        (["lora", "--model", "m", "--data.cache", "c", "--data.minimum-size", "9"], r"--data.minimum-size 9 would not"),
        (["digits", "--logging.wandb-project", "x"], r"--logging.wandb-project x would not .* without --logging.wandb"),
    ],
)
def test_what_would_not_be_read_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        read_command_line(words)


def test_what_is_read_is_not_refused():
    read_command_line(["digits", "--ema.no-enabled"])  # whose preset has a decay of its own
    read_command_line(["lora", "--model", "m", "--data.cache", "c", "--data.path", "p", "--data.caption", "x"])
    read_command_line(["sana_600m_512", "--encoders", "x", "--model-variant", "bf16", "--data.clip-threshold", "20"])
    read_command_line(["dreambooth", "--prior.caption", "a dog", "--prior.num-inference-steps", "9"])
    read_command_line(["digits", "--preview.every", "0"])  # and previews
    read_command_line(["finetune", "--preview.prompts", "a dog", "--preview.seed", "3"])
    read_command_line(["digits", "--nonfinite", "skip", "--max-nonfinite", "5", "--validation.every", "9"])
    read_command_line(["digits", "--validation.every", "9", "--validation.samples", "8", "--preview.captions", "3"])
    read_command_line(["digits", "--logging.wandb", "--logging.wandb-project", "x"])


def test_a_resumed_run_is_compared_with_what_it_was():
    """Such words as it had stay, whatever is switched off; further ones would not be read."""
    before = changed(changed(load_preset("digits"), "preview.seed", 3), "max_nonfinite", 5)
    now = changed(before, "preview.every", 0)
    check_unread(now, before)
    with pytest.raises(UserError, match=r"--preview.seed 4 would not be used with --preview.every 0"):
        check_unread(changed(now, "preview.seed", 4), before)


def changed(config: RunConfig, name: str, value) -> RunConfig:
    """A copy with the field of that dotted name at another value."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def test_places_are_compared_by_what_they_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    here = changed(dataclasses.replace(load_preset("finetune"), model="org/name"), "data.path", "photos")
    saved = with_absolute_places(here)
    assert (saved.data.path, saved.model) == (str(tmp_path / "photos"), "org/name")
    assert differing_fields(saved, here) == {}
    assert list(differing_fields(saved, changed(here, "data.path", "others"))) == ["data.path"]


def test_an_image_encoder_is_named_from_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "siglip").mkdir()
    here = changed(load_preset("siglip_zoom_lora"), "data.conditions", ("object=siglip:siglip", "zoom=scalar"))
    saved = with_absolute_places(here)
    assert saved.data.conditions == (f"object=siglip:{tmp_path / 'siglip'}", "zoom=scalar")
    assert differing_fields(saved, here) == {}
    others = changed(here, "data.conditions", ("object=siglip:other", "zoom=scalar"))
    assert list(differing_fields(saved, others)) == ["data.conditions"]


def test_memory_may_be_saved_in_a_resumed_run():
    config = load_preset("finetune")
    relieved = changed(changed(config, "compute.remat", "none"), "accumulation", 2)
    assert differing_fields(config, relieved) == {}
    assert list(differing_fields(config, changed(config, "compute.dtype", "float32"))) == ["compute.dtype"]


@pytest.mark.parametrize("name", [*COMPUTED_OTHERWISE, *PLACES])
def test_names_of_what_may_change_are_fields(name):
    presets = (load_preset(preset) for preset in ("dreambooth", "lora_video", "longsana"))
    assert any(has_field(config, name) for config in presets)


def has_field(config, name: str) -> bool:
    first, _, rest = name.partition(".")
    if first not in {field.name for field in dataclasses.fields(config)}:
        return False
    return not rest or (getattr(config, first) is not None and has_field(getattr(config, first), rest))
