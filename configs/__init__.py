"""Configurations of runs, and presets of them: one small Python file per recipe in ``configs/presets``."""

from __future__ import annotations

import difflib
import importlib

from configs.schema import RunConfig
from sana_jax.errors import UserError

# Preset name -> module. The first is what `python -m train.main` runs without a name.
PRESETS = {
    "digits": "configs.presets.digits",
    "digits_lora": "configs.presets.digits_lora",
    "digits_controlnet": "configs.presets.digits_controlnet",
    "lora": "configs.presets.lora",
    "finetune": "configs.presets.finetune",
    "dreambooth": "configs.presets.dreambooth",
    "siglip_zoom_lora": "configs.presets.siglip_zoom_lora",
    "controlnet": "configs.presets.controlnet",
    "digits_sprint": "configs.presets.digits_sprint",
    "sprint": "configs.presets.sprint",
    "moving_digits": "configs.presets.moving_digits",
    "moving_digits_ode": "configs.presets.moving_digits_ode",
    "moving_digits_self_forcing": "configs.presets.moving_digits_self_forcing",
    "moving_digits_longsana": "configs.presets.moving_digits_longsana",
    "moving_camera_ode": "configs.presets.moving_camera_ode",
    "moving_camera_self_forcing": "configs.presets.moving_camera_self_forcing",
    "sana_600m_512": "configs.presets.sana_600m_512",
    "sana_1600m_512": "configs.presets.sana_1600m_512",
    "sana_1600m_1024": "configs.presets.sana_1600m_1024",
    "sana_1600m_2k": "configs.presets.sana_1600m_2k",
    "sana_1600m_4k": "configs.presets.sana_1600m_4k",
    "sana15_1600m_1024": "configs.presets.sana15_1600m_1024",
    "sana15_4800m_1024": "configs.presets.sana15_4800m_1024",
    "lora_24gb": "configs.presets.lora_24gb",
    "finetune_8x80gb": "configs.presets.finetune_8x80gb",
    "finetune_multihost": "configs.presets.finetune_multihost",
    "sana_1600m_controlnet": "configs.presets.sana_1600m_controlnet",
    "lora_video": "configs.presets.lora_video",
    "tom_and_jerry_lora": "configs.presets.tom_and_jerry_lora",
    "finetune_video": "configs.presets.finetune_video",
    "sana_video_2b_480p": "configs.presets.sana_video_2b_480p",
    "sana_video_2b_720p": "configs.presets.sana_video_2b_720p",
    "moving_camera": "configs.presets.moving_camera",
    "finetune_world": "configs.presets.finetune_world",
    "lora_world": "configs.presets.lora_world",
    "sana_wm_2b_bidirectional": "configs.presets.sana_wm_2b_bidirectional",
    "sana_wm_2b_chunk_causal": "configs.presets.sana_wm_2b_chunk_causal",
    "sana_wm_ode": "configs.presets.sana_wm_ode",
    "sana_wm_self_forcing": "configs.presets.sana_wm_self_forcing",
    "sana_wm_self_forcing_t121": "configs.presets.sana_wm_self_forcing_t121",
    "longsana_chunk_causal": "configs.presets.longsana_chunk_causal",
    "longsana_ode": "configs.presets.longsana_ode",
    "longsana_self_forcing": "configs.presets.longsana_self_forcing",
    "longsana": "configs.presets.longsana",
}
DEFAULT_PRESET = "digits"


def load_preset(name: str) -> RunConfig:
    """The configuration of a preset.

    Raises:
        UserError: there is none of that name.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else "leave it out for the embedded default."
        raise UserError(f"unknown preset {name!r}; {hint} The presets are {', '.join(PRESETS)}")
    return importlib.import_module(PRESETS[name]).CONFIG
