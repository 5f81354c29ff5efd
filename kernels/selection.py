"""Which implementation of an operation runs: the one that is named, or the one that was measured to be faster.

The measurements are data, in ``measurements.json`` beside this file. A row there is one implementation timed beside
``xla`` on one device; nothing is picked that has no row. For a kind of device where an operation was never timed, a
row may be reckoned from the programs that the device's own compiler makes: it counts where it promises half the time
or less, and no more once anything is timed there. What is picked and cannot run what is asked (``Refusal``) leaves it
to XLA, and a line says so; what is named raises the reason. ``preferring`` says for a whole program what to pick.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import json
import math
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kernels.over_mesh import Axes, over_mesh
from kernels.refusal import Refusal

TABLE = Path(__file__).with_name("measurements.json")
DEFAULT = "xla"
# Implementations that are programs for one kind of device. Others run wherever XLA does.
DEVICE_PROGRAMS = {"pallas": ("cuda",), "triton": ("cuda",), "cudnn": ("cuda",)}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Implementations that bring a gradient of their own, and so have no forward-mode derivative.
REVERSE_MODE_ALONE = (*DEVICE_PROGRAMS, "blockwise", "large_blocks")
# A reckoning is not a time: what it promises must be worth more than it may be wrong by.
RECKONED_AT_MOST = 0.5
# What ``preferring`` takes: the table's picks, XLA's own forms alone, or kernels of one kind wherever there are such.
AUTO = "auto"
Preference = Literal["auto", "xla", "pallas", "triton"]
PREFERENCES = get_args(Preference)
_forward_mode: contextvars.ContextVar[bool] = contextvars.ContextVar("forward_mode", default=False)
_preference: contextvars.ContextVar[str] = contextvars.ContextVar("preference", default=AUTO)


@dataclass(frozen=True)
class Measurement:
    """One row of the table: an implementation's time beside that of ``xla``, taken in the same run.

    Attributes:
        op: the operation's name, as ``choose`` gets it.
        implementation: its implementation's name.
        platform: what JAX calls the kind of device: ``cpu``, ``cuda``, ``rocm`` or ``tpu``.
        device: the device's own name.
        versions: of jax and whatever else made the program.
        date: of the measurement, YYYY-MM-DD.
        shapes: the inputs' shapes and dtype, and whether gradients were taken.
        ratio: time as a share of xla's; below 1 is faster.
        how: the command, or what was timed and how often.
        timed: whether it ran; False where the ratio was reckoned from the compiled programs.
    """

    op: str
    implementation: str
    platform: str
    device: str
    versions: Mapping[str, str]
    date: str
    shapes: str
    ratio: float
    how: str
    timed: bool = True


@dataclass(frozen=True)
class Pick:
    """What None means for an operation on a platform, and the measurements that say so (none of them: unmeasured)."""

    op: str
    platform: str
    implementation: str
    measurements: tuple[Measurement, ...]


def choose(
    op: str,
    implementations: Mapping[str, Callable],
    name: str | None,
    axes: Axes | None = None,
    fallbacks: tuple[str, ...] = (),
) -> Callable:
    """The function that runs an operation.

    Args:
        op: the operation's name in the table of measurements.
        implementations: functions by name, all with the same arguments and results; ``xla`` must be among them.
        name: the implementation wanted; None for what the table picks for the platform that the program is lowered for.
        axes: of the arrays, so that programs for one kind of device run under a mesh; needed where there are such.
        fallbacks: what runs in this order, and ``xla`` last, where None has picked one that raises ``Refusal``.

    Returns:
        A function of the implementations' positional arguments. A form for one kind of device that was named raises a
        ``ValueError`` with the reason when the program is lowered for another device, or for ``jax.jvp``.

    Raises:
        ValueError: if ``name`` is not one of ``implementations``.
    """
    if name is None:
        special = {}
        for platform in PLATFORMS:
            picked = preferred(op, implementations, platform)
            if picked != DEFAULT:
                special[platform] = [choose(op, implementations, own, axes) for own in (picked, *fallbacks)]
        return _by_platform(op, special, implementations[DEFAULT]) if special else implementations[DEFAULT]
    if name not in implementations:
        raise ValueError(f"implementation={name!r}: choose one of {sorted(implementations)}, or None to pick one")
    if name not in DEVICE_PROGRAMS:
        return implementations[name]
    return _only_on(DEVICE_PROGRAMS[name], over_mesh(implementations[name], axes, name), op, name)


def preferred(op: str, implementations: Collection[str], platform: str) -> str:
    """What None means here and now: the form that ``preferring`` asks for where the operation has it, else the table's.

    Inside ``forward_mode`` it is ``xla`` in place of what has no forward-mode derivative.
    """
    wanted, picked = _preference.get(), pick(op, platform).implementation
    if wanted == DEFAULT or (wanted in implementations and platform in DEVICE_PROGRAMS[wanted]):
        picked = wanted
    return DEFAULT if _forward_mode.get() and picked in REVERSE_MODE_ALONE else picked


@contextlib.contextmanager
def preferring(name: str) -> Iterator[None]:
    """For programs traced inside, what None means: one of ``PREFERENCES``.

    ``auto`` is the table's picks, ``xla`` XLA's own forms alone (where memory is bounded, those in blocks), ``pallas``
    or ``triton`` such a kernel for every operation that has one, on the devices that it is for, and elsewhere the
    table's picks. A function under ``jax.jit`` that was traced before for the same shapes keeps what it has.

    Raises:
        ValueError: another name.
    """
    if name not in PREFERENCES:
        raise ValueError(f"kernels={name!r}: choose one of {', '.join(PREFERENCES)}")
    token = _preference.set(name)
    try:
        yield
    finally:
        _preference.reset(token)


def preference() -> str:
    """What ``preferring`` says here and now."""
    return _preference.get()


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """While programs are traced inside, None picks nothing that lacks a forward-mode derivative.

    For what takes ``jax.jvp`` of a network: a fused form that is faster there by the table would be refused when the
    program is lowered.
    """
    token = _forward_mode.set(True)
    try:
        yield
    finally:
        _forward_mode.reset(token)


def lazy(module: str, function: str) -> Callable:
    """A function of a module that is imported at the first call, for implementations with libraries of their own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args, **kwargs)

    run.__name__ = run.__qualname__ = function
    return run


