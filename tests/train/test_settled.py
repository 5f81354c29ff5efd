"""What a run takes over from its base model: the contract of its weights, their bits, and a Sprint's guidance."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import load_preset
from configs.controlnet import ControlNetConfig
from configs.schema import ComputeConfig
from sana_jax.contract import contract_of
from sana_jax.diffusion.samplers import SCM, FlowEuler
from sana_jax.errors import UserError
from sana_jax.models.sana import SanaConfig
from sana_jax.pipelines.model_directory import SamplingDefaults
from tests.pipelines.tiny_model import tiny_config
from train.base_model import contract_notice, in_dtype, settle
from train.main import read_command_line
from train.plan import settled
from train.recipes import make_recipe

ORIGINAL = "Sana_1600M_1024px_diffusers"


def base(config: SanaConfig, name: str = ORIGINAL, sampler=None):
    """A model of which the weights are not asked for."""
    defaults = SamplingDefaults(guidance_scale=4.5, num_inference_steps=2, height=8, width=8)
    contract = contract_of(config, names=[name], stored={})
    parts = types.SimpleNamespace(
        transformer_config=config, sampler=sampler or FlowEuler(3.0), defaults=defaults, contract=contract
    )
    return types.SimpleNamespace(parts=parts)


def run_of(preset: str = "lora", **compute):
    config = dataclasses.replace(load_preset(preset), model=ORIGINAL)
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, **compute))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_that_need_saturation_are_refused_without_it(dtype):
    model = base(SanaConfig.sana_1600m())
    with pytest.raises(UserError, match=rf"{dtype} is not allowed .* Add --compute.emulate-fp16-saturation"):
        settle(run_of(dtype=dtype), model)
    config = settle(run_of(dtype=dtype, emulate_fp16_saturation=True), model)
    assert make_recipe(config).transformer.fp16_saturation
    with pytest.raises(UserError, match=r"--compute.emulate-fp16-saturation: SANA-1.5 .* was not trained with"):
        settle(run_of(emulate_fp16_saturation=True), base(SanaConfig.sana15_1600m(), "SANA1.5_1.6B_1024px"))


def test_a_plan_knows_it_without_the_weights():
    words = ["lora_24gb", "--model", f"Efficient-Large-Model/{ORIGINAL}"]
    with pytest.raises(UserError, match="bfloat16 is not allowed for Sana_1600M_1024px"):
        settled(read_command_line(words))
    assert settled(read_command_line([*words, "--compute.emulate-fp16-saturation"]))[0].transformer is not None


def test_sources_that_conflict_are_said():
    model = base(SanaConfig.sana_600m(), "Sana_600M_1024px")
    assert "add --compute.emulate-fp16-saturation" in contract_notice(settle(run_of(), model), model)
    assert contract_notice(run_of(), base(SanaConfig.sana15_1600m(), "SANA1.5_1.6B_1024px")) is None


def test_a_controlnet_saturates_as_its_base_model():
    config = dataclasses.replace(run_of("controlnet"), controlnet=ControlNetConfig(num_layers=1))
    config = dataclasses.replace(config, compute=ComputeConfig(emulate_fp16_saturation=True))
    recipe = make_recipe(dataclasses.replace(config, transformer=tiny_config()))
    assert recipe.controlnet.fp16_saturation
    assert recipe.transformer.fp16_saturation


def test_parameters_are_cast_where_they_are():
    params = {"a": jnp.asarray(np.float32([1.0, 1.0 + 2**-9])), "b": jnp.ones(3, jnp.bfloat16)}
    found = in_dtype(params, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(found["a"], np.asarray(params["a"]).astype(jnp.bfloat16))
    assert found["b"] is params["b"]
    shapes = in_dtype(jax.eval_shape(lambda: params), "bfloat16")
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (found, shapes)]
    assert kinds[0] == kinds[1]
    assert in_dtype(None, "float32") is None


def test_a_sprint_model_is_told_its_guidance_and_sampled_in_its_steps():
    config = tiny_config(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    settled_run = settle(run_of(dtype="float32"), base(config, "mine", SCM()))
    assert settled_run.flow.embedded_guidance == 4.5
    assert (settled_run.preview.sampler, settled_run.preview.num_inference_steps) == ("scm", 2)
    assert make_recipe(settled_run).guidance_scale == 4.5
    assert settle(settled_run, base(config, "mine", SCM())) == settled_run  # as a resumed run is
    prior = dataclasses.replace(run_of("dreambooth").prior, caption="a dog")
    with pytest.raises(UserError, match=r"is distilled to few steps .* there is no --prior.caption"):
        settle(dataclasses.replace(run_of("dreambooth"), prior=prior), base(config, "mine", SCM()))
