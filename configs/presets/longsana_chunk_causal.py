"""Before LongSANA: a SANA-Video learns to see causal blocks of frames, each at a noise level of its own.

    python -m train.main longsana_chunk_causal --model SANA_VIDEO --data.path videos/

SANA-Video, arXiv 2509.24695, section 4: levels rise from block to block, every rising sequence alike likely. Blocks
of 10 latent frames as in NVlabs/Sana, train_video_scripts/train_video_ivjoint_chunk.py; optimizer, shift and clips
are those of the 480p recipe, steps and batch this preset's own. The result is where ``longsana_ode`` begins.

Different here: ``--chunk-causal.image-to-video`` gives the first frame of every clip, upstream that of a share of the
batches; a given frame is out of the loss in both. What ``sana_video_2b_480p`` lists is different here as well.
"""

from __future__ import annotations

import dataclasses

from configs.longsana import ChunkCausalConfig
from configs.presets.sana_video_2b_480p import CONFIG as VIDEO
from configs.schema import VideoFlowConfig

CONFIG = dataclasses.replace(
    VIDEO,
    preset="longsana_chunk_causal",
    run_dir="runs/longsana_chunk_causal",
    steps=20_000,
    transformer=None,
    chunk_causal=ChunkCausalConfig(),
    flow=VideoFlowConfig(flow_shift=3.0),
)
