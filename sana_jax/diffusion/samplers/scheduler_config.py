"""Samplers by name, and to and from the ``scheduler_config.json`` that published models carry.

A configuration is accepted only if this library samples exactly as diffusers would with it. Settings that have no
effect in the mode at hand are passed over; every other setting must have the value that is implemented here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sana_jax.diffusion.samplers.base import Sampler
from sana_jax.diffusion.samplers.dpm_solver import DPMSolver
from sana_jax.diffusion.samplers.flow_euler import FlowEuler
from sana_jax.diffusion.samplers.longsana import DENOISING_STEPS, LongSanaSampler
from sana_jax.diffusion.samplers.scm import SCM
from sana_jax.diffusion.samplers.world_model import DISTILLED_STEPS, WorldStreamSampler
from sana_jax.errors import UserError

SAMPLERS: dict[str, type] = {"flow_euler": FlowEuler, "dpm_solver": DPMSolver, "scm": SCM}


@dataclasses.dataclass(frozen=True)
class _Mapping:
    """How one scheduler class of diffusers is read and written.

    Attributes:
      sampler: our sampler.
      fields: key of the configuration -> our field.
      defaults: value that diffusers takes for an absent key of ``fields`` or ``required``.
      required: key -> the values that are implemented; the first is written.
      no_effect: keys that the flow mode does not read.
    """

    sampler: type
    fields: dict[str, str]
    defaults: dict[str, Any]
    required: dict[str, tuple]
    no_effect: frozenset[str]


_MAPPINGS = {
    "DPMSolverMultistepScheduler": _Mapping(
        sampler=DPMSolver,
        fields={
            "flow_shift": "flow_shift",
            "solver_order": "solver_order",
            "num_train_timesteps": "num_train_timesteps",
        },
        defaults={
            "flow_shift": 1.0,
            "solver_order": 2,
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "use_flow_sigmas": False,
        },
        required={
            "prediction_type": ("flow_prediction",),
            "use_flow_sigmas": (True,),
            "algorithm_type": ("dpmsolver++",),
            "solver_type": ("midpoint",),
            "final_sigmas_type": ("zero",),
            "thresholding": (False,),
            "use_karras_sigmas": (False, None),
            "use_exponential_sigmas": (False, None),
            "use_beta_sigmas": (False, None),
            "use_lu_lambdas": (False, None),
            "use_dynamic_shifting": (False, None),
        },
        # The diffusion (not flow) noise table and its spacing, clipping of pixels, and order reductions that the final
        # sigma of 0 forces anyway.
        no_effect=frozenset(
            {
                "beta_start",
                "beta_end",
                "beta_schedule",
                "trained_betas",
                "rescale_betas_zero_snr",
                "lambda_min_clipped",
                "timestep_spacing",
                "steps_offset",
                "variance_type",
                "dynamic_thresholding_ratio",
                "sample_max_value",
                "time_shift_type",
                "lower_order_final",
                "euler_at_final",
            }
        ),
    ),
    "FlowMatchEulerDiscreteScheduler": _Mapping(
        sampler=FlowEuler,
        fields={"shift": "flow_shift", "num_train_timesteps": "num_train_timesteps"},
        defaults={"shift": 1.0, "num_train_timesteps": 1000},
        required={
            "use_dynamic_shifting": (False, None),
            "invert_sigmas": (False, None),
            "shift_terminal": (None, False, 0, 0.0),
            "use_karras_sigmas": (False, None),
            "use_exponential_sigmas": (False, None),
            "use_beta_sigmas": (False, None),
            "stochastic_sampling": (False, None),
        },
        no_effect=frozenset({"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}),
    ),
    "SCMScheduler": _Mapping(
        sampler=SCM,
        fields={"sigma_data": "sigma_data", "num_train_timesteps": "num_train_timesteps"},
        defaults={"sigma_data": 0.5, "num_train_timesteps": 1000},
        required={"prediction_type": ("trigflow",)},
        no_effect=frozenset(),
    ),
    # LongSANA comes without a file of its own; this one has upstream's names for what its training settings say.
    "LongSanaScheduler": _Mapping(
        sampler=LongSanaSampler,
        fields={
            "shift": "flow_shift",
            "denoising_step_list": "timesteps",
            "num_train_timesteps": "num_train_timesteps",
            "base_chunk_frames": "block_frames",
            "num_cached_blocks": "num_cached_blocks",
        },
        defaults={
            "shift": 7.0,
            "denoising_step_list": DENOISING_STEPS,
            "num_train_timesteps": 1000,
            "base_chunk_frames": 10,
            "num_cached_blocks": None,
        },
        required={},
        no_effect=frozenset(),
    ),
    # Nor does SANA-WM's streaming student.
    "SanaWMStreamScheduler": _Mapping(
        sampler=WorldStreamSampler,
        fields={
            "denoising_step_list": "timesteps",
            "num_train_timesteps": "num_train_timesteps",
            "chunk_size": "block_frames",
            "chunk_split_strategy": "blocks",
            "num_cached_blocks": "num_cached_blocks",
            "sink_token": "sink",
        },
        defaults={
            "denoising_step_list": DISTILLED_STEPS,
            "num_train_timesteps": 1000,
            "chunk_size": 3,
            "chunk_split_strategy": "first_plus_one",
            "num_cached_blocks": 2,
            "sink_token": True,
        },
        required={},
        no_effect=frozenset(),
    ),
}


def make_sampler(name: str, **settings) -> Sampler:
    """Makes a sampler of ``SAMPLERS`` by name, e.g. ``make_sampler("dpm_solver", flow_shift=3.0)``.

    Raises:
      UserError: for an unknown name, a setting that the sampler does not have, or a bad value.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is not known; choose one of {', '.join(SAMPLERS)}")
    allowed = [field.name for field in dataclasses.fields(SAMPLERS[name])]
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        raise UserError(f"sampler {name!r} has no setting {', '.join(unknown)}; it has {', '.join(allowed)}")
    return SAMPLERS[name](**settings)


