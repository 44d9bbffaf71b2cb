"""What `fuzz.py` feeds: readers of recipes, configurations, manifests, records, tokenizers, weights, prompts, pages."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from fuzz import Tags, Target
from skipstone import SkipstoneConfig
from skipstone.adapt import adapt_recipe
from skipstone.budget.budget_table import BudgetTable
from skipstone.core import checksums, sealed, strict
from skipstone.core.plain_text import check_yaml
from skipstone.data import shards, users
from skipstone.data.sharding import write_shards
from skipstone.data.tokenizers import byte_tokenizer, load_saved
from skipstone.generate.text_generation import encode
from skipstone.in_place.saved import read_mechanisms
from skipstone.model.pretrained import load_model
from skipstone.report.rendering import write_report
from skipstone.runs import Run, read_metrics
from skipstone.train import recipe as recipes
from skipstone.view.live_session import read_request
from skipstone_cli.overrides import load_recipe, split
from skipstone_studies import record
from skipstone_studies.isoflop.spec import make_spec
from train.tool import MODELS, recipe, text_file

torch.set_num_threads(1)
SHARES = {  # of the inputs that the fastest target gets: each gets a few seconds of a run of a million
    "recipe": 0.025,
    "recipe with its model": 0.003,
    "adapt recipe": 0.012,
    "isoflop recipe": 0.2,
    "YAML of aliases": 0.03,
    "recipe as YAML": 0.0005,
    "override, split": 1.0,
    "override, applied": 0.0005,
    "files.json": 0.13,
    "files.json as text": 0.16,
    "manifest of shards": 0.012,
    "budget table": 0.012,
    "record of a study": 0.03,
    "metrics.jsonl": 0.2,
    "sealed JSON": 0.5,
    "sealed line": 0.5,
    "mechanisms in place": 0.13,
    "request of the live page": 0.07,
    "corpus of JSON lines": 0.28,
    "run: config.yaml": 0.002,
    "run: environment.json": 0.1,
    "tokenizer.json": 0.0005,
    "prompt": 0.03,
    "name on the report": 0.00016,
    "model configuration": 0.004,
    "config.json of a saved model": 0.0003,
    "header of safetensors": 0.0003,
    "bytes of safetensors": 0.0003,
    "index of safetensors": 0.0003,
}


def targets(folder: Path) -> list[Target]:
    """Return all targets of `fuzz.py`, which write the files that they read into `folder`."""
    found = [*recipe_targets(folder), *json_targets(folder), *folder_targets(folder), *model_targets(folder)]
    for target in found:
        target.share = SHARES[target.name]
    return found


def file_of(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[Any], object]:
    """Return a function that writes its input to a file (plain values as JSON), and reads this file by `read`."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)

    def use(value: Any) -> object:
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return read(path)

    return use


def recipe_targets(folder: Path) -> list[Target]:
    given = [recipe(folder, model, seed=1, no_decay=["norms"]) for model in MODELS.values()]
    adapts = [
        {
            "model": {"mechanisms": model.get("mechanisms", [])},
            "data": one["data"],
            "train": one["train"],
            "adapt": {"budget": 0.7, "loss": {"distillation": 1.0}},
        }
        for model, one in zip(MODELS.values(), given, strict=True)
    ]
    texts = [yaml.safe_dump(one) for one in given]
    grids = [{**one, "name": "tiny", "arms": {"dense": {"mechanisms": []}, "own": {}}} for one in given]

    def words(text: str) -> object:
        key, value = split(text)
        return key, value

    def overridden(text: str) -> object:
        (folder / "base.yaml").write_text(texts[0])
        return load_recipe(folder / "base.yaml", [text])

    def grid(values: Any) -> object:
        return make_spec(values) if isinstance(values, dict) else strict.from_dict(recipes.Recipe, values)

    def made(values: Any) -> object:
        parsed = recipes.read_recipe(values)
        return SkipstoneConfig.from_plain({key: value for key, value in parsed.model.items() if key != "preset"})

    said = [
        "train.steps=3",
        "model.mechanisms.0.capacity=0.5",
        "data.corpus=text:x",
        "train.no_decay=[norms]",
        "name=a",
    ]
    return [
        Target("recipe", given, recipes.read_recipe),
        Target("recipe with its model", given, made),
        Target("adapt recipe", adapts, adapt_recipe.read_recipe),
        Target("isoflop recipe", grids, grid),
        Target("YAML of aliases", ["a: &a [1, 2]\nb: &b [*a, *a]\nc: [*b, *b]\n", *texts[:2]], check_yaml),
        Target("recipe as YAML", texts, file_of(folder, "r.yaml", lambda path: load_recipe(path, []))),
        Target("override, split", said, words),
        Target("override, applied", said, overridden),
    ]


