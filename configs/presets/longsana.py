"""LongSANA, stage 3: the generator learns on windows of videos that grow to a minute (streaming self-forcing).

    python -m train.main longsana --model TEACHER --self-forcing.generator runs/longsana_self_forcing \\
        --self-forcing.fake-score runs/longsana_self_forcing --data.path prompts.txt

NVlabs/Sana, configs/sana_video_config/longsana/480ms/longsana: as stage 2, with windows of 21 latent frames of which
20 are new, videos of 261 latent frames, 30,000 of upstream's steps, which are 36,000 of these. Motion score 10 is told
to all networks, as there.

Different here, beside how steps are counted: no text, or what ``--data.negative-prompt`` says, for the real score's
unconditional branch, as in ``longsana_self_forcing``; and the fake score of stage 2 goes on, where upstream's begins as
the teacher, which leaving ``--self-forcing.fake-score`` out does.
"""

from __future__ import annotations

import dataclasses

from configs.longsana import StreamConfig
from configs.presets.longsana_self_forcing import CONFIG as STAGE_2

CONFIG = dataclasses.replace(
    STAGE_2,
    preset="longsana",
    run_dir="runs/longsana",
    steps=36_000,
    self_forcing=dataclasses.replace(STAGE_2.self_forcing, stream=StreamConfig()),
)
