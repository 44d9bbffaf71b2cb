"""Merge a recipe and `key=value` words into one plain dict. Precedence: defaults < recipe < command line.

The defaults are those of the library's dataclasses, which also refuse unknown keys; nothing is checked twice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstone.core.plain_text import check_yaml
from skipstone_cli.errors import UserError
from skipstone_cli.paths import existing_file

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Ranges of blocks, such as 2:6, : or ::2. YAML would read them as numbers to base 60, or not at all.
RANGE = re.compile(r"-?\d*(?::-?\d*)+")
EXAMPLE = "for example train.learning_rate=1e-3 or model.mechanisms.0.capacity=0.25"


def load_recipe(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the recipe in the YAML file `path` as a plain dict, with overrides applied and interpolations resolved.

    overrides: words "key=value", such as "train.steps=500"; later ones win. If they shorten the training below the
    recipe's warm-up, the warm-up is shortened in proportion. Raises UserError if the file is missing, empty or not a
    YAML mapping, and for an override that is malformed or does not fit the recipe.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = _read(existing_file(path, "recipe"))
    lines, before = [], _steps(config)
    for word in overrides:
        try:
            _apply(config, *split(word))
        except UserError as error:
            lines.append(str(error))
    if lines:
        raise UserError(*lines)
    if not any(word.startswith("train.warmup_steps=") for word in overrides):
        _shorten_warmup(config, *before)
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"recipe {str(path)!r}: {_said(error)}") from None
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def split(word: str) -> tuple[str, str]:
    """Split a word `key=value` at the first equals sign; return the key and the value.

    Raises UserError if the word has another form.
    """
    key, equals, value = word.partition("=")
    parts = key.split(".")
    if not equals or not all(part and part == part.strip() for part in parts):
        raise UserError(f"override {word!r} does not have the form key=value ({EXAMPLE})")
    return key, value


def _read(path: Path) -> DictConfig:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, AssertionError, RecursionError) as error:
        raise UserError(f"recipe {str(path)!r} is not readable YAML: {_said(error)}") from None
    if not any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
        raise UserError(f"recipe {str(path)!r} is empty; for the defaults alone, write {{}} into it")
    a_text = len(config) == 1 and [str(key).split() for key in config] == [text.split()]
    if a_text or not isinstance(config, DictConfig):  # OmegaConf reads a plain text as a key without a value
        raise UserError(f"recipe {str(path)!r} must be a mapping of keys to values")
    return config


def _apply(config: DictConfig, key: str, value: str) -> None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parsed = value if RANGE.fullmatch(value) else _parsed(key, value)
    _check_way(config, key, value)
    try:
        OmegaConf.update(config, key, parsed, merge=True)
    except (OmegaConfBaseException, ValueError, TypeError, IndexError, AssertionError, RecursionError) as error:
        raise UserError(f"override {key}={value} does not fit the recipe: {_said(error)}") from None


def _parsed(key: str, value: str) -> Any:
    """Return what an override's value means as YAML: numbers, booleans, lists and mappings. Raises UserError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        check_yaml(value)
        parsed = OmegaConf.from_dotlist([f"value={value}"])["value"]
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"override {key}={value}: the value is not YAML ({_said(error)})") from None
    braces = value.lstrip().startswith("{")  # YAML reads `9: x` as a mapping; on one line, only braces make one
    return value if OmegaConf.is_dict(parsed) and not braces else parsed


def _check_way(config: DictConfig, key: str, value: str) -> None:
    """Raise UserError if `key` leads through a number or text, which OmegaConf would silently replace by a mapping."""
    from omegaconf import ListConfig, OmegaConf

    parts = key.split(".")
    for end in range(1, len(parts)):
        at = ".".join(parts[:end])
        node = OmegaConf.select(config, at)
        if node is not None and not OmegaConf.is_config(node):
            raise UserError(f"override {key}={value}: {at} is {node!r} and has no keys")
        if isinstance(node, ListConfig) and not (parts[end].isdecimal() and int(parts[end]) < len(node)):
            raise UserError(f"override {key}={value}: {at} is a list of {len(node)}, numbered from 0")


def _said(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "lists or mappings are nested too deeply"
    said = str(error).partition("\n")[0]  # OmegaConf's names of keys and types follow
    return said or "it is not a mapping of keys to values"


def _steps(config: DictConfig) -> tuple[Any, Any]:
    """Return the current `train.steps` and `train.warmup_steps`."""
    from omegaconf import OmegaConf

    train = OmegaConf.select(config, "train")
    found = train if OmegaConf.is_dict(train) else {}
    return found.get("steps"), found.get("warmup_steps")


def _shorten_warmup(config: DictConfig, steps_before: Any, warmup_before: Any) -> None:
    """Keep the warm-up's share of the training if the command line makes it shorter than the recipe's warm-up."""
    from omegaconf import OmegaConf

    steps, warmup = _steps(config)
    numbers = (steps, warmup, steps_before, warmup_before)
    if not all(type(number) is int and number > 0 for number in numbers) or warmup <= steps:
        return
    shorter = steps * warmup_before // steps_before
    OmegaConf.update(config, "train.warmup_steps", shorter)
    print(
        f"skipstone: train.warmup_steps is set to {shorter} of {steps} steps, the same share as the recipe's "
        f"{warmup_before} of {steps_before}",
        file=sys.stderr,
    )
