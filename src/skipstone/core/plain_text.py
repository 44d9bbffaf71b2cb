"""Reading of JSON and YAML that may come from strangers: deep nesting and values that unfold hugely are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from skipstone.core.strict import PlainDict

# Numbers to base 60, such as 1:30, or 8, such as 010: what YAML 1.1 makes of them is hardly ever meant.
DISGUISED = re.compile(r"[-+]?(?:\d[\d_]*(?::[0-5]?\d)+(?:\.[\d_]*)?|0[0-7_]*[0-7])")
# Where such a number may stand for itself: not inside of a word, a decimal or an exponent.
MAYBE_DISGUISED = re.compile(rf"(?<![\w.+-])(?:{DISGUISED.pattern})(?![\w.])")
LARGEST_YAML, MOST_NODES = 4 << 20, 200_000  # characters of a file; values in it once its aliases are unfolded


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text and return its value. Raises ValueError if the text is not JSON or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def read_text(path: Path) -> str:
    """Return the text of the UTF-8 file `path`.

    Raises ValueError, which names the file, for a device, a pipe and text that is not UTF-8, and OSError if the file
    cannot be opened.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{str(path)!r} cannot be read: it is a device or a pipe")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from None


def check_text(text: str, what: str) -> None:
    """Raise ValueError, naming `what`, for a text that UTF-8 cannot encode.

    Half of a surrogate pair is such a text, and so is an argument of the command line with bytes that are not UTF-8.
    what: what the text is, for the message, such as "the prompt".
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is no Unicode text: {error.reason} at character {error.start}") from None


def read_object(path: Path) -> PlainDict:
    """Return the JSON object that the UTF-8 file `path` contains.

    Raises ValueError, naming the file, if its text is not JSON, is nested too deeply or is not an object, and OSError
    if the file cannot be opened.
    """
    text = read_text(path)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error if text.strip() else 'it is empty'}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} cannot be read: it does not contain a JSON object")
    return values


def check_yaml(text: str) -> None:
    """Raise ValueError for a YAML text that is too large to be a recipe, or that holds numbers in disguise.

    A recipe describes a model and its training. The limits are 2^22 characters and, in a text with aliases, 200,000
    values once these are expanded: a few lines of aliases of aliases can stand for billions. An alias that contains
    itself is refused too. Numbers in disguise are those that YAML 1.1 reads in base 60 or 8: a range of blocks without
    quotes, 2:6, would be 126, and 010 would be 8. Text that is not valid YAML passes: the parser reports it later.
    """
    import yaml

    if len(text) > LARGEST_YAML:
        raise ValueError(f"it has {len(text):,} characters; at most {LARGEST_YAML:,} are read")
    if "*" not in text and not MAYBE_DISGUISED.search(text):
        return  # without aliases, it is as large as it looks
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return
    try:
        count = _nodes(root, {})
    except RecursionError:
        raise ValueError("lists or mappings are nested too deeply") from None
    if count > MOST_NODES:
        raise ValueError(f"its aliases stand for more than {MOST_NODES:,} values")


def _nodes(node: Any, known: dict[int, int]) -> int:
    """Return the number of values in a YAML node with all aliases expanded.

    known: results by `id` of the nodes that were counted before, 0 for those that are still being counted. Raises
    ValueError for a node that contains itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias contains itself")
        return known[id(node)]
    known[id(node)] = 0
    _refuse_disguised(node)
    parts = node.value if isinstance(getattr(node, "value", None), list) else []
    flat = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
    known[id(node)] = count = 1 + sum(_nodes(each, known) for each in flat)
    return count


def _refuse_disguised(node: Any) -> None:
    """Raise ValueError if a YAML node is a number written without quotes to base 60 or 8."""
    text = getattr(node, "value", None)
    if isinstance(text, str) and node.tag.endswith((":int", ":float")) and DISGUISED.fullmatch(text):
        line = node.start_mark.line + 1
        raise ValueError(f"line {line}: YAML reads {text} as a number to base {60 if ':' in text else 8}; quote it")
