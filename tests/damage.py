"""Damage every file that a verb reads, use it as the verb does, and see that no damage gives a wrong result in silence.

    python tests/damage.py --times 12           # each file 12 times in each of six ways
    python tests/damage.py --times 2 --quiet    # only what went wrong

The ways: one bit flipped, cut, emptied, half zeros, longer, gone. An end is *named* (an error in one line that names
the file or its folder), *harmless* (the same result as from the whole file), *line* (an error that names neither),
*wrong* (another result without a word) or *traceback*. Sources of other people's making have no hashes, so what flips
in their numbers cannot be known; they stand in a table row of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from attacks import markdown, parser_of

WAYS = ("flip", "cut", "empty", "zeros", "longer", "gone")
ENDS = ("named", "harmless", "line", "wrong", "traceback")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Files of one kind, and a function that reads them as a verb of the command line does.

    kind: name of the kind. verbs: the verbs that read such files. files: the files. use: returns all that a verb's
    result depends on. foreign: whether the files are other people's, which have no hashes.
    """

    kind: str
    verbs: str
    files: Sequence[Path]
    use: Callable[[], object]
    foreign: bool = False


def damage(path: Path, way: str, chance: random.Random) -> bool:
    """Damage a file in one way, and return whether its content differs from what it was.

    way: one of `WAYS`. chance: the source of random numbers.
    """
    whole = path.read_bytes()
    place = chance.randrange(len(whole))
    if way == "gone":
        path.unlink()
        return True
    damaged = {
        "flip": whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :],
        "cut": whole[:place],
        "empty": b"",
        "zeros": whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
        "longer": whole + bytes(chance.randrange(1, 9)),
    }
    path.write_bytes(damaged[way])
    return damaged[way] != whole


def judged(case: Case, path: Path, whole: object) -> tuple[str, str]:
    """Use a case whose file `path` is damaged, and return how that ended (one of `ENDS`) and the message.

    whole: the result with intact files.
    """
    try:
        found = case.use()
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        around = [path.name, *(str(parent) for parent in list(path.parents)[:2])]
        return ("named" if any(name in line for name in around) else "line"), line
    except Exception:
        return "traceback", traceback.format_exc(limit=-3)
    return ("harmless" if found == whole else "wrong"), "another result"


def attack(case: Case, times: int, chance: random.Random) -> tuple[Counter[str], list[str]]:
    """Damage each file of a case `times` times in each way, one file at a time.

    Files are restored afterwards. Returns how often each end came, and a line for each bad end.
    """
    found, told, whole = Counter[str](), [], case.use()
    for path in case.files:
        intact = path.read_bytes()
        if not intact:
            continue
        for way in WAYS * times:
            if damage(path, way, chance):
                end, said = judged(case, path, whole)
                found[end] += 1
                if end in ("line", "wrong", "traceback"):
                    told.append(f"{case.kind}, {path.name}, {way}: {end}: {said}")
            path.write_bytes(intact)
    assert case.use() == whole, f"{case.kind}: the files are whole again, the result is not"
    return found, told


# --- what is damaged


def model_state(model: Any) -> str:
    """Return a hash of a model's weights, configuration and generation settings."""
    digest = hashlib.sha256(repr(sorted(model.config.to_dict().items(), key=str)).encode())
    digest.update(repr(sorted(model.generation_config.to_dict().items(), key=str)).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokens_of(tokenizer: Any) -> object:
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id]
    return None if tokenizer is None else (tokenizer("it was the best, 17 times")["input_ids"], ids, len(tokenizer))


def files_of(folder: Path, *suffixes: str) -> list[Path]:
    """Return the files of a folder, without model cards and Python files, which no verb reads.

    suffixes: only files with one of these; none means all.
    """
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in (".md", ".py"))
    return [path for path in found if not suffixes or path.suffix in suffixes]


