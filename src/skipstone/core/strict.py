"""One strict way from plain dicts (YAML, config.json, command line) to dataclasses, with near-match errors."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def unknown(kind: str, name: object, allowed: Iterable[str]) -> str:
    """The one line for a name that is not there: what was given, the nearest match, and what is allowed."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (allowed: {', '.join(allowed)})"


def choose(kind: str, name: object, table: Mapping[str, T]) -> T:
    """`table[name]`. Raises ValueError naming the nearest match when `name` is not in the table."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(unknown(kind, name, table))
    return table[name]


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build dataclass `cls` from a plain dict, nested dataclasses included.

    `where` is the path shown in errors, e.g. `mechanisms[0]`. Raises ValueError for an unknown or missing key and for a
    value of the wrong type; range checks belong to the dataclass's own `__post_init__`.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or cls.__name__} must be a mapping of keys to values, got {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(unknown(f"key in {where or cls.__name__}", key, fields))
    for name, field in fields.items():
        if name not in values and _required(field):
            raise ValueError(f"{_path(where, name)} is missing")
    try:
        return cls(**{key: convert(hints[key], value, _path(where, key)) for key, value in values.items()})
    except ValueError as error:
        message = str(error)
        raise ValueError(message if not where or message.startswith(where) else f"{where}: {message}") from None


def parsed(cls: type[T], config: T | None, options: Mapping[str, object]) -> T:
    """`config`, where options were parsed before; else `options` through `from_dict`. Raises ValueError for both."""
    if config is None:
        return from_dict(cls, options)
    if options:
        raise ValueError(f"give either config or options of {cls.__name__}, got both")
    return config


def _path(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as a type hint asks: an int serves for a float, and so does a string such as `1e-3`, as YAML leaves it.

    `where` is the path shown in errors. Raises ValueError for a value of another type.
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
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        item = (typing.get_args(hint) or (Any,))[0]
        return origin(convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    return _convert_plain(hint, origin, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in sorted(options, key=lambda option: _meant(option, value)):  # the last one's error is shown
        if option is not type(None):
            try:
                return convert(option, value, where)
            except ValueError as error:
                errors.append(error)
    raise errors[-1]


def _meant(hint: Any, value: Any) -> bool:
    """Whether a value of this shape (mapping, list or plain) was probably meant for this type hint."""
    kind = typing.get_origin(hint) or hint
    if isinstance(value, Mapping):
        return kind is dict or dataclasses.is_dataclass(kind)
    if isinstance(value, (list, tuple)):
        return kind in (list, tuple)
    return kind in (bool, int, float, str)


def _convert_plain(hint: Any, origin: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    kind = origin or hint
    wrong_bool = isinstance(value, bool) and kind in (int, float)
    if kind is dict and isinstance(value, Mapping):  # frozen ones, too
        return value
    if not isinstance(kind, type) or (isinstance(value, kind) and not wrong_bool):
        return value
    raise ValueError(f"{where} must be {getattr(kind, '__name__', kind)}, got {value!r}")
