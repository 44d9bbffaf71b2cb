"""The jinja2 environment that renders the templates of all pages, and a page's only script, which saves pictures."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def script() -> dict[str, Markup]:
    """Return the only script that a page may run, as variables of the page's template.

    Keys: `script`, the script's text; `script_hash`, its SHA-256 in base64.
    """
    templates = files("skipstone.report").joinpath("templates")
    saving, buttons = (templates.joinpath(name).read_text(encoding="utf-8") for name in ("saving.js", "report.js"))
    text = "\n" + saving.replace("export function", "function") + buttons
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"script": Markup(text), "script_hash": Markup(digest)}


def environment() -> Environment:
    """Return the jinja2 environment of all pages: values are escaped, and an undefined variable is an error."""
    loader = PackageLoader("skipstone.report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
