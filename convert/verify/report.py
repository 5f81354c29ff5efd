"""How far two results are apart, what is allowed, and the table and the file that say so."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sana_jax.errors import UserError
from sana_jax.files import write_json

Report = Callable[[str], None]

# float32, of a single module: about five times the worst that is measured on tiny random weights.
MODULE_THRESHOLD = 1e-5
# float32, of a whole network or pipeline, where the errors of all modules have added up.
WHOLE_THRESHOLD = 1e-4
# float32, largest difference of a pixel in [0, 1].
PIXEL_THRESHOLD = 2e-4
# bfloat16: how many times PyTorch's own bfloat16 error ours may be, of a network's result and, in the median of its
# rows, of a pipeline's.
BFLOAT16_RATIO = 1.5
# The same of a single module. Ours round a product and the bias that is added to it one after the other, PyTorch's
# round their sum once: 1.15 times for one such layer, 1.5 for the few numbers of an embedded timestep that goes through
# two. Measured on a 2K model's modules: median 1.05, 99 of 100 below 1.53, largest 1.71 of 288.
BFLOAT16_MODULE_RATIO = 2.0
# How many times more a single row of a pipeline may be. Both errors are rounding, independent of one another, that
# guidance multiplies and steps carry on; now one is far larger, now the other. Measured on 18 tiny random pipelines of
# three kinds: median 0.94, smallest 0.13, largest 3.7 of 63 rows; medians of the pipelines 0.31 to 1.44. The same of
# the largest difference of a single pixel, which is one number: 0.19 to 2.3 of 6 decoded latents; all pixels together
# are judged by BFLOAT16_RATIO.
BFLOAT16_SPREAD = 3.5
# bfloat16: what one rounding of a result alone can make of it, and the like of a pixel in [0, 1].
_ROUNDING, _PIXEL_ROUNDING = 2.0**-8, 2.0**-7


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is allowed.

    Attributes:
        module: float32, relative error of a module on the same input.
        whole: float32, relative error of a whole network's or pipeline's result.
        pixel: float32, largest difference of a pixel.
        ratio: bfloat16, ours from PyTorch's float32 over PyTorch's bfloat16 from the same.
        module_ratio: the same of a module by itself.
    """

    module: float = MODULE_THRESHOLD
    whole: float = WHOLE_THRESHOLD
    pixel: float = PIXEL_THRESHOLD
    ratio: float = BFLOAT16_RATIO
    module_ratio: float = BFLOAT16_MODULE_RATIO


def choose_limits(dtype: str, **given: float | None) -> Limits:
    """The limits with those given changed; ``given`` are fields of ``Limits``, None where nothing was said.

    Raises:
        UserError: a number that is not positive, or a limit that has no meaning in this dtype.
    """
    options = {"module": "module-threshold", "whole": "whole-threshold", "pixel": "pixel-threshold", "ratio": "ratio"}
    chosen = {name: value for name, value in given.items() if value is not None}
    for name, value in chosen.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--{options[name]} {value}; allowed is a number above 0: choose one")
        if (name == "ratio") != (dtype == "bfloat16"):
            raise UserError(f"--{options[name]} {value} would not be used with --dtype {dtype}; leave it out")
    return dataclasses.replace(Limits(), **chosen)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one array from another: largest absolute, relative (norm over norm), and the cosine between them."""

    max_abs: float
    relative: float
    cosine: float

    @classmethod
    def of(cls, found: Any, expected: Any) -> Difference:
        """Both in float64; anything that is not finite makes the difference infinite."""
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        if found.shape != expected.shape or not np.isfinite(found).all() or not np.isfinite(expected).all():
            return cls(math.inf, math.inf, math.nan)
        error = found - expected
        size, other = np.linalg.norm(expected), np.linalg.norm(found)
        norm = float(np.linalg.norm(error))
        relative = norm / float(size) if size else (0.0 if norm == 0 else math.inf)
        if size and other:
            cosine = float((found / other).ravel() @ (expected / size).ravel())
        else:
            cosine = 1.0 if size == other else 0.0
        return cls(float(np.abs(error).max(initial=0.0)), relative, cosine)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: the module's published name, or what else is compared.
        shape: of what is compared.
        difference: the one that is judged: of a module, on the same input.
        threshold: what is allowed of it.
        in_place: relative error on the network's own way there, where the errors of all modules before it are in; None
            where that has no meaning.
        reference: relative (of pixels: largest) error of PyTorch's own bfloat16; None for float32.
        of_pixels: whether the largest difference is judged, not the relative one.
        detail: whether it is a layer within a module that has a row of its own.
    """

    name: str
    shape: tuple[int, ...]
    difference: Difference
    threshold: float
    in_place: float | None = None
    reference: float | None = None
    of_pixels: bool = False
    detail: bool = False

    @property
    def judged(self) -> float:
        """The number that the threshold is for."""
        return self.difference.max_abs if self.of_pixels else self.difference.relative

    @property
    def past(self) -> bool:
        """Whether it is more than allowed, or no number."""
        return not self.judged <= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """For the JSON file; numbers that JSON does not have are texts there."""
        values = {
            "module": self.name,
            "shape": list(self.shape),
            "max_abs": self.difference.max_abs,
            "relative": self.difference.relative,
            "cosine": self.difference.cosine,
            "in_place_relative": self.in_place,
            "pytorch_error": self.reference,
            "threshold": self.threshold,
            "judged": "max_abs" if self.of_pixels else "relative",
            "detail": self.detail,
            "ok": not self.past,
        }
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


