"""Published recipes at full size: their steps over 8 and 64 devices, as far as they go without the devices."""

from __future__ import annotations

import math
import re

import jax
import pytest

from configs import PRESETS
from tests.train.compiled_presets import check_fetched_layer_by_layer, compiled_report
from tests.train.presets import abstract_mesh, preset_run
from train.sharding import parameter_paths

# What every device holds: vectors, tables, depthwise kernels (nine values per channel), a LoRA's factors beside uncut
# axes, the optimizers' sums along cut axes, and small parts of Sprint's losses.
WHOLE = (
    r"(^|/)(bias|scale|\w*table|null|attention_weight)(/|$)|conv_depth/|lora/.*/(up|down)|"
    r"(block_scales|block_minimums|residual_per_\w+|second_per_\w+)$|attn1/(decay_\w+|conv_[qkv](_camera)?_kernel)(/|$)"
)
OF_SPRINT = r"(^|/)(vectors|logvar)/"
# Of everything that a device holds.
LARGEST_WHOLE_SHARE = 0.02
# One of each kind; `make prove` lowers all of them.
LOWERED = [
    *[("sana_600m_512", 8), ("sana15_4800m_1024", 64), ("lora_24gb", 8), ("sana_1600m_controlnet", 64)],
    *[("tom_and_jerry_lora", 8), ("sana_video_2b_480p", 64)],
]
MINIATURES = ("digits", "moving_camera")  # for a CPU
FULL_SIZE = [name for name in PRESETS if not any(small in name for small in MINIATURES)]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_the_state_of_every_preset_is_cut_over_eight_devices(name):
    run = preset_run(name, abstract_mesh(fsdp=8))
    state = parameter_paths(run.state.abstract._replace(step=None))
    everything = {**state, **{f"frozen/{path}": leaf for path, leaf in parameter_paths(run.frozen or {}).items()}}
    whole = 0
    for path, leaf in everything.items():
        part = leaf.sharding.shard_shape(leaf.shape)
        if part == leaf.shape:
            if re.search(OF_SPRINT, path):
                continue
            whole += leaf.size
            assert leaf.ndim <= 1 or re.search(WHOLE, path), f"{path} of {leaf.shape} is whole"
        else:
            assert math.prod(part) * 8 == leaf.size, path
    assert whole < LARGEST_WHOLE_SHARE * sum(leaf.size for leaf in everything.values())
    assert run.state.whole == []


def all_lowered():
    """`make test` lowers one preset of each kind, `make prove` all of them for 8 and for 64 devices."""
    for name in FULL_SIZE:
        for devices in (8, 64):
            marks = () if (name, devices) in LOWERED else pytest.mark.prove
            yield pytest.param(name, devices, marks=marks)


@pytest.mark.parametrize(("name", "devices"), list(all_lowered()))
def test_the_full_size_step_lowers_for_gpus(name, devices):
    mesh = abstract_mesh(data=devices // 8, fsdp=8)
    with jax.sharding.use_abstract_mesh(mesh):
        run = preset_run(name, mesh)
        arguments = run.state.abstract, run.frozen, run.batch
        for step in run.jitted_steps():
            text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
            assert f"mhlo.num_partitions = {devices}" in text
            # every argument that is cut says so; DreamBooth has the fewest, 18 of LoRA and optimizer and 17 frozen
            cut = sum("fsdp" in str(leaf.sharding.spec) for leaf in jax.tree.leaves(arguments[:2]))
            assert text.count('{"fsdp"}') >= cut >= 35


@pytest.fixture(scope="module")
def narrow_run(tmp_path_factory) -> dict:
    """The 0.6B model's step with all 28 blocks and a sixth of its width, compiled for eight devices."""
    return compiled_report(tmp_path_factory.mktemp("narrow") / "report.json", "sana_600m_512", "fsdp=8", "width=6")


@pytest.mark.prove
def test_weights_are_fetched_layer_by_layer(narrow_run):
    check_fetched_layer_by_layer(narrow_run)


@pytest.mark.prove
def test_the_estimate_without_compiling_is_near(narrow_run):
    assert narrow_run["estimated"] == pytest.approx(narrow_run["bytes"], rel=0.15)


WHOLE_AND_PART = {
    "transformer_blocks/to_q/kernel": [[4, 64, 16], [4, 8, 16]],
    "proj_out/kernel": [[64, 8], [8, 8]],
    "bias": [[8], [8]],
}
AS_IT_SHOULD = [["all-gather", [64, 16], 1], ["all-gather", [64, 8], 0]]


@pytest.mark.parametrize(
    ("parts", "exchanges", "what"),
    [
        ({}, [*AS_IT_SHOULD, ["all-gather", [64, 16], 0]], "outside of the loop"),
        ({}, [*AS_IT_SHOULD, ["all-gather", [4, 64, 16], 0]], "outside of the loop"),
        ({}, [*AS_IT_SHOULD, ["all-gather", [4, 64, 16], 1]], "more than a layer"),
        ({}, [*AS_IT_SHOULD, ["all-gather", [2, 64, 16], 1]], "more than a layer"),
        ({}, [*AS_IT_SHOULD, ["all-reduce", [32, 8], 0]], "neither a parameter nor small"),
        ({}, AS_IT_SHOULD[1:], "never fetched"),
        ({}, [*AS_IT_SHOULD, *AS_IT_SHOULD[:1] * 3], "fetched too often"),
        ({"proj_out/kernel": [[64, 8], [64, 8]]}, AS_IT_SHOULD, "is whole"),
        ({"transformer_blocks/to_q/kernel": [[4, 64, 16], [1, 64, 16]]}, AS_IT_SHOULD, "cut by its layers"),
    ],
)
def test_what_is_fetched_otherwise_is_found(parts, exchanges, what):
    trained = {f"params/{path}": pair for path, pair in (WHOLE_AND_PART | parts).items()}
    with pytest.raises(AssertionError, match=what):
        check_fetched_layer_by_layer({"parameters": {}, "trained": trained, "exchanges": exchanges})


def test_what_is_fetched_layer_by_layer_passes():
    trained = {f"params/{path}": pair for path, pair in WHOLE_AND_PART.items()}
    check_fetched_layer_by_layer({"parameters": WHOLE_AND_PART, "trained": trained, "exchanges": AS_IT_SHOULD})
