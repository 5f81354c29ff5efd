"""What a comparison leaves: one HTML page, one CSV table, strips and GIFs over checkpoints, the table as a picture."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_jax.files import atomic_file
from sana_jax.images import automatic_enlargement, enlarge_image, labelled_table, save_gif, save_png, strip
from train.evaluation.comparison_page import Cell, Group, Page, render
from train.evaluation.comparison_plan import Column, CompareConfig, Picture, checkpoint_families, read_record, slug

if TYPE_CHECKING:
    pass

STRIP_SIDE = 512  # px: the longest side of a picture in a strip, GIF or sheet
TABLE = (
    *("model", "checkpoint_step", "weights", "lora", "lora_scale", "prompt", "negative_prompt", "seed"),
    *("guidance_scale", "num_inference_steps", "sampler", "dtype", "sampled_size", "seconds", "file", "checkpoint_id"),
)
# (column, prompt, seed) -> the picture and its record
Drawn = Mapping[tuple[Column, str, int], tuple[Picture, Mapping[str, Any]]]


def write_results(
    config: CompareConfig,
    columns: Sequence[Column],
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    output: Path,
) -> Path:
    """Writes comparison.csv, strips and sheet where asked for, and comparison.html, whose place is returned."""
    records = {(p.column, p.prompt, p.seed): (p, read_record(output, p)) for p in pictures}
    drawn = {key: (picture, record) for key, (picture, record) in records.items() if record is not None}
    _write_table(drawn, output / "comparison.csv")
    strips = _write_strips(config, columns, prompts, drawn, output) if config.strip or config.gif else {}
    labels = [_label(column, config, drawn) for column in columns]
    if config.sheet and drawn:
        _write_sheet(config, columns, labels, prompts, drawn, output)
    groups = []
    for prompt in prompts:
        rows = []
        for seed in config.seeds:
            cells = []
            for column, label in zip(columns, labels):
                found = drawn.get((column, prompt, seed))
                file = None if found is None else _shown(found[0], output)
                cells.append(Cell(file, f"{prompt}, seed {seed}, {label}"))
            rows.append((f"seed {seed}", cells))
        groups.append(Group(prompt, rows))
    page = Page(
        title=f"Comparison of {', '.join(config.models)}",
        summary=f"{len(drawn)} of {len(records)} pictures; the same seed starts from the same noise everywhere.",
        settings=_common(drawn, config),
        columns=labels,
        groups=groups,
        strips=strips,
    )
    path = output / "comparison.html"
    text = render(page, output)
    with atomic_file(path) as file:
        file.write(text.encode())
    return path


def _shown(picture: Picture, output: Path) -> str:
    """What the page shows of a picture: where it is a clip, that."""
    moving = f"pictures/{picture.name}.gif"
    return moving if (output / moving).is_file() else f"pictures/{picture.name}.png"


def _write_table(drawn: Drawn, path: Path) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, TABLE, restval="", lineterminator="\n")
    table.writeheader()
    for picture, record in drawn.values():
        column, made = picture.column, record["drawn"]
        table.writerow(
            {
                **{name: made.get(name, "") for name in TABLE if name in made},
                "model": column.model,
                "checkpoint_step": "" if column.checkpoint_step is None else column.checkpoint_step,
                "lora": column.lora or "",
                "lora_scale": column.lora_scale if column.lora else "",
                "num_inference_steps": made.get("steps", ""),
                "seconds": record["seconds"],
                "file": f"pictures/{picture.name}.png",
            }
        )
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def _write_strips(
    config: CompareConfig, columns: Sequence[Column], prompts: Sequence[str], drawn: Drawn, output: Path
) -> dict[str, str]:
    """Strips and GIFs over checkpoints; their files, relative to the output, by what they show."""
    files: dict[str, str] = {}
    (output / "strips").mkdir(exist_ok=True)
    for members in checkpoint_families(columns).values():
        for prompt in prompts:
            for seed in config.seeds:
                found = {m.checkpoint_step: drawn[m, prompt, seed][0] for m in members if (m, prompt, seed) in drawn}
                if not found:
                    continue
                images = [_reduced(output / "pictures" / f"{picture.name}.png") for picture in found.values()]
                labels = [f"step {step}" for step in found]
                settings = _setting_text(members[0], drawn)
                what = f"{prompt}, seed {seed}" + (f", {settings}" if settings else "")
                if len(config.models) > 1:
                    what += f", {members[0].model}"
                key = hashlib.sha256("".join(picture.name for picture in found.values()).encode()).hexdigest()[:8]
                name = f"strips/{slug(prompt)[:40].strip('-') or 'prompt'}-seed{seed}-{key}"
                metadata = {"prompt": prompt, "seed": seed, "model": members[0].model, "checkpoint_steps": list(found)}
                if config.strip:
                    save_png(output / f"{name}.png", strip(images, labels), metadata=metadata)
                    files[what] = f"{name}.png"
                if config.gif:
                    frames = [strip([image], [label]) for image, label in zip(images, labels)]
                    save_gif(
                        output / f"{name}.gif", frames_of_one_size(frames), config.milliseconds, comment=str(metadata)
                    )
                    files[f"{what} (moving)"] = f"{name}.gif"
    return files


def _write_sheet(
    config: CompareConfig,
    columns: Sequence[Column],
    labels: Sequence[str],
    prompts: Sequence[str],
    drawn: Drawn,
    output: Path,
) -> None:
    rows, row_labels = [], []
    for prompt in prompts:
        for seed in config.seeds:
            found = [drawn.get((column, prompt, seed)) for column in columns]
            rows.append(
                [None if one is None else _reduced(output / "pictures" / f"{one[0].name}.png") for one in found]
            )
            row_labels.append(f"{prompt}\nseed {seed}")
    sheet = labelled_table(rows, row_labels, labels)
    print(f"sheet: {save_png(output / 'comparison.png', sheet, metadata={'models': ', '.join(config.models)})}")


def _reduced(path: Path) -> Any:
    """A picture for a strip: tiny ones enlarged, large ones scaled to at most 512 px a side."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
    if max(picture.size) > STRIP_SIDE:
        picture.thumbnail((STRIP_SIDE, STRIP_SIDE), Image.Resampling.LANCZOS)
    return enlarge_image(picture, automatic_enlargement(picture.height, picture.width))