def make(folder: Path) -> list[Case]:
    """Write a tiny example of every kind of file that verbs read below `folder`, and return the cases."""
    from adapt import sources
    from kill_scenarios import recipe
    from skipstone.adapt.export_quantised import export_quantised
    from skipstone.adapt.self_generated import write
    from skipstone.data.sharding import write_shards
    from skipstone.evaluate.budget_curve import calibrate_run
    from skipstone.model.pretrained import convert
    from skipstone.train.training import train
    from train.tool import text_file

    text_file(folder)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} {'x' * (i % 9)}"}) + "\n" for i in range(60)))
    sources.save_source(folder / "source")
    given = recipe(folder)
    given["train"] = {**given["train"], "keep_best": True, "eval_every": 2}
    run = train(given, out=folder / "run", progress=False)
    calibrate_run(run, corpus=f"text:{folder / 'text.txt'}", context=16, rows=2)
    sharded = {**given["train"], "keep_best": False, "parallel": "fsdp2"}
    train({**given, "train": sharded}, out=folder / "sharded", progress=False)
    convert(str(folder / "source"), folder / "ours")
    export_quantised(str(folder / "source"), folder / "int8")
    write(str(folder / "source"), folder / "written", tokens=60, length=12, batch=4, start="the")
    write_shards(
        f"jsonl:{folder / 'texts.jsonl'}", folder / "shards", tokenizer="byte", split="80-20", shard_tokens=150
    )
    cases = [*run_cases(run), *model_cases(folder), *data_cases(folder), *record_cases(folder)]
    return [*cases, *newer_cases(folder)]


def run_cases(run: Path) -> list[Case]:
    from skipstone.budget.budget_table import BudgetTable
    from skipstone.runs import Run
    from skipstone.train import checkpoints

    def summary() -> object:
        one = Run(run)
        return one.config(), one.environment(), one.metrics(), one.result(), one.best()

    def table() -> object:
        return BudgetTable.load(Run(run).model_folder())

    names = ("config.yaml", "environment.json", "metrics.jsonl", "result.json", "best/best.json")
    [*_, last] = sorted((run / "checkpoints").iterdir())
    view = Run(run).kept_view()

    def shown() -> object:
        found = Run(run).kept_view()
        return view if found is None else found  # without one, a report computes it anew

    def resumes() -> object:
        checkpoints.check(last)
        return "as written"

    return [
        Case(
            kind="run: recipe, log, results",
            verbs="eval report compare view",
            files=[run / n for n in names],
            use=summary,
        ),
        Case(
            kind="run: tokenizer",
            verbs="eval generate trace view",
            files=files_of(run / "tokenizer"),
            use=lambda: tokens_of(Run(run).load_tokenizer()),
        ),
        Case(
            kind="run: model",
            verbs="eval generate trace report view",
            files=files_of(run / "model", ".safetensors", ".json"),
            use=lambda: model_state(Run(run).load_model()),
        ),
        Case(kind="run: view", verbs="report", files=[run / "view.json"], use=shown),
        Case(kind="budget table", verbs="generate eval", files=[BudgetTable.find(run / "model") or run], use=table),
        Case(kind="checkpoint", verbs="train adapt", files=files_of(last), use=resumes),
    ]


def model_cases(folder: Path) -> list[Case]:
    from skipstone.model.pretrained import load_pretrained, load_tokenizer

    def loads(source: Path) -> Callable[[], object]:
        return lambda: (model_state(load_pretrained(source)), tokens_of(load_tokenizer(source)))

    verbs = "convert adapt quantise generate"
    return [
        Case(kind="converted model", verbs=verbs, files=files_of(folder / "ours"), use=loads(folder / "ours")),
        Case(kind="int8 model", verbs=verbs, files=files_of(folder / "int8"), use=loads(folder / "int8")),
        Case(
            kind="source of others, without hashes",
            verbs="convert adapt quantise",
            foreign=True,
            files=files_of(folder / "source"),
            use=loads(folder / "source"),
        ),
    ]


