"""Command lines over frozen dataclasses: tyro reads values and writes help, mistakes become one line.

Every field of a configuration is an option, ``--field``, or ``--group.field`` in a nested dataclass, spelt with ``-``
or ``_``. A nested field whose default is one of several dataclasses keeps the class of that default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import pathlib
import re
import shlex
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sana_jax.errors import UserError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class _Option:
    path: tuple[str, ...]
    annotation: Any
    default: Any  # dataclasses.MISSING where the option is required

    @property
    def type(self) -> Any:
        return _strip_annotated(self.annotation)


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    default: Config | None = None,
    *,
    prog: str,
    aliases: Mapping[str, str] | None = None,
    allow_empty: bool = True,
    description: str | None = None,
    elsewhere: Callable[[str], str | None] | None = None,
) -> Config:
    """Reads a command line into ``config_class``, a dataclass that may nest other dataclasses.

    ``--option value``, ``--option=value`` (so too a text that begins with a dash), ``--flag``, ``--no-flag``; a
    tuple takes several values, or its option may come several times. ``-h`` and ``--help`` print every option with its
    help and default and leave with status 0.

    Args:
        config_class: the dataclass; docstrings under its fields are the help.
        argv: the words after the program's name.
        default: the configuration that options change; without it the class's own defaults, and fields without one are
            required.
        prog: what the user types, for the messages: ``"python -m train.main"``.
        aliases: further names of options, such as ``{"out": "output"}``; say so in the option's help.
        allow_empty: whether an option that takes several values may come without any, for none.
        description: what ``--help`` says above the options; None: the docstring of ``config_class``.
        elsewhere: what to say of an unknown option, by its name without dashes, where other configurations have it.

    Raises:
        UserError: one line with the offending value, what is allowed, and the next step. Errors that the dataclasses
            raise about their values pass through.
    """
    options = {_spelling(option.path): option for option in _collect(config_class, default, ())}
    changes: dict[tuple[str, ...], Any] = {}
    given: dict[str, list[str]] = {}
    resolved: list[tuple[str, list[str]]] = []
    for token, values in _split(argv, prog):
        if token in ("-h", "--help"):
            _print_help(config_class, default, prog, description)
        text_of = _may_be_text_of(token, resolved, options)
        resolved.append(_resolve(token, values, options, aliases or {}, prog, elsewhere, text_of))
    for name, values in resolved:
        if name in given and not _takes_many(options[name].type):
            raise UserError(
                f"--{name} is given twice ({' '.join(given[name])}, then {' '.join(values)}); it is allowed once: "
                "leave one of them out"
            )
        if not values and not allow_empty:
            raise _no_value(name, options[name], prog)
        given.setdefault(name, []).extend(values)
    for name, values in given.items():
        changes[options[name].path] = _convert(name, options[name], values, prog)
    for name, option in options.items():
        if option.default is dataclasses.MISSING and option.path not in changes:
            raise UserError(
                f"--{name} is missing; it is required and takes {_describe(option.type)}: add --{name} VALUE, "
                f"or see {prog} --help"
            )
    try:
        return _build(config_class, default, (), changes)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error}; see {prog} --help") from error


def option_names(config_class: type[Config], default: Config | None = None) -> set[str]:
    """The names, without dashes, of the options that ``parse`` takes; as for ``parse``."""
    return {_spelling(option.path) for option in _collect(config_class, default, ())}


def _collect(config_class: type, instance: Any, prefix: tuple[str, ...]) -> list[_Option]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    options: list[_Option] = []
    for field in dataclasses.fields(config_class):
        if not field.init:
            continue
        if instance is not None:
            value = getattr(instance, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = field.default
        path = (*prefix, field.name)
        annotation = hints[field.name]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            options += _collect(type(value), value, path)
        elif value is dataclasses.MISSING and dataclasses.is_dataclass(_strip_annotated(annotation)):
            options += _collect(_strip_annotated(annotation), None, path)
        elif not any(dataclasses.is_dataclass(part) for part in _alternatives(_strip_annotated(annotation))):
            # a group that is None by default has no options; help does not list it either
            options.append(_Option(path, annotation, value))
    return options


def _build(config_class: type, instance: Any, prefix: tuple[str, ...], changes: Mapping[tuple[str, ...], Any]) -> Any:
    depth = len(prefix)
    touched = {path[depth] for path in changes if path[:depth] == prefix and len(path) > depth}
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.name not in touched:
            continue
        path = (*prefix, field.name)
        if path in changes:
            arguments[field.name] = changes[path]
            continue
        if instance is not None:
            value = getattr(instance, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = None if field.default is dataclasses.MISSING else field.default
        nested = type(value) if value is not None else _strip_annotated(typing.get_type_hints(config_class)[field.name])
        arguments[field.name] = _build(nested, value, path, changes)
    return config_class(**arguments) if instance is None else dataclasses.replace(instance, **arguments)


def _split(argv: Sequence[str], prog: str) -> list[tuple[str, list[str]]]:
    """Options with the words that follow them; a word is an option if it starts with dashes and then a letter."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        is_option = re.match(r"--?[A-Za-z]", word) is not None and not re.fullmatch(r"-(inf|nan)", word)
        if is_option:
            token, equals, value = word.partition("=")
            groups.append((token, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UserError(
                f"unexpected {word!r}; a value is allowed after its option only, as in --option value: "
                f"see {prog} --help"
            )
    return groups


def _resolve(
    token: str,
    values: list[str],
    options: Mapping[str, _Option],
    aliases: Mapping[str, str],
    prog: str,
    elsewhere: Callable[[str], str | None] | None = None,
    text_of: str | None = None,
) -> tuple[str, list[str]]:
    name = token.lstrip("-").replace("_", "-")
    name = aliases.get(name, name) if token.startswith("--") else ""
    if name in options:
        if not values and options[name].type is bool:
            values = ["True"]
        return name, values
    group, dot, last = name.rpartition(".")
    positive = group + dot + last.removeprefix("no-")
    if last.startswith("no-") and positive in options and options[positive].type is bool:
        if values:
            raise UserError(f"{token} takes no value, not {' '.join(values)!r}; write {token} or --{positive} True")
        return positive, ["False"]
    hint = (None if elsewhere is None else elsewhere(name)) or _suggest(token, options, aliases)
    if text_of is not None:
        text = f"if it is a text for --{text_of}, write {shlex.quote(f'--{text_of}={token}')}"
        hint = text if hint.startswith("allowed: ") else f"{hint}; {text}"
    raise UserError(f"unknown option {token}; {hint}; {prog} --help lists every option")


def _may_be_text_of(token: str, before: Sequence[tuple[str, list[str]]], options: Mapping[str, _Option]) -> str | None:
    """The option before a word with dashes, where the word may be its text: the option lacks one, or takes several and
    the word is no name of anything."""
    if not before:
        return None
    name, values = before[-1]
    return name if _holds_text(options[name].type) and (not values or " " in token) else None


def _suggest(token: str, options: Mapping[str, _Option], aliases: Mapping[str, str]) -> str:
    wanted = token.lstrip("-").replace("_", "-").lower()
    names = [*options, *aliases]
    by_last_word = {name: name.rpartition(".")[2] for name in names}
    group, _, last = wanted.rpartition(".")
    initials = [name for name in names if "".join(word[:1] for word in by_last_word[name].split("-")) == last]
    close = sorted((name for name in initials if len(last) > 1), key=lambda name: name.rpartition(".")[0] != group)
    close += difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    close += [name for name in names if by_last_word[name] in difflib.get_close_matches(last, [by_last_word[name]])]
    close += [name for name in names if len(last) > 2 and last in by_last_word[name]]
    if close:
        return "closest: " + ", ".join(f"--{name}" for name in list(dict.fromkeys(close))[:4])
    groups = dict.fromkeys(f"--{name.partition('.')[0]}" + (".*" if "." in name else "") for name in names)
    return "allowed: " + ", ".join(groups)


def _convert(name: str, option: _Option, values: list[str], prog: str) -> Any:
    import tyro

    shown = " ".join(values)
    if not values and not _takes_many(option.type):
        raise _no_value(name, option, prog)
    if option.type is str and len(values) == 1:
        return values[0]
    if option.type is bool:
        values = [value.capitalize() for value in values]
    silenced = io.StringIO()
    try:
        with contextlib.redirect_stderr(silenced), contextlib.redirect_stdout(silenced):
            # behind "--", a text that begins with a dash is a text
            return tyro.cli(option.annotation, args=["--", *values], add_help=False)
    except SystemExit:
        pass
    extra = ""
    if len(values) > 1 and _accepts_text(option.type):
        extra = f": put quotes around a text of several words, --{name} {shown!r}"
    raise UserError(f"--{name} cannot be {shown!r}; {_allowed(option)}{extra}; see {prog} --help")


def _allowed(option: _Option) -> str:
    default = "" if option.default is dataclasses.MISSING else f" (default {_show(option.default)})"
    return f"allowed is {_describe(option.type)}{default}"


def _no_value(name: str, option: _Option, prog: str) -> UserError:
    return UserError(f"--{name} has no value; {_allowed(option)}: write --{name} VALUE, or see {prog} --help")


def _print_help(config_class: type, default: Any, prog: str, description: str | None = None) -> None:
    import tyro

    given = _or_missing(default)
    tyro.cli(config_class, args=["--help"], default=given, prog=prog, config=_markers(), description=description)


def _or_missing(default: Any) -> Any:
    import tyro

    return tyro.MISSING_NONPROP if default is None else default


def _markers() -> tuple[Any, ...]:
    import tyro

    # unions of dataclasses show the options of the class that is the default, which are the ones that parse takes
    return (tyro.conf.AvoidSubcommands,)


def _spelling(path: tuple[str, ...]) -> str:
    return ".".join(part.replace("_", "-") for part in path)


def _strip_annotated(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(_strip_annotated(part) for part in typing.get_args(annotation))
    return (annotation,)


def _takes_many(annotation: Any) -> bool:
    variadic = (list, set, frozenset, dict, Sequence, Mapping)
    for part in _alternatives(annotation):
        origin = typing.get_origin(part) or part
        if origin in variadic or (origin is tuple and Ellipsis in typing.get_args(part)):
            return True
    return False


def _accepts_text(annotation: Any) -> bool:
    return any(part in (str, pathlib.Path) for part in _alternatives(annotation))


def _holds_text(annotation: Any) -> bool:
    parts = _alternatives(annotation)
    return any(_accepts_text(part) for kind in parts for part in (kind, *typing.get_args(kind)))


def _describe(annotation: Any) -> str:
    """What a value of this type looks like, in words."""
    names = {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "True or False",
        type(None): "None",
        pathlib.Path: "a path",
    }
    annotation = _strip_annotated(annotation)
    if annotation in names:
        return names[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"{len(arguments)} values (" + ", ".join(_describe(part) for part in arguments) + ")"
    if origin in (tuple, list, set, frozenset) and arguments:
        return f"one or more values, each {_describe(arguments[0])}"
    return str(annotation).removeprefix("typing.")


def _show(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(_show(item) for item in value) or "none"
    return repr(value) if isinstance(value, str) and (not value or " " in value) else str(value)
