"""SANA-WM 2.6B, stage 1 in causal blocks: from the bidirectional model to the one that streaming is distilled from.

    python -m train.main sana_wm_2b_chunk_causal --model SANA_WM --data.path videos/
    python -m train.main sana_wm_2b_chunk_causal --model SANA_WM --data.path latents/ --data.format zip_latents

NVlabs/Sana, configs/sana_wm/stage1 (chunk_causal_cp2_fsdp2): blocks of three latent frames, of which the first has one
more; the levels of a clip's blocks are one for all (a tenth of the clips), rise through a level of a random block (four
tenths) or to a level of the last one (four tenths), or that with leading blocks clean (a tenth). Optimizer, shift and
clips are those of ``sana_wm_2b_bidirectional``. The result is where ``sana_wm_ode`` begins.
"""

from __future__ import annotations

import dataclasses

from configs.presets.sana_wm_2b_bidirectional import CONFIG as BIDIRECTIONAL
from configs.schema import VideoFlowConfig
from configs.world import WorldChunksConfig

CONFIG = dataclasses.replace(
    BIDIRECTIONAL,
    preset="sana_wm_2b_chunk_causal",
    run_dir="runs/sana_wm_2b_chunk_causal",
    steps=20_000,
    transformer=None,
    chunk_causal=WorldChunksConfig(),
    flow=VideoFlowConfig(flow_shift=9.95, image_to_video=0.9),
)
