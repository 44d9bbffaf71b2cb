"""Libraries that skip blocks, side by side on one small Llama and one small Qwen3: what runs, and what it executes.

    python tools/compare_libraries.py              # installs the libraries into build/libraries, prints the table
    python tools/compare_libraries.py --write      # and writes it into docs/ecosystem.md

Every library is installed without dependencies into a folder of its own and runs in a process of its own, on this
environment's torch and transformers; `mixture-of-depth` also on the transformers that it was written for. All models
have the same random weights, and each library skips by its own untrained routers, at about half of the tokens in every
second block where it lets one say so. FLOPs are those of every product that ran, by torch's counter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, BEGIN, END = ROOT / "docs" / "ecosystem.md", "<!-- libraries:begin -->\n", "<!-- libraries:end -->\n"
OLD = (
    "transformers==4.42.4", "tokenizers==0.19.1", "huggingface-hub==0.36.2", "requests==2.32.5", "urllib3==2.5.0",
    "idna==3.10", "certifi==2025.8.3", "charset-normalizer==3.4.3",
    "numpy==1.26.4",
)  # fmt: skip
# name in the table: (what is installed, whether it needs the old transformers)
LIBRARIES: dict[str, tuple[str | None, bool]] = {
    "skipstone.route": (None, False),
    "skipstone, converted": (None, False),
    "economize 0.3.2, `mod`": ("economize==0.3.2", False),
    "tide-inference 0.2.1": ("tide-inference==0.2.1", False),
    "mixture-of-depth 1.2.0": ("mixture-of-depth==1.2.0", False),
    "mixture-of-depth 1.2.0, transformers 4.42": ("mixture-of-depth==1.2.0", True),
}
MODELS = ("Llama", "Qwen3")
PROMPT, NEW, TURNS = 128, 32, 5
SHARE = 0.5


@dataclass
class Row:
    """What was measured of one library on one model; None and False where nothing ran.

    error: the first exception, as text. runs: whether a pass gives finite logits. generates: whether a text has the
    wanted length. causal: whether logits are independent of later tokens. continues: whether a text is the same if it
    is generated in two halves. prompt_flops, text_flops: FLOPs of a pass over the prompt and of generating a text,
    relative to the plain model's. prompt_speed, text_speed: how many times as fast as the plain model these are.
    """

    error: str | None = None
    runs: bool = False
    generates: bool = False
    causal: bool | None = None
    continues: bool | None = None
    prompt_flops: float | None = None
    text_flops: float | None = None
    prompt_speed: float | None = None
    text_speed: float | None = None


# --- in a process of its own


def plain(name: str) -> Any:
    """Return a small random model of the family `name` ("Llama" or "Qwen3") as transformers builds it."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 1408, "max_position_embeddings": 512, "initializer_range": 0.06,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if name == "Qwen3":
        sizes["head_dim"] = 64
    config = getattr(transformers, f"{name}Config")(**sizes)
    config.architectures = [f"{name}ForCausalLM"]
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


Text = Callable[[Any, int], Any]  # ids and a number of new tokens to the ids of the whole text


def greedy(model: Any) -> Text:
    """Return a function that continues token ids greedily by the model's `generate`, by a given number of tokens."""

    def text(ids: Any, new: int) -> Any:
        every = ids.new_ones(ids.shape)
        return model.generate(ids, attention_mask=every, max_new_tokens=new, do_sample=False, pad_token_id=0)

    return text


def routed_in_place(model: Any) -> tuple[Any, Text]:
    import torch

    import skipstone

    torch.manual_seed(0)
    skipstone.route(model, [mixture()])
    return model, greedy(model)


def mixture() -> dict[str, Any]:
    """Return a `mechanisms` entry of Mixture-of-Depths whose random routers keep about half of the tokens.

    Their scores depend on the direction of the residual stream alone (`router_norm`).
    """
    return {
        "name": "mixture_of_depths", "layers": "1::2", "decision": "threshold", "weight": "sigmoid",
        "router_norm": True, "capacity": SHARE, "kv": "full",
    }  # fmt: skip


