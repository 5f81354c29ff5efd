"""Draws checkpoints x prompts x seeds x guidance (x LoRA files x their weights) as one HTML page and one CSV table.

Of video models it shows clips, which move on the page; strips and sheets have some of their frames.

    python -m train.compare runs/digits --prompts "a handwritten seven" "a handwritten two" --seeds 0 1 --output seen
    python -m train.compare runs/digits --previews     # joins the run's own previews into one strip

A picture's noise depends on its seed alone: it is what ``python -m sana_jax.generate --seed`` draws. Pictures that were
drawn before with the same settings are not drawn again, so that an interrupted command is simply repeated.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sana_jax.command_line import parse
from sana_jax.devices import computing
from sana_jax.errors import UserError, counted, run_command_line
from sana_jax.files import write_json
from sana_jax.generate import GenerateConfig, picture_settings
from sana_jax.images import save_gif, save_png, strip
from sana_jax.pipelines.base import ImagePipeline
from train.evaluation.comparison_plan import (
    PROG,
    CompareConfig,
    Picture,
    plan_columns,
    plan_pictures,
    read_record,
    slug,
)
from train.evaluation.comparison_results import frames_of_one_size, write_results
from train.evaluation.drawing import (
    NO_PICTURE,
    Opener,
    as_trained,
    is_training_run,
    read_prompts,
    remove_temporaries,
)
from train.preview_clips import clip_table, write_moving

_PREVIEW = re.compile(r"step_(\d+)\.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (by default the program's own) and returns its exit status.

    Raises:
        UserError, FileNotFoundError: one line about what is wrong with it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    models = ["--models", *words[:first]] if first else []
    config = parse(CompareConfig, [*models, *words[first:]], prog=PROG)
    if config.previews:
        join_previews(config)
        return 0
    try:
        with computing(config.device, config.kernels) as device, jax.default_device(device):
            compare(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what was drawn is kept, the same command continues") from None
    return 0


# -- drawing -----------------------------------------------------------------------------------------------------------


def compare(config: CompareConfig) -> Path:
    """Draws what is missing and writes page, table and strips; returns where the page is.

    Raises:
        UserError, FileNotFoundError, CheckpointError: before anything is drawn where possible. What was drawn before an
            error or an interruption is kept, and in the page.
    """
    from tqdm import tqdm

    prompts = read_prompts(config.prompts, config.prompts_file)
    if not prompts:
        raise UserError('no prompts given; write --prompts "a red panda" "two birds", or --prompts-file list.txt')
    columns = plan_columns(config)
    pictures = plan_pictures(config, columns, prompts)
    output = _output_directory(config.output)
    missing = [picture for picture in pictures if read_record(output, picture) is None]
    print(
        f"comparison: {counted(len(columns), 'column')} x {counted(len(prompts), 'prompt')} x "
        f"{counted(len(config.seeds), 'seed')} = {counted(len(pictures), 'picture')}; {len(pictures) - len(missing)} "
        f"are in {output / 'pictures'} already, {len(missing)} to draw",
        flush=True,
    )
    try:
        with tqdm(total=len(missing), desc="drawing", unit="picture", disable=None) as bar:
            _draw_missing(config, missing, output, bar)
    except BaseException:  # Ctrl-C too: what is there is shown
        if any(read_record(output, picture) for picture in pictures):
            page = write_results(config, columns, pictures, prompts, output)
            print(f"page of what was drawn so far: {page}; the same command goes on from there", flush=True)
        raise
    page = write_results(config, columns, pictures, prompts, output)
    print(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB); table: {output / 'comparison.csv'}")
    return page


def _output_directory(path: str) -> Path:
    output = Path(path)
    try:
        (output / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be a directory ({error.strerror}); name another place") from error
    removed = sum(remove_temporaries(folder) for folder in (output, output / "pictures", output / "strips"))
    if removed:
        print(f"removed {removed} unfinished files of a command that was killed")
    return output


def _draw_missing(config: CompareConfig, missing: Sequence[Picture], output: Path, bar: Any) -> None:
    """Checkpoint by checkpoint; one pipeline is in memory at a time."""
    opener = Opener()
    places = list(dict.fromkeys((picture.column.directory, picture.column.checkpoint_step) for picture in missing))
    for directory, step in places:
        here = [p for p in missing if (p.column.directory, p.column.checkpoint_step) == (directory, step)]
        _draw_checkpoint(config, opener, here, output, bar)


def _draw_checkpoint(
    config: CompareConfig, opener: Opener, pictures: Sequence[Picture], output: Path, bar: Any
) -> None:
    column = pictures[0].column
    run = is_training_run(column.directory)
    started = time.perf_counter()
    request = GenerateConfig(
        model=str(column.directory),
        prompt=(pictures[0].prompt,),
        output=NO_PICTURE,
        variant=config.variant,
        dtype=config.dtype,
        low_memory=config.low_memory,
        weights=config.weights if run else "auto",
        checkpoint_step=column.checkpoint_step,
    )
    pipeline = opener.open(as_trained(request))
    own = pipeline.get_active_adapters()  # of a run that has trained a LoRA
    if files := list(dict.fromkeys(p.column.lora for p in pictures if p.column.lora is not None)):
        pipeline.load_lora_weights(files, adapter_name=files, weights=[0.0] * len(files))
    opener.encode(pipeline, list(dict.fromkeys(picture.prompt for picture in pictures)), config.negative_prompt)
    for picture in pictures:
        if files:
            active = dict.fromkeys(own, 1.0)
            if picture.column.lora is not None:
                active[picture.column.lora] = picture.column.lora_scale
            pipeline.set_adapters(list(active), list(active.values()))
        _draw(config, opener, pipeline, picture, output)
        bar.update()
    seconds = time.perf_counter() - started
    print(f"{column.checkpoint_text}: {len(pictures)} pictures in {seconds:.1f} s, reading and compiling included")


def _draw(config: CompareConfig, opener: Opener, pipeline: ImagePipeline, picture: Picture, output: Path) -> None:
    """Draws one picture and writes it, then its record: where there is a record the picture is whole."""
    column = picture.column
    lora = () if column.lora is None else (f"{column.lora}:{column.lora_scale:g}",)
    request = GenerateConfig(
        model=column.model,
        prompt=(picture.prompt,),
        output=NO_PICTURE,
        seed=picture.seed,
        steps=column.num_inference_steps,
        guidance_scale=column.guidance_scale,
        height=config.height,
        width=config.width,
        binning=config.binning,
        lora=lora,
        variant=config.variant,
    )
    request = as_trained(request)
    result = opener.draw(pipeline, request, [picture.prompt], negative_prompt=config.negative_prompt)
    settings = {
        "prompt": picture.prompt,
        "negative_prompt": config.negative_prompt or None,
        **picture_settings(request, pipeline),
        "sampled_size": "x".join(map(str, result.sampled_size)),
        "software": "sana_jax",
    }
    folder = output / "pictures"
    if hasattr(result, "frames"):
        frames = [np.asarray(frame).reshape(frame.height, frame.width, -1) for frame in result.frames[0]]
        clip = np.stack(frames)[None] / np.float32(255)
        write_moving(folder / picture.name, clip, 1, [picture.prompt], result.fps, settings, print)
        image = clip_table(clip, [f"seed {picture.seed}"])
    else:
        image = result.images[0]
    save_png(folder / f"{picture.name}.png", image, metadata=settings)
    drawn = {name: value for name, value in settings.items() if value is not None}
    seconds = round(sum(result.seconds.values()), 4)
    write_json(folder / f"{picture.name}.json", {"settings": picture.settings, "drawn": drawn, "seconds": seconds})


# -- a run's own previews ----------------------------------------------------------------------------------------------


def join_previews(config: CompareConfig) -> list[Path]:
    """Joins ``samples/step_*.png`` of each run into ``<output>/<run>-previews.png`` and, with ``gif``, ``.gif``.

    Raises:
        FileNotFoundError: a run without previews.
        UserError: previews of several sizes.
    """
    from PIL import Image

    output, written = Path(config.output), []
    for model in config.models:
        samples = Path(model) / "samples"
        found = {int(match[1]): path for path in samples.glob("step_*.png") if (match := _PREVIEW.fullmatch(path.name))}
        if not found:
            raise FileNotFoundError(
                f"{samples} has no step_*.png; name a training run that has drawn previews, or draw with --prompts"
            )
        images = []
        for _, path in sorted(found.items()):
            try:
                with Image.open(path) as image:
                    images.append(image.convert("L" if image.mode == "L" else "RGB"))
            except OSError as error:
                raise UserError(f"{path} can't be read ({error}); delete it") from error
        if len(sizes := {image.size for image in images}) > 1:
            raise UserError(f"{samples} has previews of sizes {sorted(sizes)}; allowed is one: delete those of another")
        labels = [f"step {step}" for step in sorted(found)]
        name = output / f"{slug(Path(model).name) or 'run'}-previews"
        metadata = {"model": model, "steps": sorted(found)}
        if config.strip or not config.gif:
            wide = images[0].width > images[0].height
            path = save_png(f"{name}.png", strip(images, labels, vertical=wide), metadata=metadata)
            print(f"strip of {len(images)} previews: {path}")
            written.append(path)
        if config.gif:
            frames = frames_of_one_size([strip([image], [label]) for image, label in zip(images, labels)])
            path = save_gif(f"{name}.gif", frames, config.milliseconds, comment=json.dumps(metadata))
            print(f"GIF of {len(images)} previews: {path}")
            written.append(path)
    return written


if __name__ == "__main__":
    run_command_line(main)