def json_targets(folder: Path) -> list[Target]:
    line = {"step": 1, "split": "train", "loss": 0.5}
    lines = "\n".join((sealed.sealed_line(line), json.dumps(line), "")) * 2
    asked = {
        "prompt": "a",
        "models": [0],
        "new_tokens": 4,
        "temperature": 0.5,
        "seed": 1,
        "budgets": [None],
        "twin": True,
    }
    texts = [b'{"text": "a"}\n{"text": "b"}\n', b'{"text": "\xc3\xa9"}']
    entries = {"version": 1, "mechanisms": [{"name": "x"}]}

    def unsealed(value: Any) -> object:
        return sealed.unsealed(value, folder / "x") if isinstance(value, dict) else None

    def unsealed_line(value: Any) -> object:
        return sealed.unsealed_line(value) if isinstance(value, dict) else None

    def routing(path: Path) -> object:
        return read_mechanisms(path.parent)

    def documents(path: Path) -> object:
        return list(users.read_jsonl(path))

    return [
        *table_targets(folder),
        Target("metrics.jsonl", [lines], file_of(folder, "metrics.jsonl", read_metrics)),
        Target("sealed JSON", [sealed.sealed({"a": 1, "b": [0.5]})], unsealed),
        Target("sealed line", [json.loads(sealed.sealed_line(line))], unsealed_line),
        Target("mechanisms in place", [entries], file_of(folder, "in_place/skipstone_routing.json", routing)),
        Target("request of the live page", [asked], lambda value: read_request(value, 2)),
        Target("corpus of JSON lines", texts, file_of(folder, "corpus.jsonl", documents)),
    ]


def table_targets(folder: Path) -> list[Target]:
    """Return targets that read files of hashes, manifests, budget tables and records."""
    (folder / "sums").mkdir()
    (folder / "sums" / "a.json").write_text("{}")
    checksums.record(folder / "sums")
    sums = json.loads((folder / "sums" / "files.json").read_text())
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} words"}) + "\n" for i in range(40)))
    write_shards(
        f"jsonl:{folder / 'texts.jsonl'}", folder / "shards", tokenizer="byte", split="80-20", shard_tokens=200
    )
    manifest = json.loads((folder / "shards" / "manifest.json").read_text())
    points = [{"share": share, "thresholds": [share], "kept": [share]} for share in (0.63, 0.64, 0.65, 0.66)]
    budget = {"handles": ["0.mod"], "trained": [[0.1]], "tokens": 8, "rows": 2, "text": "t", "points": points}
    known: dict[str, Any] = {"config": {}, "environment": {}, "figures": {"loss": 1.0}, "sitting": None}
    one = {**known, "experiment": "t", "scale": "laptop", "arm": "a", "seed": 0, "digest": "0", "command": "c"}

    def checked(path: Path) -> object:
        return checksums.check(path.parent)

    def opened(path: Path) -> object:
        found = shards.open_shards(path.parent)
        return [len(found.encoded(split).ids) for split in found.manifest.splits]

    def budgets(path: Path) -> object:
        return BudgetTable.load(path.parent).thresholds(0.65)

    sums_file = file_of(folder, "sums/files.json", checked)
    return [
        Target("files.json", [sums], sums_file),
        Target("files.json as text", [json.dumps(sums)], sums_file),
        Target("manifest of shards", [manifest], file_of(folder, "shards/manifest.json", opened)),
        Target("budget table", [budget], file_of(folder, "budget/budget.json", budgets)),
        Target("record of a study", [one], file_of(folder, "record.json", record.read)),
    ]


