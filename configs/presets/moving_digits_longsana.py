"""LongSANA's stage 3 in miniature, on a CPU: windows of clips that grow to six times their length.

    python -m train.main moving_digits_longsana --model runs/moving_digits \\
        --self-forcing.generator runs/moving_digits_self_forcing \\
        --self-forcing.fake-score runs/moving_digits_self_forcing
"""

from __future__ import annotations

import dataclasses

from configs.longsana import StreamConfig
from configs.presets.moving_digits_self_forcing import CONFIG as STAGE_2

CONFIG = dataclasses.replace(
    STAGE_2,
    preset="moving_digits_longsana",
    run_dir="runs/moving_digits_longsana",
    self_forcing=dataclasses.replace(
        STAGE_2.self_forcing, stream=StreamConfig(total_frames=29, window_frames=5, overlap_frames=1)
    ),
)
