"""Going on with a long video decodes as many blocks as the decoder looks back, with the same bits."""

from __future__ import annotations

import shutil

import numpy as np

from sana_jax.videos import read_video
from tests.pipelines.tiny_long_model import BLOCK, PROMPT, tiny_pipeline, tiny_wan

BLOCKS = 20
# One latent stands for two frames of 2 x 2 pixels, and a frame depends on 25 latents before its own.
SHAPE = tiny_wan(
    dim_mult=(1, 1), num_res_blocks=1, temperal_downsample=(True,), scale_factor_temporal=2, scale_factor_spatial=2
)


def test_going_on_decodes_no_more_than_the_decoder_looks_back(tmp_path, monkeypatch, capsys):
    """A video of 20 blocks; frames are compared as they were decoded, before they are rounded to a file's."""
    pipe, path = tiny_pipeline(wan=SHAPE), tmp_path / "resumed"
    decode, seen = pipe.autoencoder.decode_frames, []

    def noted(latents, state):
        frames, state = decode(latents, state)
        seen.append(np.asarray(frames))
        return frames, state

    monkeypatch.setattr(pipe.autoencoder, "decode_frames", noted)
    options = {"frames": 1 + 2 * BLOCK * BLOCKS, "height": 4, "width": 4}
    pipe(PROMPT, **options, output_path=tmp_path / "straight")
    straight = tuple(seen)
    assert (len(straight), pipe.autoencoder.decoder_history) == (BLOCKS, 25)
    # Block 20 begins at latent 58, which looks back to latent 33; the 10th, in which the decoder begins anew, ends at
    # 31. Where the last frame of block 19 is lost, its first latent, 55, looks back to 30, and the 9th ends at 28.
    for lost, first in ((False, 10), (True, 9)):
        pipe(PROMPT, **options, output_path=path, callback_on_block_end=lambda _, block, __: block + 1 < BLOCKS - 1)
        if lost:
            max(path.glob("*.png")).unlink()
        seen.clear()
        capsys.readouterr()
        pipe(PROMPT, **options, output_path=path, resume=True)
        assert f"and blocks {first} to 19 are decoded again" in capsys.readouterr().out
        assert len(seen) == BLOCKS - first + 1
        again = dict(enumerate(seen, first))
        for block in (19, 20) if lost else (20,):
            np.testing.assert_array_equal(again[block], straight[block - 1])
        # it is not the same from its beginning on, or the comparison would say nothing
        assert np.abs(again[first][:, -1] - straight[first - 1][:, -1]).max() > 1e-3
        np.testing.assert_array_equal(read_video(path).frames, read_video(tmp_path / "straight").frames)
        shutil.rmtree(path)
