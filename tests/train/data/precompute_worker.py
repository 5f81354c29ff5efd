"""Makes the cache of gray pictures in a process of its own, slowly and in small shards, so that it can be killed.

python -m tests.train.data.precompute_worker MODEL PICTURES CACHE SECONDS_PER_BATCH
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sana_jax.autoencoders import PixelAutoencoder
from sana_jax.pipelines.model_directory import read_model_directory
from sana_jax.text_encoders import WordEncoder
from train import precompute
from train.data import encoding, shard_filler
from train.preemption import StopRequest, exit_status


def main(model: str, pictures: str, cache: str, seconds: str) -> int:
    from tests.train.data.cache_cases import run_config

    stop = StopRequest()
    # A shard per batch, batches of four.
    shard_filler.SHARD_SECONDS = 0.0
    encoding._MOST_PICTURES, encoding._MOST_PROMPTS = 4, 4
    for part in (PixelAutoencoder, WordEncoder):
        part.encode = _slowly(part.encode, float(seconds))
    config = run_config(Path(pictures), Path(cache), flip=True)
    finished = precompute.precompute(
        config, read_model_directory(model), say=lambda line: print(line, flush=True), stop=stop
    )
    print("torch" in sys.modules, flush=True)
    return 0 if finished else exit_status(stop.signal)


def _slowly(function, seconds: float):
    def slow(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