def from_scheduler_config(config: Mapping[str, Any]) -> Sampler:
    """The sampler that a diffusers ``scheduler_config.json`` describes.

    Args:
      config: the parsed file. Keys beginning with an underscore other than ``_class_name`` are passed over.

    Raises:
      UserError: for a scheduler class, a key or a value whose behaviour is not implemented; all offending settings are
        named at once.
    """
    class_name = config.get("_class_name")
    if class_name not in _MAPPINGS:
        raise UserError(
            f"scheduler class {class_name!r} is not available; use a scheduler_config.json of {', '.join(_MAPPINGS)}, "
            f"or choose a sampler by name ({', '.join(SAMPLERS)})"
        )
    mapping = _MAPPINGS[class_name]
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    problems = []
    for key, allowed in mapping.required.items():
        value = settings.get(key, mapping.defaults.get(key, allowed[0]))
        if not any(value is choice or value == choice for choice in allowed):
            problems.append(f"{key}={value!r} (only {allowed[0]!r})")
    for key in sorted(set(settings) - set(mapping.fields) - set(mapping.required) - mapping.no_effect):
        problem = _leftover_problem(class_name, key, settings)
        if problem:
            problems.append(problem)
    if problems:
        raise UserError(
            f"{class_name} with {'; '.join(problems)} is not implemented; "
            f"change scheduler_config.json or choose a sampler by name ({', '.join(SAMPLERS)})"
        )
    return mapping.sampler(**{field: settings.get(key, mapping.defaults[key]) for key, field in mapping.fields.items()})


def to_scheduler_config(sampler: Sampler) -> dict[str, Any]:
    """The diffusers configuration that samples as ``sampler`` does; ``from_scheduler_config`` reads it back.

    Raises:
      UserError: for a setting that diffusers takes per call and not in the file (the angles of ``SCM``).
    """
    class_names = [name for name, mapping in _MAPPINGS.items() if type(sampler) is mapping.sampler]
    if not class_names:
        raise UserError(f"{type(sampler).__name__} has no diffusers scheduler; use one of {', '.join(SAMPLERS)}")
    class_name, mapping = class_names[0], _MAPPINGS[class_names[0]]
    for field in dataclasses.fields(sampler):
        if field.name not in mapping.fields.values() and getattr(sampler, field.name) != field.default:
            raise UserError(
                f"{field.name}={getattr(sampler, field.name)!r} has no place in the scheduler_config.json of a "
                f"{class_name}; leave it at {field.default!r} and pass it when sampling"
            )
    written = {key: getattr(sampler, field) for key, field in mapping.fields.items()}
    return {"_class_name": class_name, **written, **{key: allowed[0] for key, allowed in mapping.required.items()}}


def _leftover_problem(class_name: str, key: str, settings: Mapping[str, Any]) -> str | None:
    """What is wrong with a key that the scheduler class does not have, or None if it can be passed over.

    diffusers keeps the keys of the class a configuration was converted from. Those of the DPM solver change nothing in
    an Euler configuration, with one exception: ``flow_shift`` there is not read, ``shift`` is, and if the two differ it
    is not clear which one was meant.
    """
    if class_name == "FlowMatchEulerDiscreteScheduler":
        shift = settings.get("shift", 1.0)
        if key == "flow_shift":
            differs = settings[key] != shift
            return (
                f"flow_shift={settings[key]!r} beside shift={shift!r} (diffusers reads shift alone)"
                if differs
                else None
            )
        dpm = _MAPPINGS["DPMSolverMultistepScheduler"]
        if key in dpm.fields or key in dpm.required or key in dpm.no_effect:
            return None
    return f"{key}={settings[key]!r} (not a setting of {class_name} that is known here)"
