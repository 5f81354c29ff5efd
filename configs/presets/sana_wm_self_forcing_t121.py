"""SANA-WM's streaming student, stage 3: as stage 2, on clips of a minute, 121 latent frames.

    python -m train.main sana_wm_self_forcing_t121 --model SANA_WM \\
        --self-forcing.generator runs/sana_wm_self_forcing --self-forcing.fake-score runs/sana_wm_self_forcing \\
        --data.path videos/

NVlabs/Sana, configs/sana_wm/distill/self_forcing_t121: as ``sana_wm_self_forcing``, whose generator and fake score go
on; blocks see the first block and the newest before them, as in streaming; 3,000 of upstream's steps, which are 3,600
of these.
"""

from __future__ import annotations

import dataclasses

from configs.presets.sana_wm_self_forcing import CONFIG as T43
from configs.world_data import WorldDataConfig

CONFIG = dataclasses.replace(
    T43,
    preset="sana_wm_self_forcing_t121",
    run_dir="runs/sana_wm_self_forcing_t121",
    steps=3600,
    data=WorldDataConfig(clip_frames=961),
    self_forcing=dataclasses.replace(T43.self_forcing, num_cached_blocks=2, sink=True),
    checkpoint=dataclasses.replace(T43.checkpoint, every=600),
)