def pick(op: str, platform: str) -> Pick:
    """What None means for one operation on one platform.

    The implementation that was faster than ``xla`` in every row of that platform, and by the geometric mean the fastest
    of these; ``xla`` where there is none. Reckoned rows count where there is no timed one.
    """
    rows = [row for row in measurements() if (row.op, row.platform) == (op, platform)]
    timed = [row for row in rows if row.timed]
    rows, limit = (timed, 1.0) if timed else (rows, RECKONED_AT_MOST)
    by_name = {row.implementation: [r for r in rows if r.implementation == row.implementation] for row in rows}
    faster = {
        name: math.exp(sum(math.log(row.ratio) for row in own) / len(own))
        for name, own in by_name.items()
        if max(row.ratio for row in own) < limit
    }
    best = min(faster, key=faster.__getitem__, default=DEFAULT)
    return Pick(op, platform, best, tuple(by_name.get(best, rows)))


def picks() -> list[Pick]:
    """What None means, for every operation on every platform."""
    return [pick(op, platform) for op in operations() for platform in PLATFORMS]


def describe(ops: Collection[str] | None = None) -> str:
    """``picks`` in words, a line for each that is measured and one for the rest; ``ops`` are those that are wanted."""
    lines = []
    for op in operations():
        if ops is not None and op not in ops:
            continue
        found = [pick(op, platform) for platform in PLATFORMS]
        lines += [_in_words(one) for one in found if one.measurements]
        if unmeasured := [one.platform for one in found if not one.measurements]:
            lines.append(f"{op} on {', '.join(unmeasured)}: {DEFAULT} (nothing is measured there)")
    return "\n".join(lines)


def operations() -> dict[str, Mapping[str, Callable]]:
    """Every operation's implementations by name: ``OPERATIONS`` of a package's ``api``, or its ``IMPLEMENTATIONS``."""
    found: dict[str, Mapping[str, Callable]] = {}
    for package in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if package.ispkg and (Path(__file__).parent / package.name / "api.py").is_file():
            api = importlib.import_module(f"kernels.{package.name}.api")
            found |= getattr(api, "OPERATIONS", None) or {package.name: api.IMPLEMENTATIONS}
    return found


@functools.cache
def measurements() -> tuple[Measurement, ...]:
    """The rows of ``measurements.json``.

    Raises:
        ValueError: for a row that lacks a field, has another one, or a ratio that is no time.
    """
    return parse(json.loads(TABLE.read_text()))


def parse(rows: list[dict[str, Any]]) -> tuple[Measurement, ...]:
    """Rows of the table, checked; ``measurements`` says what is refused."""
    fields = sorted(Measurement.__dataclass_fields__)
    for row in rows:
        if sorted(row) != fields:
            raise ValueError(f"{TABLE.name}: a row of {sorted(row)}: its fields must be {fields}")
        if row["platform"] not in PLATFORMS or row["implementation"] == DEFAULT:
            raise ValueError(
                f"{TABLE.name}: {row['implementation']} on {row['platform']}: rows are of implementations other than "
                f"{DEFAULT!r}, on one of {PLATFORMS}"
            )
        if not (math.isfinite(row["ratio"]) and row["ratio"] > 0):
            raise ValueError(f"{TABLE.name}: ratio {row['ratio']} of {row['op']}: it must be a time over xla's")
    return tuple(Measurement(**row) for row in rows)