def converted(model: Any) -> tuple[Any, Text]:
    """Return our model with the weights of `model`, and the function that generates text with it.

    Its routers are those that `skipstone.route` adds to the same model in place, so that both skip the same tokens.
    """
    import torch

    from skipstone import SkipstoneConfig, SkipstoneForCausalLM, route
    from skipstone.model.pretrained import load_pretrained

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        dense = load_pretrained(folder)
    ours = SkipstoneForCausalLM(SkipstoneConfig(**{**dense.config.to_dict(), "mechanisms": [mixture()]})).eval()
    ours.load_state_dict(dense.state_dict(), strict=False)
    torch.manual_seed(0)
    route(model, [mixture()])
    routers = {name: value for name, value in model.state_dict().items() if ".mechanisms." in name}
    ours.load_state_dict(routers, strict=False)
    ours.generation_config = dense.generation_config
    return ours, greedy(ours)


def by_economize(model: Any) -> tuple[Any, Text]:
    import economize
    import torch
    from economize.techniques.dynamic_depth import MoDConfig

    torch.manual_seed(0)
    wrapped = economize.apply(model, MoDConfig(router_bias=0.0, router_init_std=1.0, router_input="rms"))
    return wrapped, greedy(wrapped)


def by_tide(model: Any) -> tuple[Any, Text]:
    import TIDE
    import torch
    from TIDE.config import TIDEConfig
    from TIDE.router import RouterCheckpoint, TokenRouter

    torch.manual_seed(0)
    width, layers = model.config.hidden_size, range(1, model.config.num_hidden_layers, 2)
    routers = {layer: TokenRouter(width, 128) for layer in layers}
    with tempfile.TemporaryDirectory() as folder:
        RouterCheckpoint(routers=routers, hidden_dim=width, bottleneck_dim=128).save(f"{folder}/router.pt")
        engine = TIDE.TIDE(model, f"{folder}/router.pt", config=TIDEConfig(exit_threshold=SHARE, min_layers=0))
    return engine, lambda ids, new: engine.generate(ids, max_new_tokens=new, temperature=0)


def by_mixture_of_depth(model: Any) -> tuple[Any, Text]:
    import torch
    from MoD import apply_mod_to_hf

    torch.manual_seed(0)
    model = apply_mod_to_hf(model).eval()
    return model, greedy(model)


MAKERS: dict[str, Callable[[Any], tuple[Any, Text]]] = {
    "skipstone.route": routed_in_place,
    "skipstone, converted": converted,
    "economize 0.3.2, `mod`": by_economize,
    "tide-inference 0.2.1": by_tide,
    "mixture-of-depth 1.2.0": by_mixture_of_depth,
    "mixture-of-depth 1.2.0, transformers 4.42": by_mixture_of_depth,
}


