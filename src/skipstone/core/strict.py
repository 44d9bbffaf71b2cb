"""Convert plain dicts (YAML, config.json, command line) to dataclasses strictly, reporting all mistakes together."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

PlainDict: TypeAlias = dict[str, Any]  # as in JSON and YAML: strings, numbers, lists and dicts of these
PlainMapping: TypeAlias = Mapping[str, Any]  # the same, read-only


class Mistakes(ValueError):
    """A ValueError for several mistakes in one input, whose message joins them by semicolons.

    lines: one message per mistake.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = list(lines)
        super().__init__("; ".join(self.lines))


def mistakes(error: ValueError) -> list[str]:
    """Return the messages of which an error consists: several for `Mistakes`, else one."""
    return error.lines if isinstance(error, Mistakes) else [str(error)]


def refuse(lines: Iterable[str]) -> None:
    """Raise an error with the messages `lines`: ValueError for one, `Mistakes` for several; do nothing for none."""
    lines = list(lines)
    if lines:
        raise Mistakes(lines) if len(lines) > 1 else ValueError(lines[0])


def unknown(kind: str, name: object, allowed: Iterable[str]) -> str:
    """Return an error message for an unknown name, with the nearest match and everything that is allowed.

    kind: what is named, such as "activation". name: what the user gave. allowed: the valid names.
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (allowed: {', '.join(allowed)})"


def choose(kind: str, name: object, table: Mapping[str, T]) -> T:
    """Return `table[name]`. Raises ValueError with the nearest match if `name` is not in the table.

    kind: what is named, for the message, such as "activation". table: the values by allowed name.
    """
    if not isinstance(name, str) or name not in table:
        raise ValueError(unknown(kind, name, table))
    return table[name]


# typing compiles hints that are text anew each time
_hints: Callable[[Any], dict[str, Any]] = cache(typing.get_type_hints)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from a plain dict, including dataclasses nested in it.

    values: field values by name. where: the path shown in errors, such as `mechanisms[0]`; "" means the whole input.
    Raises ValueError for an unknown or missing key and for a value of the wrong type; the dataclass's own
    `__post_init__` checks ranges. Several mistakes are raised together as `Mistakes`, a ValueError.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or cls.__name__} must be a mapping of keys to values, got {values!r}")
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    lines = [unknown(f"key in {where or cls.__name__}", key, fields) for key in values if key not in fields]
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    lines += [f"{_path(where, name)} is missing" for name in missing]
    converted, wrong = {}, {*missing}
    for key in (key for key in values if key in fields):
        try:
            converted[key] = convert(hints[key], values[key], _path(where, key))
        except ValueError as error:
            lines += mistakes(error)
            wrong.add(key)
    if any(_required(fields[name]) for name in wrong):
        refuse(lines)
    built, found = build(cls, converted, wrong)
    refuse([*lines, *(line if not where or line.startswith(where) else f"{where}: {line}" for line in found)])
    return built  # type: ignore[return-value]


def finite(options: T, where: str = "") -> T:
    """Return the dataclass `options` unchanged if no number in it is NaN or infinite.

    Lists, tuples and dataclasses in its fields are searched too. where: the path shown in errors; "" means that names
    stand alone. Raises ValueError, which names the field, for the first number that is NaN or infinite.
    """
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        for i, each in enumerate(value) if isinstance(value, list | tuple) else [(None, value)]:
            path = _path(where, field.name) + ("" if i is None else f"[{i}]")
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(f"{path} must be finite, got {each}")
            if dataclasses.is_dataclass(each) and not isinstance(each, type):
                finite(each, path)
    return options


def build(make: Callable[..., T], values: Mapping[str, Any], doubted: Iterable[str] = ()) -> tuple[T | None, list[str]]:
    """Return `make(**values)` and an empty list, or the messages of all ValueErrors that it raises for these values.

    `make` raises one error at a time. To find further ones, the values that a message names are dropped, so that their
    defaults apply, and `make` is called again; what it returns then must not be used and may be None. doubted: names of
    values already known to be wrong. Messages about these and about dropped values are left out as consequences.
    """
    left, doubted = dict(values), {*doubted}
    lines: list[str] = []
    while True:
        try:
            return make(**left), lines
        except TypeError:  # a required value was among those that messages named
            if not doubted:
                raise
            return None, lines
        except ValueError as error:
            told = [(line, re.findall(r"\w+", line)) for line in mistakes(error)]
            lines += [line for line, words in told if not doubted & {*words}]
            guilty = {name for _, words in told if (name := next((w for w in words if w in left), None)) is not None}
            if not guilty:
                return None, lines if lines or doubted else mistakes(error)
            doubted |= guilty
            left = {name: value for name, value in left.items() if name not in guilty}


def parsed(cls: type[T], config: T | None, options: Mapping[str, object]) -> T:
    """Return `config` if it is not None, else the dataclass `cls` built from plain options.

    config: an object of `cls`, parsed before. options: plain values by field name. Raises ValueError if both are given,
    and for an unknown or missing option, a wrong type, and a number that is NaN or infinite.
    """
    if config is None:
        return finite(from_dict(cls, options))
    if options:
        raise ValueError(f"give either config or options of {cls.__name__}, got both")
    return config


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def convert(hint: Any, value: Any, where: str) -> Any:
    """Convert a plain value to the type that a type hint asks for, and return it.

    hint: plain types, unions, Literal, lists, tuples, dicts or dataclasses. value: the value as read from YAML or JSON.
    Ints are accepted as floats, and so are strings such as `1e-3`, which YAML does not read as numbers. where: the path
    shown in errors. Raises ValueError for a value of another type.
    """
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ValueError(unknown(where, value, map(str, typing.get_args(hint))))
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if origin in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        return (tuple if origin is tuple else list)(_items((typing.get_args(hint) or (Any,))[0], value, where))
    return _convert_plain(hint, origin, value, where)


def _items(hint: Any, values: Iterable[Any], where: str) -> list[Any]:
    """Convert every one of `values` to the type hint, reporting the mistakes of all of them together.

    where: the path shown in errors, to which the index of the item is added.
    """
    found, lines = [], []
    for i, value in enumerate(values):
        try:
            found.append(convert(hint, value, f"{where}[{i}]"))
        except ValueError as error:
            lines += mistakes(error)
    refuse(lines)
    return found


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """Convert a value to the first type of a union that accepts it.

    options: the types. where: the path shown in errors.
    """
    if value is None and type(None) in options:
        return None
    errors = []
    for option in sorted(options, key=lambda option: _meant(option, value)):  # the error of the last one is shown
        if option is not type(None):
            try:
                return convert(option, value, where)
            except ValueError as error:
                errors.append(error)
    raise errors[-1]


def _meant(hint: Any, value: Any) -> bool:
    """Return whether a value of this shape (mapping, list or scalar) was probably meant for this type hint."""
    kind = typing.get_origin(hint) or hint
    if isinstance(value, Mapping):
        return kind in (dict, Mapping) or dataclasses.is_dataclass(kind)
    if isinstance(value, (list, tuple)):
        return kind in (list, tuple, Sequence)
    return kind in (bool, int, float, str)


def _convert_plain(hint: Any, origin: Any, value: Any, where: str) -> Any:
    """Convert a value to a type that is not a union, literal or list, such as int, str, dict or a dataclass.

    hint: the type. origin: the type without parameters if it has some (dict for `dict[str, int]`), else None. where:
    the path shown in errors.
    """
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    kind = origin or hint
    confused = (isinstance(value, bool) and kind in (int, float)) or (isinstance(value, str) and kind is Sequence)
    if kind is dict and isinstance(value, Mapping):  # frozen ones, too
        return value
    if not isinstance(kind, type) or (isinstance(value, kind) and not confused):
        return value
    words: dict[object, str] = {Sequence: "list", Mapping: "dict"}
    name = words.get(kind, getattr(kind, "__name__", str(kind)))
    raise ValueError(f"{where} must be {name}, got {value!r}")


def is_folder_name(name: object) -> bool:
    """Return whether `name` is a string of 1 to 200 characters that can name a file or folder.

    It must hold no slash, backslash, NUL or line feed, and not be "." or "..".
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0\n") and len(name) <= 200
