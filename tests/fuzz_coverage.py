"""Hostile input to the parsers, guided by coverage: atheris (pip install atheris) keeps what reaches new code.

    python tests/fuzz_coverage.py --runs 100000                    # every parser, one after another, with a table
    python tests/fuzz_coverage.py --runs 20000 recipe prompt=5000  # some, and one of them with another number

Each parser is fed in a fork of its own; the modules of Skipstone and OmegaConf are instrumented. Its seeds are
those of `fuzz_targets.py`; plain values are changed as `fuzz.py` changes them, texts and bytes as libFuzzer does. What
counts as a fault is the same as there; a hang or an exit ends the process, and its input is kept and named.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from attacks import memory, parser_of
from forks import awaited, fork

INSTRUMENTED = ["skipstone", "skipstone_cli", "skipstone_studies", "omegaconf"]
LONGEST, HANG = 8192, 60  # bytes of an input; seconds after which libFuzzer ends the process
# Readers of files and texts: what load_model and the like do behind them is the libraries' work, and takes long.
PARSERS = (
    "recipe",
    "adapt recipe",
    "isoflop recipe",
    "override, split",
    "override, applied",
    "YAML of aliases",
    "fields of a configuration",
    "model configuration",
    "header of safetensors, checked",
    "header of safetensors, values",
    "index of safetensors, checked",
    "generation_config.json",
    "files.json",
    "manifest of shards",
    "budget table",
    "record of a study",
    "metrics.jsonl",
    "sealed JSON",
    "mechanisms in place",
    "request of the live page",
    "corpus of JSON lines",
    "run: config.yaml",
    "run: environment.json",
    "tokenizer.json, small",
    "prompt",
)


def instrumented() -> None:
    """Import the modules that are fed, so instrumented that atheris sees which branches run."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        import fuzz_targets  # noqa: F401


def all_targets(folder: Path) -> list[Any]:
    """Return the targets of `fuzz_targets.py`, and those of `parts`."""
    from fuzz_targets import targets

    return [*targets(folder), *parts(folder)]