def make_row(
    name: str,
    ours: Any,
    theirs: Any,
    limit: float,
    limits: Limits,
    *,
    own: Any = None,
    in_place: Any = None,
    of_pixels: bool = False,
    detail: bool = False,
    module: bool = False,
) -> Row:
    """A row of our result, PyTorch's in float32, and in bfloat16 PyTorch's ``own``; ``limit`` is for float32."""
    difference, reference = Difference.of(ours, theirs), None
    if own is not None:
        other = Difference.of(own, theirs)
        reference = other.max_abs if of_pixels else other.relative
        if of_pixels:
            limit = max(limits.ratio * reference, _PIXEL_ROUNDING)
        elif module:
            limit = max(limits.module_ratio * reference, 2 * _ROUNDING)
        else:
            limit = max(limits.ratio * reference, _ROUNDING)
    way = None if in_place is None else Difference.of(in_place, theirs).relative
    shape = tuple(np.shape(theirs))
    return Row(name, shape, difference, limit, way, reference, of_pixels, detail)


def median_ratio_row(rows: Sequence[Row], limits: Limits) -> Row:
    """In bfloat16, the median of how many times PyTorch's own error ours is; ``max-abs`` is the largest."""
    # An error of PyTorch's within one rounding is no measure
    ratios = [row.judged / max(row.reference, _ROUNDING) for row in rows]
    middle, largest = (float(value) for value in (np.median(ratios), np.max(ratios)))
    difference = Difference(largest, middle, math.nan)
    return Row("ours over PyTorch's own error, median", (len(rows),), difference, limits.ratio)


@dataclasses.dataclass(frozen=True)
class Section:
    """One component's rows, in the order in which the modules run, and the seconds that they took."""

    name: str
    rows: tuple[Row, ...]
    seconds: float

    @property
    def first_past(self) -> Row | None:
        """The first row past its threshold."""
        return next((row for row in self.rows if row.past), None)


_HEAD = ("max-abs", "relative", "cosine", "in place", "threshold", "")


def print_section(section: Section, report: Report, *, every: bool) -> None:
    """A component's table; layers within modules only where they are past, or if ``every`` is asked for."""
    rows = [row for row in section.rows if every or not row.detail or row.past]
    with_reference = any(row.reference is not None for row in rows)
    width = max((len(row.name) for row in rows), default=6)
    head = [*_HEAD]
    if with_reference:
        head.insert(4, "PyTorch's")
    report(f"{'module':<{width}}  {'shape':<18} " + " ".join(f"{title:>9}" for title in head).rstrip())
    for row in rows:
        cells = [
            _number(row.difference.max_abs),
            _number(row.difference.relative),
            f"{row.difference.cosine:.6f}",
            "" if row.in_place is None else _number(row.in_place),
        ]
        if with_reference:
            cells.append("" if row.reference is None else _number(row.reference))
        cells += [_number(row.threshold), "PAST" if row.past else "ok"]
        shape = "x".join(map(str, row.shape)) or "1"
        report(f"{row.name:<{width}}  {shape:<18} " + " ".join(f"{cell:>9}" for cell in cells))
    hidden = len(section.rows) - len(rows)
    within = f"; {hidden} layers within them are ok too (--all lists them)" if hidden else ""
    past = sum(row.past for row in section.rows)
    report(
        f"{section.name}: {len(section.rows)} comparisons, {past} past their thresholds{within}; "
        f"{section.seconds:.1f} s"
    )


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def verdict(sections: Iterable[Section]) -> str:
    """The last line."""
    sections = list(sections)
    count = sum(len(section.rows) for section in sections)
    for section in sections:
        if (row := section.first_past) is not None:
            past = sum(row.past for each in sections for row in each.rows)
            measure = "largest difference" if row.of_pixels else "relative error"
            return (
                f"PAST: {past} of {count} comparisons; the first is {section.name}: {row.name}, {measure} "
                f"{row.judged:.2e}, allowed {row.threshold:.2e}"
            )
    names = ", ".join(section.name for section in sections)
    return f"ok: all {count} comparisons of {names} are within their thresholds"


def write_report(path: str | os.PathLike[str], head: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """Everything that was compared, whole or not at all."""
    past = [(section, row) for section in sections for row in section.rows if row.past]
    content = {
        **head,
        "ok": not past,
        "first_past": {"component": past[0][0].name, "module": past[0][1].name} if past else None,
        "components": [
            {
                "component": section.name,
                "seconds": round(section.seconds, 3),
                "rows": [r.to_dict() for r in section.rows],
            }
            for section in sections
        ],
    }
    write_json(path, content)
