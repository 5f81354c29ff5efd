"""Which layers the targets of a LoRA name: those that PEFT finds in diffusers' model, with as many parameters."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import SanaTransformer2DModel
from peft import LoraConfig

from sana_jax.errors import UserError
from sana_jax.lora import PRESETS, match_targets, target_table
from sana_jax.lora.names import lora_targets
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.pipelines.opening import abstract_params
from sana_jax.weights.tables.sana import transformer_rules
from tests.lora.files import WIDTH, abstract
from tests.parity.sana_oracle import TINY, VARIANTS, jax_config

ATTENTION = [f"attn{number}.to_{name}" for number in (1, 2) for name in ("q", "k", "v", "out.0")]
# a video model of 2B parameters: the image model's layers at its width, whose sizes and counts are published
VIDEO_LIKE = {"mlp_ratio": 3.0, "in_channels": 16, "out_channels": 16, "patch_size": 2}
CASES = {
    "tiny": (TINY, 3),
    "tiny sprint": ({**TINY, **VARIANTS["sprint"]}, 3),
    "0.6B": (SanaConfig.sana_600m().to_dict(), 16),
    "1.6B": (SanaConfig.sana_1600m().to_dict(), 8),
    "video-like": (SanaConfig(**VIDEO_LIKE).to_dict(), 16),
}


def their_targets(model: SanaTransformer2DModel) -> dict[str, list[str]]:
    """What each preset means in PyTorch's terms, from the modules' classes."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    pointwise = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1) and ".ff." in name
    ]
    return {
        "attention": [name for name in linear if name.endswith(tuple(ATTENTION))],
        "qkv": ["to_q", "to_k", "to_v"],  # as diffusers' script has it
        "all_linear": linear,
        "all_linear_and_pointwise": linear + pointwise,
    }


@pytest.mark.parametrize("case", CASES)
def test_presets_are_pefts(case):
    values, rank = CASES[case]
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    config = SanaConfig.from_dict(values)
    shapes = abstract_params(SanaTransformer(config))
    ours_by_path = {target.path: set() for target in lora_targets(transformer_rules(config), shapes).values()}
    for name, target in lora_targets(transformer_rules(config), shapes).items():
        ours_by_path[target.path].add(name)
    with torch.device("meta"):
        model = SanaTransformer2DModel(**values)
    for preset, targets in their_targets(model).items():
        model.add_adapter(LoraConfig(r=rank, target_modules=targets))
        theirs = {name: p.numel() for name, p in model.named_parameters() if "lora_" in name}
        modules = {name.partition(".lora_")[0] for name in theirs}
        model.delete_adapters("default")
        matched = match_targets(shapes, (preset,))
        assert set().union(*(ours_by_path[layer.path] for layer in matched)) == modules, preset
        assert sum(layer.parameters(rank) for layer in matched) == sum(theirs.values()), preset
        found = re.search(r"rank \d+ on (\d+) layers: ([\d,]+) trainable", target_table(shapes, (preset,), rank))
        assert int(found[1]) == len(modules)
        assert int(found[2].replace(",", "")) == sum(theirs.values())


def test_known_counts():
    """Millions of parameters at rank 16 that are known of SANA-Video 2B."""
    shapes = abstract_params(SanaTransformer(SanaConfig(**VIDEO_LIKE)))
    counts = {name: sum(layer.parameters(16) for layer in match_targets(shapes, (name,))) / 1e6 for name in PRESETS}
    expected = {"attention": 11.47, "qkv": 8.6, "all_linear": 12.0, "all_linear_and_pointwise": 19.9}
    assert counts == pytest.approx(expected, abs=0.05)


def test_patterns_add_up():
    names = [
        layer.name for layer in match_targets(abstract(), ("proj_out", r"transformer_blocks/attn1/.*", "proj_out"))
    ]
    attention = [f"transformer_blocks/attn1/to_{name}" for name in ("k", "out", "q", "v")]
    assert sorted(names) == sorted(["proj_out", *attention])
    assert [layer.name for layer in match_targets(abstract(), ("patch_embed/proj",))] == ["patch_embed/proj"]


def test_table():
    lines = target_table(abstract(), ("transformer_blocks/attn2/to_v", "proj_out"), 4).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["layer", "layers", "in", "x", "out", "parameters"],
        ["proj_out", "1", f"{WIDTH}", "x", "16", f"{4 * 32}"],
        ["transformer_blocks/attn2/to_v", "3", f"{WIDTH}", "x", f"{WIDTH}", f"{3 * 4 * 32}"],
    ]
    assert lines[3].startswith("LoRA of rank 4 on 4 layers: 512 trainable parameters, ")
    assert len({len(line) for line in lines[:3]}) == 1


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ((), ("without targets", "attention, qkv")),
        (("attn3",), ("'attn3' matches no layer", "attention, qkv", "such as")),
        (("attention", "to_q"), ("'to_q' matches no layer", "try '.*to_q.*'")),
        (("transformer_blocks/ff/conv_depth",), ("matches no layer",)),
        (("(",), ("no regular expression",)),
    ],
)
def test_refused(targets, words):
    with pytest.raises(UserError) as error:
        match_targets(abstract(), targets)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_every_preset_matches_every_image_network():
    for variant in VARIANTS:
        shapes = abstract_params(SanaTransformer(jax_config(variant)))
        for preset in PRESETS:
            assert match_targets(shapes, (preset,))
