"""Measures drawn pictures: ``python -m train.evaluate METRIC [METRIC ...] --model DIR ...``.

    python -m train.evaluate digits --model runs/digits
    python -m train.evaluate fid kid --model runs/digits --reference digits --features pixels:8 --samples 1000
    python -m train.evaluate kid diversity --pictures drawn/ --reference photos/ --features siglip:SigLIP_DIRECTORY
    python -m train.evaluate score --model runs/lora --prompts "a red panda" --scorer SigLIP_DIRECTORY

Several metrics share the pictures that are drawn. Every result is one printed line and one JSON record with all that it
depends on, added to ``evaluations.jsonl``.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from configs.schema import DigitsDataConfig
from kernels.selection import Preference
from kernels.typing import Float
from sana_jax.command_line import parse
from sana_jax.devices import computing
from sana_jax.errors import UserError, run_command_line
from sana_jax.generate import GenerateConfig, picture_settings
from sana_jax.images import save_png, to_pil
from sana_jax.pipelines.base import ImagePipeline
from sana_jax.pipelines.opening import find_model
from train.data.digits import DigitsData, load_images
from train.data.sources.listing import PICTURE_SUFFIXES
from train.evaluation import digits as digits_metric
from train.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from train.evaluation.drawing import (
    NO_PICTURE,
    Opener,
    as_trained,
    check_draws_from_text,
    is_training_run,
    read_prompts,
)
from train.evaluation.features import FeatureFunction, load_features
from train.evaluation.record import append_record, describe_device, make_record
from train.evaluation.reference import (
    DIGITS,
    FolderPictures,
    Reference,
    captions_beside,
    check_features_path,
    load_reference,
    save_features,
)
from train.evaluation.similarity import count_copies, mean_distance, most_similar, nearest, nearest_other
from train.evaluation.text_score import TextScorer, texts_of_pictures
from train.run_directory import CONFIG_NAME, read_config

PROG = "python -m train.evaluate"
Metric = Literal["fid", "kid", "similarity", "diversity", "digits", "score"]
_ALL_DIGITS = tuple(range(10))
_KEPT = "{:06d}.png"  # names of kept pictures
_ENCODED_TOGETHER = 256  # prompts, 2.8 MB each at 300 tokens of 2304
# option -> the metrics that read it
_READ_BY = {
    "reference": ("fid", "kid", "similarity", "diversity"),
    "features": ("fid", "kid", "similarity", "diversity"),
    "save_reference": ("fid", "kid", "similarity", "diversity"),
    "subsets": ("kid",),
    "subset_size": ("kid",),
    "scorer": ("score",),
}
_FOR_A_MODEL = (
    *("prompts", "prompts_file", "negative_prompt", "samples", "seed", "guidance_scale", "num_inference_steps"),
    *("height", "width", "binning", "checkpoint_step", "weights", "lora", "variant", "dtype", "batch_size", "keep"),
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Measures pictures that a model draws, or those of a folder. The metrics are the first words of the command.

    fid: Fréchet distance to the reference; lower is better. kid: kernel distance, unbiased, for few samples.
    similarity: greatest cosine similarity of each picture to a reference. diversity: spread of the pictures of one
    prompt, nearest reference, copies. digits: whether a run's digits are read as those asked for. score: how well
    pictures fit their texts, the mean cosine of SigLIP's vectors of both; higher is better.
    """

    metrics: tuple[Metric, ...] = ()
    """What to measure: the words before the first option; --metrics is the same."""
    model: str | None = None
    """Model directory that draws the pictures: a training run, a published or converted model."""
    pictures: str | None = None
    """A folder of pictures to measure instead."""
    reference: str | None = None
    """What they are compared with: a folder of pictures, the word digits, or a .npy or .npz file of features."""
    features: str | None = None
    """What is compared of pictures: pixels:SIZE (None: pixels:32), or siglip:DIRECTORY."""
    scorer: str | None = None
    """What score is computed with: directory of a SigLIP with both towers and its tokenizer."""
    save_reference: str | None = None
    """Also write the reference's features to this .npz file, for the next time."""
    samples: int = 200
    """Pictures to draw, shared evenly among the prompts."""
    prompts: tuple[str, ...] = ()
    """Texts to draw; none: the digits run's captions, or the captions (.txt) beside the reference's pictures."""
    prompts_file: str | None = None
    """A text file with one prompt in each line, instead of --prompts."""
    negative_prompt: str = ""
    """What the pictures should not be; needs guidance above 1."""
    seed: int = 1
    """Seed of the noise, and of kid's subsets."""
    guidance_scale: float | None = None
    """Guidance scale; None: the model's own."""
    num_inference_steps: int | None = None
    """Sampling steps; None: the model's own."""
    height: int | None = None
    """Pixels; None: the model's own."""
    width: int | None = None
    """Pixels; None: the model's own."""
    binning: Literal["nearest", "off", "error"] | None = None
    """Sizes that the model was not trained at: as in generate."""
    checkpoint_step: int | None = None
    """Checkpoint of a training run by its step; None: the newest."""
    weights: Literal["auto", "ema", "params"] = "auto"
    """Weights of a training run: averaged (ema), raw (params), or averaged where there are any (auto)."""
    lora: tuple[str, ...] = ()
    """LoRA files, each FILE or FILE:WEIGHT."""
    variant: str | None = None
    """Variant of a published model's files: bf16, fp16."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of the transformer; None: the one that the weights are published for, float32 for training runs."""
    batch_size: int = 20
    """Pictures drawn at once; the noise of a picture depends on the seed, on this and on its number."""
    keep: str | None = None
    """Also write the drawn pictures to this folder."""
    subsets: int = 100
    """Random subsets over which kid is averaged."""
    subset_size: int = 1000
    """Pictures in each; fewer where there are fewer."""
    output: str = "evaluations.jsonl"
    """File of JSON lines to which each result is added."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to compute."""
    kernels: Preference = "auto"
    """What runs operations that have several forms: the one measured to be faster (auto), XLA's own (xla), or kernels
    for NVIDIA GPUs wherever there are such."""

    def __post_init__(self) -> None:
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise UserError(f"metrics {' '.join(self.metrics) or '(none)'}; name each once: {PROG} fid kid --model ...")
        if "score" in self.metrics and self.scorer is None:
            raise UserError("score needs --scorer: the directory of a SigLIP with both towers and its tokenizer")
        if (self.model is None) == (self.pictures is None):
            raise UserError("give either --model, which draws the pictures, or --pictures, a folder that has them")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in default if getattr(self, name) != default[name]]
        for name in given:
            option = f"--{name.replace('_', '-')}"
            if name in _READ_BY and not set(_READ_BY[name]) & set(self.metrics):
                raise UserError(
                    f"{option} would not be used by {' and '.join(self.metrics)}, only by "
                    f"{', '.join(_READ_BY[name])}; leave it out"
                )
            seeds_subsets = name == "seed" and "kid" in self.metrics
            if self.pictures is not None and name in _FOR_A_MODEL and not seeds_subsets:
                raise UserError(f"{option} would not be used with --pictures, which draws nothing; leave it out")
        if self.pictures is not None and "digits" in self.metrics:
            raise UserError("digits needs to know which digit each picture should be: give --model, not --pictures")
        needing = [metric for metric in self.metrics if metric in ("fid", "kid", "similarity")]
        if needing and self.reference is None:
            raise UserError(f"{needing[0]} needs --reference: a folder of pictures, {DIGITS}, or a file of features")
        if self.save_reference is not None and self.reference is None:
            raise UserError("--save-reference would not be used without --reference; give one")
        if self.save_reference is not None:
            check_features_path(Path(self.save_reference))
        for name, least in {"samples": 2, "batch_size": 1, "subsets": 1, "subset_size": 2}.items():
            if getattr(self, name) < least:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is not allowed; choose {least} or more"
                )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} is not allowed; choose 0 to {2**32 - 1}")


