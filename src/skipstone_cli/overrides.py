"""Recipe and `key=value` words into one plain dict. Precedence: defaults < recipe < command line.

The defaults are those of the library's dataclasses, which also refuse unknown keys; nothing is checked twice here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstone_cli.errors import UserError
from skipstone_cli.paths import existing_file

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXAMPLE = "for example train.learning_rate=1e-3 or model.mechanisms.0.capacity=0.25"


def load_recipe(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe at `path` with `overrides` on top, later ones winning, interpolations resolved.

    Raises UserError when the file is absent or no YAML mapping, and for an override that is malformed or fits nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    pairs = [split(word) for word in overrides]
    config = _read(existing_file(path, "recipe"))
    for key, value in pairs:
        _apply(config, key, value)
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {str(path)!r}: {error}") from None
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def split(word: str) -> tuple[str, str]:
    """`key=value` into its halves; the value may hold further equals signs. Raises UserError when it is neither."""
    key, equals, value = word.partition("=")
    parts = key.split(".")
    if not equals or not all(part and part == part.strip() for part in parts):
        raise UserError(f"override {word!r} is not of the form key=value ({EXAMPLE})")
    return key, value


def _read(path: Path) -> DictConfig:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {str(path)!r} is not readable YAML: {error}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"recipe {str(path)!r} must be a mapping of keys to values at its top")
    return config


def _apply(config: DictConfig, key: str, value: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])["value"]  # numbers, booleans and lists as in YAML
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {key}={value}: the value is not YAML ({error})") from None
    _check_way(config, key, value)
    try:
        OmegaConf.update(config, key, parsed, merge=True)
    except (OmegaConfBaseException, ValueError, TypeError, IndexError, AssertionError) as error:
        raise UserError(f"override {key}={value} fits nowhere in the recipe: {error}") from None


def _check_way(config: DictConfig, key: str, value: str) -> None:
    """OmegaConf would replace a number or a text on the way to `key` by a mapping, silently; refuse that instead."""
    from omegaconf import ListConfig, OmegaConf

    parts = key.split(".")
    for end in range(1, len(parts)):
        at = ".".join(parts[:end])
        node = OmegaConf.select(config, at)
        if node is not None and not OmegaConf.is_config(node):
            raise UserError(f"override {key}={value}: {at} is {node!r}, it has no keys")
        if isinstance(node, ListConfig) and not (parts[end].isdecimal() and int(parts[end]) < len(node)):
            raise UserError(f"override {key}={value}: {at} is a list of {len(node)}, use an index from 0 below that")