def frames_of_one_size(frames: Sequence[Any]) -> list[Any]:
    """Frames on white of the largest size: a longer label makes a frame wider."""
    from PIL import Image

    width, height = (max(frame.size[axis] for frame in frames) for axis in (0, 1))
    placed = []
    for frame in frames:
        canvas = Image.new(frame.mode, (width, height), 255 if frame.mode == "L" else (255, 255, 255))
        canvas.paste(frame, ((width - frame.width) // 2, 0))
        placed.append(canvas)
    return placed


def _label(column: Column, config: CompareConfig, drawn: Drawn) -> str:
    """What stands above a column: what tells it from the others, guidance always."""
    lines = [column.model] if len(config.models) > 1 else []
    if column.checkpoint_step is not None:
        lines.append(f"step {column.checkpoint_step}")
    return "\n".join([*lines, *filter(None, [_setting_text(column, drawn, bool(config.lora), "\n")])])


def _setting_text(column: Column, drawn: Drawn, names_lora: bool | None = None, separator: str = ", ") -> str:
    parts = []
    if column.lora is not None:
        parts.append(f"{Path(column.lora).name} x {column.lora_scale:g}")
    elif names_lora:
        parts.append("no LoRA")
    scale = column.guidance_scale
    if scale is None:  # the model's own, as its pictures say
        own = (record["drawn"].get("guidance_scale") for (other, *_), (_, record) in drawn.items() if other == column)
        scale = next(own, None)
    if scale is not None:
        parts.append(f"guidance {scale:g}")
    if column.num_inference_steps is not None:
        parts.append(f"{column.num_inference_steps} steps")
    return separator.join(parts)


def _common(drawn: Drawn, config: CompareConfig) -> dict[str, str]:
    """Settings in which all pictures agree."""
    made = [record["drawn"] for _, record in drawn.values()]
    differing = ("prompt", "seed", "software", "model", "lora")
    common = {"models": ", ".join(config.models)}
    for name in made[0] if made else ():
        values = {str(each.get(name)) for each in made}
        if len(values) == 1 and name not in differing:
            common[name.replace("_", " ")] = values.pop()
    return common