class Samples(NamedTuple):
    """What was drawn or read: features and pixels where a metric needs them, the prompts' numbers, settings."""

    features: Float[np.ndarray, "N D"] | None
    arrays: Float[np.ndarray, "N H W C"] | None
    vectors: Float[np.ndarray, "N E"] | None
    """What the scorer's vision tower sees."""
    texts: list[str] | None
    """Of each picture; None where no metric needs them."""
    groups: np.ndarray
    """Which prompt each is of; all 0 for a folder."""
    settings: dict[str, Any]


class Result(NamedTuple):
    """A metric's value, further figures, and the text that follows its name."""

    value: float
    details: dict[str, Any]
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (by default the program's own) and returns its exit status.

    Raises:
        UserError, FileNotFoundError: one line about what is wrong with it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    first = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    metrics = ["--metrics", *words[:first]] if first else []
    config = parse(EvaluateConfig, [*metrics, *words[first:]], prog=PROG)
    with computing(config.device, config.kernels) as device, jax.default_device(device):
        evaluate(config)
    return 0


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Draws, measures, prints, records; returns the records.

    Raises:
        UserError, FileNotFoundError, CheckpointError: before anything is drawn where possible.
    """
    source = None if config.model is None else _open_source(config)
    compares = any(metric in _READ_BY["features"] for metric in config.metrics)
    function = load_features(config.features or "pixels") if compares else None
    scorer = None if config.scorer is None else TextScorer.from_directory(config.scorer)
    reference = None
    if config.reference is not None:
        reference = load_reference(config.reference, function, source.digits if source else _ALL_DIGITS)
        print(f"reference: {reference.name}, {reference.count or 'unknown number of'} pictures, {function.name}")
        for metric in set(config.metrics) & {"kid", "similarity", "diversity"}:
            if reference.features is None:
                raise UserError(f"{metric} needs features, and {reference.name} has only their mean and covariance")
        if config.save_reference is not None:
            save_features(Path(config.save_reference), reference, function)
    samples = _draw_samples(config, source, function, scorer) if source else _read_samples(config, function, scorer)
    records = []
    for metric in config.metrics:
        if metric == "score":
            result, compared = _score(scorer, samples), _scorer_settings(config, scorer)
        else:
            result = _MEASURES[metric](config, samples, reference, source)
            compared = _comparison_settings(metric, function, reference)
        settings = {**samples.settings, **compared}
        record = make_record(metric, result.value, result.details, settings)
        append_record(Path(config.output), record)
        print(f"{metric} {result.text} | {_describe(record)}", flush=True)
        records.append(record)
    print(f"recorded in {config.output}")
    return records


# -- pictures ----------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A model that draws: its directory, the prompts, and the digits that it was trained on."""

    directory: Path
    prompts: Sequence[str]
    digits: tuple[int, ...]


def _open_source(config: EvaluateConfig) -> Source:
    """Checks model and prompts before anything is computed."""
    directory = find_model(config.model, config.variant)
    check_draws_from_text(directory, videos=False)
    data = read_config(directory).data if (directory / CONFIG_NAME).is_file() and is_training_run(directory) else None
    is_digits = isinstance(data, DigitsDataConfig)
    prompts = read_prompts(config.prompts, config.prompts_file)
    digits = tuple(sorted(set(data.digits))) if is_digits else _ALL_DIGITS
    if "digits" in config.metrics:
        if not is_digits:
            raise UserError(f"digits measures runs that were trained on the digits, and {config.model} was not")
        if prompts:
            raise UserError("--prompts would not be used by digits, which draws the run's captions; leave it out")
    if not prompts and is_digits:
        prompts = DigitsData(data).captions
    if not prompts and config.reference is not None and Path(config.reference).is_dir():
        captions = captions_beside(Path(config.reference))
        prompts = captions[: config.samples]
        if prompts:
            print(f"prompts: the first {len(prompts)} of {len(captions)} captions beside {config.reference}'s pictures")
    if not prompts:
        raise UserError("no prompts given; write --prompts or --prompts-file")
    if len(prompts) > config.samples:
        raise UserError(f"{len(prompts)} prompts and --samples {config.samples}; draw at least one picture of each")
    spread = [metric for metric in config.metrics if metric in ("digits", "diversity")]
    if spread and config.samples < 2 * len(prompts):
        raise UserError(
            f"{spread[0]} needs 2 or more pictures of each of {len(prompts)} prompts; --samples {config.samples} is "
            f"too few: choose {2 * len(prompts)} or more"
        )
    return Source(directory, prompts, digits)


def _draw_samples(
    config: EvaluateConfig, source: Source, function: FeatureFunction | None, scorer: TextScorer | None
) -> Samples:
    request = GenerateConfig(
        model=str(source.directory),
        prompt=(source.prompts[0],),
        output=NO_PICTURE,
        seed=config.seed,
        steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        height=config.height,
        width=config.width,
        binning=config.binning,
        lora=config.lora,
        weights=config.weights,
        checkpoint_step=config.checkpoint_step,
        variant=config.variant,
        dtype=config.dtype,
    )
    if config.keep is not None:
        _clear_kept(Path(config.keep))
    opener, request = Opener(), as_trained(request)
    pipeline = opener.open(request)
    groups = np.sort(np.arange(config.samples) % len(source.prompts))
    features, arrays, vectors = [], [], []
    started, sampled_size = time.perf_counter(), None
    for first, images, size in _batches(config, request, source, groups, opener, pipeline):
        sampled_size = size
        pictures = [to_pil(image) for image in images]
        if function is not None:
            features.append(function(pictures))
        if scorer is not None:
            vectors.append(scorer.encode_pictures(pictures))
        if "digits" in config.metrics:
            arrays.append(images)
        if config.keep is not None:
            for offset, picture in enumerate(pictures):
                prompt = source.prompts[groups[first + offset]]
                metadata = {"prompt": prompt, **picture_settings(request, pipeline), "number": first + offset}
                save_png(Path(config.keep) / _KEPT.format(first + offset), picture, metadata=metadata)
    print(f"drew {config.samples} pictures in {time.perf_counter() - started:.1f} s, compiling included")
    settings = {
        **picture_settings(request, pipeline),
        "model": config.model,
        "samples": config.samples,
        "batch_size": config.batch_size,
        "prompts": len(source.prompts),
        "negative_prompt": config.negative_prompt or None,
        "sampled_size": "x".join(map(str, sampled_size)),
    }
    joined = (np.concatenate(parts) if parts else None for parts in (features, arrays, vectors))
    return Samples(*joined, [source.prompts[group] for group in groups], groups, settings)


def _clear_kept(folder: Path) -> None:
    """Removes the pictures that an earlier command kept, so that those of this one are all that is measured there.

    Raises:
        UserError: there are pictures that none has kept.
    """
    if not folder.is_dir():
        return
    kept, others = [], []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES):
        (kept if path.parent == folder and _is_kept(path) else others).append(path)
    if others:
        raise UserError(
            f"--keep {folder} has pictures that are not of an evaluation, such as {others[0]}; name a folder that is "
            "new, empty or of an earlier --keep, so that it can be measured"
        )
    for path in kept:
        path.unlink()
    if kept:
        print(f"--keep {folder}: removed {len(kept)} pictures of an earlier evaluation")