def folder_targets(folder: Path) -> list[Target]:
    """Return targets that read run folders, tokenizers and prompts."""
    run = folder / "run"
    run.mkdir()
    values = recipe(folder, MODELS["topk"])
    config = sealed.sealed_text(yaml.safe_dump(values))
    (run / "config.yaml").write_text(config)
    saved = folder / "tokenizer"
    byte_tokenizer().save_pretrained(saved)
    tokenizer, known = byte_tokenizer(), (saved / "tokenizer.json").read_text()

    def configured(path: Path) -> object:
        return Run(path.parent).config()

    def prompted(text: str) -> object:
        return encode(tokenizer, text)

    prompts = ["It was the best of times", "<eos> <pad> é 你好 \u202e", "\n\n" * 9]
    return [
        Target("run: config.yaml", [config, yaml.safe_dump(values)], file_of(folder, "run/config.yaml", configured)),
        Target(
            "run: environment.json",
            [sealed.sealed({"seed": 0})],
            file_of(folder, "run/environment.json", lambda path: Run(path.parent).environment()),
        ),
        Target("tokenizer.json", [known], file_of(folder, "tokenizer/tokenizer.json", lambda p: load_saved(p.parent))),
        Target("prompt", prompts, prompted),
        Target("name on the report", ["run", "<script>alert(1)</script>", "'\"><img src=x onerror=y>"], pages(folder)),
    ]


def pages(folder: Path) -> Callable[[Any], object]:
    """Return a function that writes a report of a run with a given name, and checks that the name adds no HTML."""
    run = folder / "shown"
    run.mkdir()
    text_file(folder)
    (run / "config.yaml").write_text(yaml.safe_dump(recipe(folder, MODELS["topk"])))
    for name, content in {"environment.json": "{}", "result.json": "{}", "metrics.jsonl": ""}.items():
        (run / name).write_text(content)
    known: list[Any] = []

    def write(text: str) -> object:
        out = write_report([run], folder / "report.html", names=[text], replace=True)
        tags = Tags()
        tags.feed(out.read_text(encoding="utf-8"))
        if not known:
            known.extend(tags.found)
        assert tags.found == known, f"a name has changed the page's elements: {set(tags.found) ^ set(known)}"
        return None

    return write


def model_targets(folder: Path) -> list[Target]:
    """Return targets that read configurations of saved models, and safetensors files with their headers."""
    from skipstone import SkipstoneForCausalLM

    plain = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 5,
        "intermediate_size": 8,
    }
    home = folder / "model"
    SkipstoneForCausalLM(SkipstoneConfig.from_plain(plain)).save_pretrained(home)
    config, weights = json.loads((home / "config.json").read_text()), (home / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", weights[:8])[0]
    header, data = json.loads(weights[8 : 8 + size]), weights[8 + size :]

    def with_config(value: Any) -> object:
        (home / "model.safetensors").write_bytes(weights)
        (home / "config.json").write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
        return load_model(home)

    def with_header(value: Any) -> object:
        (home / "config.json").write_text(json.dumps(config))
        text = json.dumps(value).encode()
        (home / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        return load_model(home)

    def with_weights(value: bytes) -> object:
        (home / "config.json").write_text(json.dumps(config))
        (home / "model.safetensors").write_bytes(value)
        return load_model(home)

    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model.safetensors"}}

    def with_index(value: Any) -> object:
        (home / "config.json").write_text(json.dumps(config))
        (home / "model.safetensors").write_bytes(weights)
        path = home / "model.safetensors.index.json"
        path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
        try:
            return load_model(home)
        finally:
            path.unlink()

    return [
        Target("model configuration", [plain, *MODELS.values()], _configured),
        Target("config.json of a saved model", [config], with_config),
        Target("header of safetensors", [header], with_header),
        Target("bytes of safetensors", [weights], with_weights),
        Target("index of safetensors", [index], with_index),
    ]


def _configured(value: Any) -> object:
    if not isinstance(value, dict):
        return strict.from_dict(recipes.Recipe, value)
    return SkipstoneConfig.from_plain(value)