def _in_words(found: Pick) -> str:
    start = f"{found.op} on {found.platform}: {found.implementation}"
    if found.implementation == DEFAULT:
        others = ", ".join(f"{row.implementation} {row.ratio:.2f} x its time" for row in found.measurements)
        return f"{start} (no other was faster in every row: {others})"
    rows = "; ".join(
        f"{'' if row.timed else 'reckoned '}{row.ratio:.2f} x the time of {DEFAULT} at {row.shapes}, {row.device}, "
        f"{row.date}"
        for row in found.measurements
    )
    return f"{start} ({rows})"


# -- deciding when a program is lowered --------------------------------------------------------------------------------


def _by_platform(op: str, special: Mapping[str, list[Callable]], default: Callable) -> Callable:
    """A function that lowers to the first of ``special[platform]`` that does not refuse, or else to ``default``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        arrays, rebuild = _split((args, kwargs))

        def calling(platform: str | None, functions: list[Callable]) -> Callable:
            def call(*arrays: Any) -> Any:
                args, kwargs = rebuild(arrays)
                for function in functions:
                    try:
                        return function(*args, **kwargs)
                    except Refusal as reason:
                        _say_once(op, platform, str(reason))
                return default(*args, **kwargs)

            return call

        branches = {platform: calling(platform, functions) for platform, functions in special.items()}
        return jax.lax.platform_dependent(*arrays, **branches, default=calling(None, []))

    return run


@functools.cache
def _say_once(op: str, platform: str, reason: str) -> None:
    """Says that what the table picks for this machine's platform does not run; of other platforms nobody asks."""
    own = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if own == platform:
        print(f"{op}: what None picks on {platform} leaves it to XLA: {reason}", file=sys.stderr)


def _only_on(platforms: tuple[str, ...], function: Callable, op: str, name: str) -> Callable:
    """``function``, except that lowering for another platform or taking a forward-mode derivative raises the reason."""

    def run(*args: Any, **kwargs: Any) -> Any:
        arrays, rebuild = _split((args, kwargs))
        args, kwargs = rebuild([_checked_p.bind(x, op=op, name=name, platforms=platforms) for x in arrays])
        return function(*args, **kwargs)

    return run


def _split(tree: Any) -> tuple[list, Callable]:
    """The arrays of a tree, and the function that puts arrays in their places; all other leaves stay as they are."""
    leaves, structure = jax.tree.flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

    def rebuild(arrays: Any) -> Any:
        filled = list(leaves)
        for place, array in zip(places, arrays):
            filled[place] = array
        return jax.tree.unflatten(structure, filled)

    return [leaves[place] for place in places], rebuild


# -- two identities that raise when they are lowered where they must not be --------------------------------------------


def _check_platform(
    context: mlir.LoweringRuleContext, x: Any, *, op: str, name: str, platforms: tuple[str, ...]
) -> Any:
    wanted = context.platforms or context.module_context.platforms
    if refused := [platform for platform in wanted if platform not in platforms]:
        raise ValueError(
            f"{op}: implementation={name!r} runs on {' and '.join(platforms)} alone, not on {' and '.join(refused)}; "
            "use 'xla', or None to pick one"
        )
    return [x]


def _refuse_tangent(*_: Any, op: str, name: str, platforms: tuple[str, ...]) -> Any:
    raise ValueError(
        f"{op}: implementation={name!r} has no forward-mode derivative (jax.jvp); use implementation='xla' there"
    )


def _identity(name: str, lowering: Callable) -> Primitive:
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x, **params: x)
    mlir.register_lowering(primitive, lowering)
    batching.primitive_batchers[primitive] = lambda operands, axes, **params: (
        primitive.bind(*operands, **params),
        axes[0],
    )
    return primitive


# The second takes the place of the first one's tangents. Reverse mode transposes it away, so that it is only ever
# lowered, or run, where a forward-mode derivative was asked for.
_checked_p = _identity("platform_checked", _check_platform)
_checked_p.def_impl(lambda x, **params: jax.jit(functools.partial(_checked_p.bind, **params))(x))
_no_tangent_p = _identity("no_forward_mode", _refuse_tangent)
_no_tangent_p.def_impl(_refuse_tangent)
ad.deflinear2(_no_tangent_p, lambda cotangent, _, **params: [cotangent])
ad.defjvp(_checked_p, lambda tangent, x, **params: _no_tangent_p.bind(tangent, **params))