def data_cases(folder: Path) -> list[Case]:
    from skipstone.data import fetch, shards, users
    from skipstone.data.fetch import SourceFile, locate

    def opened() -> object:
        found = shards.open_shards(folder / "shards")
        ids = {split: found.encoded(split).ids[:].tolist() for split in found.manifest.splits}
        return ids, tokens_of(found.tokenizer())

    cache = folder / "cache"
    (cache / "kept").mkdir(parents=True)
    (cache / "kept" / "input.txt").write_text("to be or not to be\n" * 50)
    content = (cache / "kept" / "input.txt").read_bytes()
    known = SourceFile(path="kept/input.txt", size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def cached() -> object:
        os.environ["SKIPSTONE_CACHE"] = str(cache)
        return locate(known).read_bytes()

    def own() -> object:
        corpus = users.text(str(folder / "written"))
        return [corpus.documents(split) for split in ("train", "validation")]

    assert fetch
    inside = [path for path in (folder / "shards").rglob("*") if path.is_file()]
    return [
        Case(kind="shards", verbs="train adapt prepare", files=inside, use=opened),
        Case(kind="cache of downloads", verbs="train eval prepare", files=[cache / "kept" / "input.txt"], use=cached),
        Case(kind="text of `write`", verbs="adapt train", files=files_of(folder / "written"), use=own),
    ]


def record_cases(folder: Path) -> list[Case]:
    from skipstone_studies import record

    known = {"config": {"model": {"hidden_size": 16}}, "digest": "00", "environment": {"python": "3"}, "command": "c"}
    made = record.Record(study="tiny", scale="laptop", arm="a", seed=0, figures={"loss": 1.25, "list": [1, 2]}, **known)
    path = record.write(made, folder / "results")
    return [Case(kind="record of a study", verbs="reproduce isoflop", files=[path], use=lambda: record.read(path))]


def newer_cases(folder: Path) -> list[Case]:
    from transformers import AutoModelForCausalLM

    import skipstone
    from skipstone.train import checkpoints

    [*_, last] = sorted((folder / "sharded" / "checkpoints").iterdir())

    def routed(source: Any) -> Any:
        return skipstone.route(AutoModelForCausalLM.from_pretrained(folder / "source"), source)

    def resumes() -> object:
        checkpoints.check(last)
        return "as written"

    entry = {"name": "mixture_of_depths", "layers": "1:", "capacity": 0.5, "decision": "threshold"}
    routed([entry]).save(folder / "in-place")
    shards = [path for path in last.rglob("*") if path.is_file()]

    def in_place() -> object:
        states = [module.state_dict() for _, module in routed(folder / "in-place").modules()]
        return [(name, value.tolist()) for state in states for name, value in state.items()]

    return [
        Case(kind="sharded checkpoint", verbs="train adapt", files=shards, use=resumes),
        Case(kind="mechanisms in place", verbs="route", files=files_of(folder / "in-place"), use=in_place),
    ]


def table(found: dict[str, tuple[Case, Counter[str]]]) -> str:
    """Return a Markdown table of how often each end came, by kind of file.

    found: for each kind, its case and the counts by end.
    """
    rows = [
        [case.kind, case.verbs.replace(" ", ", "), count.total(), *(count[end] for end in ENDS)]
        for case, count in found.values()
    ]
    sums = [sum(row[i] for row in rows) for i in range(2, len(rows[0]))]  # type: ignore[misc]
    head = ["files", "read by", "damaged", "named", "harmless", "line without the name", "wrong", "traceback"]
    return markdown(head, [*rows, ["**all**", "", *sums]], words=2)


def attack_all(folder: Path, times: int) -> tuple[dict[str, tuple[Case, Counter[str]]], list[str]]:
    """Write all kinds of files to `folder` and damage each in each way `times` times.

    Returns for each kind its case and the counts by end, and a line for each bad end of our own files.
    """
    warnings.simplefilter("ignore")
    chance, found, told = random.Random(0), {}, []
    for case in make(folder):
        count, lines = attack(case, times, chance)
        found[case.kind] = (case, count)
        told += [line for line in lines if not case.foreign or ": traceback" in line]
    return found, told


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="skipstone-damage-") as folder:
        found, told = attack_all(Path(folder), options.times)
    sys.stdout.write("\n".join([*told, "" if options.quiet else table(found)]))
    return len(told)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