def parts(folder: Path) -> list[Any]:
    """Return targets for parsers that other targets reach only after seconds of work."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from fuzz import Target
    from fuzz_targets import file_of
    from skipstone.data.tokenizers import load_saved
    from skipstone.model.source_folder import check_folder
    from skipstone.model.weight_files import check_weight_files, weight_files
    from skipstone.train.setup import model_mistakes
    from train.tool import MODELS

    header = {"w.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}
    header |= {"b.bias": {"dtype": "BF16", "shape": [2], "data_offsets": [16, 20]}}
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text + bytes(20)
    small = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    small.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    index = {"metadata": {}, "weight_map": {"w": "a.safetensors"}}

    def fields(values: Any) -> object:
        return model_mistakes({"model": values})

    def with_header(value: Any) -> object:
        told = json.dumps(value).encode()
        (folder / "values").mkdir(exist_ok=True)
        (folder / "values" / "model.safetensors").write_bytes(struct.pack("<Q", len(told)) + told + bytes(20))
        return check_weight_files(folder / "values", quantised=False)

    def numbers(home: Path) -> object:
        return check_weight_files(home, quantised=False)

    def at(name: str, read: Callable[[Path], object]) -> Callable[[Any], object]:
        return file_of(folder, name, lambda path: read(path.parent))

    return [
        Target("fields of a configuration", [*MODELS.values()], fields),
        Target("header of safetensors, values", [header], with_header),
        Target("header of safetensors, checked", [weights], at("numbers/model.safetensors", numbers)),
        Target("index of safetensors, checked", [index], at("index/model.safetensors.index.json", weight_files)),
        Target("generation_config.json", [ends], at("ends/generation_config.json", check_folder)),
        Target("tokenizer.json, small", [json.loads(small.to_str())], at("small/tokenizer.json", load_saved)),
    ]


def feed(name: str, runs: int, folder: Path, told: Path, seed: int) -> None:
    """Feed one parser `runs` inputs by libFuzzer, which ends this process.

    name: the target. folder: for its files. told: a file to which counts and faults are written as it goes. seed: that
    of libFuzzer.
    """
    import atheris

    from fuzz import fed, mebibytes, mutated

    target = next(one for one in all_targets(folder) if one.name == name)
    raws = [one if isinstance(one, bytes) else _text(one).encode("utf-8", "surrogatepass") for one in target.seeds]
    plain = not isinstance(target.seeds[0], str | bytes)
    before, done = mebibytes(), 0

    def one(raw: bytes) -> None:
        nonlocal done
        done += 1
        if plain:
            try:
                fed(target, json.loads(raw))
            except (ValueError, RecursionError):
                target.counts["no JSON"] += 1
        else:
            fed(target, raw if isinstance(target.seeds[0], bytes) else raw.decode("utf-8", "replace"))
        if done % 500 == 0 or done >= runs or target.faults:
            grown = round(mebibytes() - before)
            found = {"done": done, "counts": dict(target.counts), "faults": target.faults[:20], "MiB": grown}
            told.write_text(json.dumps(found))

    def mutate(raw: bytes, longest: int, chance: int) -> bytes:
        draw = random.Random(chance)
        if plain and draw.random() < 0.9:
            try:
                return json.dumps(mutated(json.loads(raw), draw)).encode()[:longest]
            except (ValueError, RecursionError):
                pass
        return bytes(atheris.Mutate(raw, longest))

    corpus = folder / "corpus"
    corpus.mkdir()
    for i, raw in enumerate(raws):
        (corpus / str(i)).write_bytes(raw)
    options = [f"-runs={runs}", f"-max_len={LONGEST}", f"-timeout={HANG}", "-rss_limit_mb=0", "-len_control=0"]
    options += [f"-seed={seed + 1}", f"-artifact_prefix={told}.", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def fuzz(name: str, runs: int, seed: int = 0) -> dict[str, Any]:
    """Feed one parser in a fork, and return its counts and faults.

    Under `covered`, the result has the number of branches that libFuzzer had reached first and last.
    """
    with tempfile.TemporaryDirectory(prefix="skipstone-fuzz-", dir=memory()) as folder:
        told, log, space = (Path(folder) / part for part in ("told.json", "log", "space"))
        space.mkdir()
        code = awaited(fork(lambda: feed(name, runs, space, told, seed), log))
        said = log.read_text(errors="replace")
        found = json.loads(told.read_text()) if told.is_file() else {"done": 0, "counts": {}, "faults": [], "MiB": 0}
        covered = [int(line.split("cov: ")[1].split()[0]) for line in said.splitlines() if "cov: " in line]
        if code or found["done"] < runs:
            kept = [path.read_bytes()[:300] for path in Path(folder).glob("told.json.*")]
            found["faults"].append(f"the process ended with {code}: {said[-1500:]} {kept}")
        return {**found, "covered": (covered[0], covered[-1]) if covered else (0, 0)}


def row(name: str, found: dict[str, Any]) -> str:
    """Return the row of the table for the parser `name`; found: the result of `fuzz`."""
    counts, (first, last) = found["counts"], found["covered"]
    cells = [f"{counts.get(end, 0):,}" for end in ("taken", "refused", "no JSON", "traceback", "slow")]
    return f"| {name} | {found['done']:,} | {' | '.join(cells)} | {found['MiB']} | {first:,} to {last:,} |"


HEAD = (
    "| parser | inputs | taken | refused | no JSON | traceback | slow | grew by MiB | branches reached |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", metavar="PARSER", help=f"of {', '.join(PARSERS)}; all")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    if importlib.util.find_spec("atheris") is None:
        sys.stdout.write("nothing was tried: atheris is not installed (pip install atheris)\n")
        return 0
    warnings.simplefilter("ignore")
    instrumented()
    faults, total = 0, 0
    sys.stdout.write(HEAD + "\n")
    for given in options.names or PARSERS:
        name, _, runs = given.partition("=")
        found = fuzz(name, int(runs or options.runs), options.seed)
        sys.stdout.write("\n".join([row(name, found), *(f"    {fault}" for fault in found["faults"][:3])]) + "\n")
        sys.stdout.flush()
        faults, total = faults + len(found["faults"]), total + found["done"]
    sys.stdout.write(f"| **all** | {total:,} | | | | | | | |\n")
    return faults


if __name__ == "__main__":
    sys.exit(min(main(), 100))