def _is_kept(path: Path) -> bool:
    """Whether a picture is one that ``--keep`` has written: it has its number in its name and inside."""
    from PIL import Image

    if not path.stem.isdecimal() or path.name != _KEPT.format(int(path.stem)):
        return False
    try:
        with Image.open(path) as picture:
            return picture.info.get("number") == str(int(path.stem))
    except OSError:
        return False


def _batches(
    config: EvaluateConfig,
    request: GenerateConfig,
    source: Source,
    groups: np.ndarray,
    opener: Opener,
    pipeline: ImagePipeline,
) -> Iterator[tuple[int, Float[np.ndarray, "B H W C"], tuple[int, int]]]:
    """(number of the first, pictures, size that was sampled) of each batch; all batches have one size."""
    from tqdm import tqdm

    size = min(config.batch_size, config.samples)
    with tqdm(total=config.samples, desc="drawing", unit="picture", disable=None) as bar:
        for first in range(0, config.samples, size):
            numbers = np.arange(first, min(first + size, config.samples))
            if first % (size * math.ceil(_ENCODED_TOGETHER / size)) == 0:
                opener.forget_texts()
                together = groups[first : first + max(size, _ENCODED_TOGETHER)]
                texts = dict.fromkeys(source.prompts[group] for group in together)
                opener.encode(pipeline, list(texts), config.negative_prompt)
            prompts = [source.prompts[group] for group in groups[numbers]]
            filled = prompts + [prompts[-1]] * (size - len(prompts))  # so that the last batch compiles nothing
            seeded = dataclasses.replace(request, seed=batch_seed(config.seed, first // size))
            result = opener.draw(pipeline, seeded, filled, negative_prompt=config.negative_prompt, output_type="np")
            yield first, result.images[: len(prompts)], result.sampled_size
            bar.update(len(prompts))


def batch_seed(seed: int, index: int) -> int:
    """The seed of one batch: that of the command for the first, unrelated ones for the others."""
    return seed if index == 0 else int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def _read_samples(config: EvaluateConfig, function: FeatureFunction | None, scorer: TextScorer | None) -> Samples:
    pictures, features, vectors, texts = FolderPictures(Path(config.pictures)), None, None, None
    if scorer is not None:
        known = dict(zip(pictures.paths, texts_of_pictures(pictures.paths)))
        vectors = scorer.encode_pictures(pictures)
        texts = [known[path] for path in pictures.read]
    if function is not None:
        features = function(pictures)
    count = len(pictures.read)
    if count < 2:
        raise UserError(f"--pictures {config.pictures} has {count} picture; 2 or more are needed")
    seed = config.seed if "kid" in config.metrics else None
    settings = {"pictures": config.pictures, "samples": count, "seed": seed}
    return Samples(features, None, vectors, texts, np.zeros(count, int), settings)


# -- metrics -----------------------------------------------------------------------------------------------------------


def _fid(config: EvaluateConfig, samples: Samples, reference: Reference, source: Source | None) -> Result:
    distance = frechet_distance(fit_gaussian(samples.features), reference.gaussian)
    count, size = samples.features.shape
    few = count <= size
    if few:
        print(f"fid: {count} samples of {size} features: too few, the distance is larger than it would be with more")
    return Result(distance, {"feature_size": size, "fewer_samples_than_features": few}, f"{distance:.4f}")


def _kid(config: EvaluateConfig, samples: Samples, reference: Reference, source: Source | None) -> Result:
    distance = kernel_distance(
        samples.features,
        reference.features,
        subsets=config.subsets,
        subset_size=config.subset_size,
        seed=config.seed,
    )
    details = {"feature_size": samples.features.shape[1], **distance._asdict()}
    text = f"{distance.mean:.6f} ± {distance.deviation:.6f} over {distance.subsets} subsets of {distance.subset_size}"
    return Result(distance.mean, details, text)


def _similarity(config: EvaluateConfig, samples: Samples, reference: Reference, source: Source | None) -> Result:
    found = most_similar(samples.features, reference.features).value
    details = {"least": float(found.min()), "greatest": float(found.max()), "median": float(np.median(found))}
    return Result(float(found.mean()), details, f"{found.mean():.4f} (cosine, {found.min():.4f} to {found.max():.4f})")


def _diversity(config: EvaluateConfig, samples: Samples, reference: Reference | None, source: Source | None) -> Result:
    features = np.asarray(samples.features, np.float64)
    spreads = [mean_distance(features[samples.groups == group]) for group in np.unique(samples.groups)]
    details = {"distance": float(np.mean(spreads)), "least_distance": float(np.min(spreads))}
    if reference is None:
        return Result(details["distance"], details, f"{details['distance']:.4f} (mean distance within a prompt)")
    real = np.asarray(reference.features, np.float64)
    spread = mean_distance(real)
    apart = nearest_other(real).mean()
    closest = nearest(features, real)
    details |= {
        "spread": details["distance"] / spread,
        "least_spread": details["least_distance"] / spread,
        "nearest": float(closest.value.min() / apart) if apart > 0 else None,
        "nearest_pair": [int(closest.value.argmin()), int(closest.index[closest.value.argmin()])],
    }
    text = f"{details['spread']:.3f} of the reference's spread (least {details['least_spread']:.3f})"
    if (config.features or "pixels").startswith("pixels"):
        details["copies"] = count_copies(features * 255, real * 255)
        text += f", {details['copies']} copies"
    return Result(details["spread"], details, text)


def _digits(config: EvaluateConfig, samples: Samples, reference: Reference | None, source: Source) -> Result:
    real, labels = load_images(source.digits)
    drawn = np.asarray(samples.arrays, np.float64).reshape(len(samples.arrays), -1) * 16
    real = (real.astype(np.float64).reshape(len(real), -1) + 1) * 8
    figures = digits_metric.measure(drawn, np.asarray(source.digits)[samples.groups], real, labels)
    details = dataclasses.asdict(figures)
    text = f"{figures.recognised:.1%} recognised (real ones {figures.real_held_out:.1%}), spread {figures.spread:.2f}"
    return Result(figures.recognised, details, f"{text}, {figures.copies} copies")


def _score(scorer: TextScorer, samples: Samples) -> Result:
    scores = scorer.score(samples.vectors, samples.texts)
    scale, bias = scorer.scale_and_bias
    cosine, probability = scores.cosine, float(scores.probability.mean())
    details = {
        "probability": probability,
        "least": float(cosine.min()),
        "greatest": float(cosine.max()),
        "median": float(np.median(cosine)),
        "texts": len(set(samples.texts)),
        "scale": scale,
        "bias": bias,
    }
    text = f"{cosine.mean():.4f} (cosine, {cosine.min():.4f} to {cosine.max():.4f}), probability {probability:.4f}"
    return Result(float(cosine.mean()), details, text)


_MEASURES = {"fid": _fid, "kid": _kid, "similarity": _similarity, "diversity": _diversity, "digits": _digits}


def _comparison_settings(metric: str, function: FeatureFunction | None, reference: Reference | None) -> dict[str, Any]:
    if metric not in _READ_BY["features"]:
        return {}
    settings: dict[str, Any] = {"features": function.name}
    if reference is not None:
        settings |= {"reference": reference.name, "reference_pictures": reference.count}
    return settings


def _scorer_settings(config: EvaluateConfig, scorer: TextScorer) -> dict[str, Any]:
    dtype = np.dtype(scorer.texts.dtype).name
    return {"scorer": config.scorer, "scorer_id": scorer.name, "scorer_dtype": dtype}


def _describe(record: dict[str, Any]) -> str:
    """What a value depends on, in one line."""
    parts = [f"{record.get('model') or record.get('pictures')}"]
    if "checkpoint_step" in record:
        parts[0] += f" step {record['checkpoint_step']} ({record['weights']})"
    parts.append(f"{record['samples']} pictures")
    if "features" in record:
        against = f" against {record['reference']}" if "reference" in record else ""
        parts.append(f"{record['features']}{against}")
    if "scorer" in record:
        parts.append(f"{record['scorer_id']} of {record['scorer']} in {record['scorer_dtype']}")
    if "sampler" in record:
        parts.append(f"{record['steps']} steps of {record['sampler'].partition('(')[0]}")
        parts.append(f"guidance {record['guidance_scale']:g}")
        parts.append(f"seed {record['seed']}, {record['dtype']}")
    return ", ".join([*parts, f"on {describe_device()}"])


if __name__ == "__main__":
    run_command_line(main)