def measured(library: str, name: str) -> Row:
    """Measure one library on one model, until something fails, which becomes the row's error.

    library: a key of `MAKERS`. name: the family of the model.
    """
    import torch

    torch.set_num_threads(1)
    row = Row()
    ids = torch.randint(3, 512, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    try:
        base = plain(name)
        model, text = MAKERS[library](plain(name))
        with torch.no_grad():
            _passes(row, base, model, ids)
            _texts(row, base, text, ids)
    except Exception as error:  # whatever it is, it is the finding
        said = (str(error).splitlines() or [""])[0].partition(" (/")[0]  # without the paths of this machine
        row.error = f"{type(error).__name__}: {said}"[:120]
    return row


def _logits(out: Any) -> Any:
    return getattr(out, "logits", out)


def _passes(row: Row, base: Any, model: Any, ids: Any) -> None:
    import torch

    first = _logits(model(ids))
    row.runs = bool(torch.isfinite(first).all())
    changed = 0
    for token in range(3, 19):
        other = torch.cat((ids[:, :-1], torch.tensor([[token]])), dim=1)
        changed += not torch.allclose(_logits(model(other))[:, :-1], first[:, :-1], atol=1e-3)
    row.causal = changed == 0
    row.prompt_flops = flops(lambda: model(ids)) / flops(lambda: base(ids))
    row.prompt_speed = speed(lambda: base(ids), lambda: model(ids))


def _texts(row: Row, base: Any, text: Text, ids: Any) -> None:
    import torch

    whole = text(ids, NEW)
    row.generates = whole.shape == (1, PROMPT + NEW)
    half = text(whole[:, : PROMPT + NEW // 2], NEW - NEW // 2)
    row.continues = torch.equal(half, whole)
    written = greedy(base)
    row.text_flops = flops(lambda: text(ids, NEW)) / flops(lambda: written(ids, NEW))
    row.text_speed = speed(lambda: written(ids, NEW), lambda: text(ids, NEW))


def flops(run: Callable[[], Any]) -> int:
    """Return the FLOPs of all matrix products and of fused attention that run in `run`.

    torch's own counter does not know fused attention on a CPU.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        rows, heads, queries, width = query
        return int(2 * rows * heads * queries * key[-2] * (width + value[-1]))

    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    with counter:
        run()
    return counter.get_total_flops()


def speed(base: Callable[[], Any], other: Callable[[], Any]) -> float:
    """Return how many times as fast as `base` the function `other` is: the median of their ratios over turns."""
    ratios = []
    for _ in range(TURNS):
        seconds = []
        for run in (base, other):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


# --- the table


def install(what: tuple[str, ...], folder: Path) -> None:
    """Install packages into a folder without their dependencies, unless that was done before.

    what: their names for pip.
    """
    done = folder / "installed"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *what]
        subprocess.run(command, check=True)
        done.touch()


def run(library: str, name: str, folder: Path) -> Row:
    """Measure one library on one model in a process that can import this library alone.

    library: a key of `LIBRARIES`. name: the family of the model. folder: where libraries are installed.
    """
    package, old = LIBRARIES[library]
    paths = [ROOT / "src"] if package is None else [folder / package]
    if package is not None:
        install((package,), folder / package)
    if old:
        install(OLD, folder / "old")
        paths.append(folder / "old")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--row", library, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return Row(error=done.stderr.strip().splitlines()[-1][:120])
    return Row(**json.loads(done.stdout.splitlines()[-1]))


HEADINGS = (
    "library", "model", "generates", "causal", "goes on from its own text", "FLOPs of a prompt", "FLOPs of a text",
    "speed of a prompt", "speed of a text",
)  # fmt: skip


def table(rows: dict[tuple[str, str], Row]) -> str:
    """Return the Markdown table of all rows, by library and model."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|---|---|---|---:|---:|---:|---:|"]
    for (library, name), row in rows.items():
        figures = [_figure(x) for x in (row.prompt_flops, row.text_flops, row.prompt_speed, row.text_speed)]
        said = [_said(row.generates), _said(row.causal), _said(row.continues)]
        if row.error is not None:
            said[0] = f"no: `{row.error}`"
        lines.append("| " + " | ".join([library, name, *said, *figures]) + " |")
    return "\n".join(lines) + "\n"


def _said(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "no"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def versions() -> str:
    """Return the line below the table: versions, machine, lengths of texts, and how speeds were measured."""
    import torch
    import transformers

    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, fp32, one thread, {os.uname().machine}; "
        f"prompts of {PROMPT} tokens, {NEW} new ones; speeds are medians of {TURNS} turns.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="write the table into docs/ecosystem.md")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "libraries", help="where libraries go")
    parser.add_argument("--row", nargs=2, metavar=("LIBRARY", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(asdict(measured(*options.row))))
        return
    rows = {(library, name): run(library, name, options.folder) for library in LIBRARIES for name in MODELS}
    text = table(rows) + "\n" + versions()
    print(text)
    if options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(before + BEGIN + text + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
