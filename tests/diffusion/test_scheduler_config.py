"""scheduler_config.json of published models, both ways, through diffusers' own loader."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest

from sana_jax.diffusion.samplers import (
    SCM,
    DPMSolver,
    FlowEuler,
    from_scheduler_config,
    make_sampler,
    to_scheduler_config,
)
from sana_jax.errors import UserError

CASES = [
    (
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, lambda_min_clipped=-float("inf")
        ),
        DPMSolver(flow_shift=3.0),
    ),
    (
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0, solver_order=1
        ),
        DPMSolver(flow_shift=8.0, solver_order=1),
    ),
    (diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0), FlowEuler(flow_shift=8.0)),
    (diffusers.FlowMatchEulerDiscreteScheduler(), FlowEuler()),
    (diffusers.SCMScheduler(), SCM()),
    (diffusers.SCMScheduler(sigma_data=0.7), SCM(sigma_data=0.7)),
]


def _saved(scheduler, folder) -> dict:
    scheduler.save_pretrained(folder)
    return json.loads((folder / "scheduler_config.json").read_text())


@pytest.mark.parametrize(("scheduler", "sampler"), CASES)
def test_files_that_diffusers_writes_are_read(scheduler, sampler, tmp_path):
    assert from_scheduler_config(_saved(scheduler, tmp_path)) == sampler


@pytest.mark.parametrize(("scheduler", "sampler"), CASES)
def test_files_that_we_write_are_read_by_diffusers_and_by_us(scheduler, sampler, tmp_path):
    config = to_scheduler_config(sampler)
    assert from_scheduler_config(config) == sampler
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    loaded = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    assert type(loaded) is type(scheduler)
    loaded.set_timesteps(2)
    timesteps = loaded.timesteps.numpy()[:2]
    np.testing.assert_array_equal(timesteps, sampler.schedule(2).timesteps)
    for key in config:
        if not key.startswith("_"):
            assert loaded.config[key] == scheduler.config[key], key


def test_absent_keys_have_the_values_of_diffusers():
    assert from_scheduler_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}).flow_shift == 1.0
    flow = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    assert from_scheduler_config(flow).flow_shift == 1.0
    with pytest.raises(UserError, match=r"prediction_type='epsilon'.*use_flow_sigmas=False"):
        from_scheduler_config({"_class_name": "DPMSolverMultistepScheduler"})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prediction_type", "epsilon"),
        ("prediction_type", "v_prediction"),
        ("use_flow_sigmas", False),
        ("algorithm_type", "sde-dpmsolver++"),
        ("solver_type", "heun"),
        ("final_sigmas_type", "sigma_min"),
        ("thresholding", True),
        ("use_karras_sigmas", True),
        ("use_beta_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_lu_lambdas", True),
        ("use_dynamic_shifting", True),
        ("solver_order", 3),
        ("s_churn", 0.1),
    ],
)
def test_dpm_settings_that_are_not_implemented_are_named(setting, value):
    config = to_scheduler_config(DPMSolver()) | {setting: value}
    with pytest.raises(UserError, match=f"{setting}={value!r}".replace("+", r"\+")):
        from_scheduler_config(config)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dynamic_shifting", True),
        ("invert_sigmas", True),
        ("shift_terminal", 0.1),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("stochastic_sampling", True),
        ("rho", 7.0),
    ],
)
def test_euler_settings_that_are_not_implemented_are_named(setting, value):
    with pytest.raises(UserError, match=f"{setting}={value!r}"):
        from_scheduler_config(to_scheduler_config(FlowEuler()) | {setting: value})


def test_all_problems_are_named_at_once():
    config = to_scheduler_config(DPMSolver()) | {"thresholding": True, "solver_type": "heun", "unheard_of": 1}
    with pytest.raises(UserError, match=r"solver_type='heun'.*thresholding=True.*unheard_of=1"):
        from_scheduler_config(config)
    with pytest.raises(UserError, match="prediction_type='sample'"):
        from_scheduler_config({"_class_name": "SCMScheduler", "prediction_type": "sample"})


def test_unknown_classes_are_named():
    for config in ({"_class_name": "DDIMScheduler"}, {}):
        with pytest.raises(
            UserError, match="DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler"
        ):
            from_scheduler_config(config)


def test_a_config_converted_from_the_dpm_solver_keeps_its_keys(tmp_path):
    """diffusers writes the DPM keys along; a flow_shift among them is the one that contradicts the shift it reads."""
    dpm = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    converted = _saved(diffusers.FlowMatchEulerDiscreteScheduler.from_config(dpm.config, shift=8.0), tmp_path)
    assert "flow_shift" in converted
    assert from_scheduler_config(converted) == FlowEuler(flow_shift=8.0)
    trap = _saved(diffusers.FlowMatchEulerDiscreteScheduler.from_config(dpm.config), tmp_path)
    assert trap["shift"] == 1.0
    with pytest.raises(UserError, match=r"flow_shift=8\.0 beside shift=1\.0"):
        from_scheduler_config(trap)


def test_settings_of_a_call_are_not_lost_silently():
    with pytest.raises(UserError, match="intermediate_timesteps=None"):
        to_scheduler_config(SCM(intermediate_timesteps=None))
    with pytest.raises(UserError, match="object has no diffusers scheduler"):
        to_scheduler_config(object())


def test_names_make_samplers():
    assert make_sampler("dpm_solver", flow_shift=6.0) == DPMSolver(flow_shift=6.0)
    assert make_sampler("flow_euler") == FlowEuler()
    assert make_sampler("scm", sigma_data=1.0) == SCM(sigma_data=1.0)
