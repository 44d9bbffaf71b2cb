"""The live page saved as one file that opens offline: the same panels, with the events that they show, and no server.

The page is a template with an empty place for these events. The button of the live page fills it with what is shown;
`save_page` fills it with what a model does with a prompt, without a browser.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from skipstone.core.atomic_write import write_whole
from skipstone.core.strict import PlainDict
from skipstone.report.templating import environment
from skipstone.view.live_model import LiveModel
from skipstone.view.live_session import Request, events, open_models

STYLES = (("skipstone.report", "templates/style.css"), ("skipstone.view", "static/view.css"))
SCRIPTS = (
    ("skipstone.report", "templates/saving.js"),
    *(("skipstone.view", f"static/{name}.js") for name in ("pictures", "panel", "saved")),
)
MODULES = re.compile(r"^import .*\n|^export \{.*\n|^export ", re.MULTILINE)  # one script needs neither
EMPTY = ">null</script>"  # the place of what is shown


@cache
def empty_page() -> str:
    """Return the HTML of the page without any result: style and script are inline, and no other script is allowed."""
    style, script = ("\n".join(_read(*place) for place in places) for places in (STYLES, SCRIPTS))
    script = "\n" + MODULES.sub("", script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment().from_string(_read("skipstone.view", "static/saved.html"))
    page = template.render(style=Markup(style), script=Markup(script), digest=Markup(digest))
    assert page.count(EMPTY) == 1
    return page


def save_page(
    runs: Sequence[Path], out: Path, prompt: str, *, new_tokens: int = 64, temperature: float = 0.8, seed: int = 0
) -> Path:
    """Continue a prompt with one or two models and write what the live page would show as one HTML file.

    runs: folders of runs or saved models. out: the file to write, which is also returned; an existing one is replaced.
    new_tokens: largest number of tokens to generate. temperature: 0 chooses the most probable token; otherwise tokens
    are sampled. seed: seed of the sampling. Raises ValueError, with a message of one line, for values that are not
    allowed and for a model that cannot serve the request, and ValueError or FileNotFoundError for a folder without a
    model or a tokenizer.
    """
    request = Request(
        prompt=prompt, models=list(range(len(runs))), new_tokens=new_tokens, temperature=temperature, seed=seed
    )
    request.check(len(runs))
    models = open_models(runs)
    write_whole(out, page_of(models, request, list(events(models, request))))
    return out


def page_of(models: Sequence[LiveModel], request: Request, told: Sequence[PlainDict]) -> str:
    """Return the HTML of a page that shows a request and its result.

    models: all loaded models. request: the prompt and the options of generation. told: all events of the request, in
    order.
    """
    state = {
        "request": {**vars(request), "budgets": request.budgets or [None] * len(request.models)},
        "events": told,
        "models": [model.describe() for model in models],
        "neurons": [model.neurons() if model.describe()["neurons"] else None for model in models],
        "saved": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    plain = json.dumps(state, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return empty_page().replace(EMPTY, f">{plain.replace('<', chr(92) + 'u003c')}</script>")


def _read(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")
