"""What a pretrained model of any size loses at several budgets: Mixture-of-Depths, random skipping, fewer blocks.

    python benchmarks/adapt_frontier.py SOURCE TEXT [--dropped 6 11] [--tokens 400000] [--seeds 0] [--out results]

SOURCE is a dense checkpoint that `skipstone adapt` reads, TEXT a folder with train.txt and validation.txt, or a YAML
file whose section `data` is taken, such as a blend of shards. A budget is that of the source without so many of its
blocks. All arms learn from the same rows, from text and source alike (from the source alone: --language-modelling 0),
and are judged as executed, on the first rows of three texts, two of which nobody trains on. Finished runs in --work
are not run again, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import DynamicCache

from adapt_pictures import IN_DECODING, TITLE, TUNED, picture
from publish import closing, keep, middle, surroundings
from skipstone.adapt.adaptation import adapt
from skipstone.budget import BudgetTable
from skipstone.evaluate.budget_curve import calibrate_run
from skipstone.evaluate.loaded_run import batches, load_run
from skipstone.measure.flops import count_flops, flop_check
from skipstone.measure.losses import measure_loss
from skipstone.measure.speed import decode_task, take_turns
from skipstone.mechanisms.magnitude import MagnitudeGroups
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.pretrained import convert
from skipstone.runs import Run

CONTEXT, BATCH, ROWS, COUNTED = 256, 8, 128, 8
JUDGED = {
    "wikitext-2": ("wikitext-2", "test"),
    "dictionary": ("gcide", "validation"),
    "plays": ("tiny-shakespeare", "validation"),
}
APART = 0.08  # shares of neurons tried and kept, from their mean: a wide optimum, see docs/log.md
DIALLED = 16  # rows
PROMPT, STEPS, TURNS = 64, 64, 7  # of decoding, one row
PROMPT_TEXT, SAMPLED = "The old bridge across the river was built in", 40
NAME = "adapt_frontier"
LEAST = {"score": "block_influence"}
LEARNED = """Every arm is the same checkpoint, trained on the same rows, from the text and from the checkpoint's own
distribution alike; *dense, tuned* is what the tokens alone bring, and perplexities are held against that of the same
seeds."""
DISTILLED = """Every arm is the same checkpoint, trained on the same rows to give the distribution that the whole one
gives, and nothing else: the source has nothing to learn from that, and perplexities are held against it."""
ABOUT = f"""At each budget:
as many whole blocks left out as it takes, those that change the stream least; Mixture-of-Depths on 8/3 as many, a skip
path of rank 64 beside each, both started as measured; the same with tokens skipped at random; all blocks for all
tokens, but of each token's neurons only some (`decision: magnitude`): the second matrix for those whose activation,
times the typical size of what that matrix gives, is largest, the third for those whose product is, which saves in
decoding. *Dialled*: the same weights with other thresholds (`skipstone calibrate`) or other numbers of neurons. Losses
are of the pass that skips, on {ROWS} rows of {CONTEXT} tokens of each text; FLOPs are counted while it runs, one row at
a time, as shares of the source's (of each text's, for the same thresholds let more or fewer pass). *Decode*: one row of
wikitext-2, {STEPS} tokens after {PROMPT}; FLOPs counted and tokens/s in turns, both by the source's. What saves in
decoding only stands in the pictures with these FLOPs. Nobody trains on the dictionary (GCIDE) or the plays
(Tiny-Shakespeare)."""


def arms(dropped: int, budget: float, on: float) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, model, what differs in `adapt`, at one budget. on: share of the neurons that meets it in decoding, tried
    and kept in the mean."""
    layers = {**LEAST, "count": 8 * dropped // 3}  # a wide optimum: see docs/log.md
    best = {"name": "mixture_of_depths", "layers": layers, "capacity_warmup": 0.15, "kv": "full"}
    best |= {"skip": "low_rank", "skip_rank": 64}
    routed = {"budget": budget, "start": "measured"}
    yield "fewer blocks", {"drop_layers": {**LEAST, "count": dropped}}, {}
    yield "mixture of depths", {"mechanisms": [best]}, routed
    random = {**best, "decision": "random", "weight": "none"}
    yield "random skipping", {"mechanisms": [random]}, routed
    parts = {"capacity": round(on + APART, 4), "down_capacity": round(on - APART, 4)}
    yield "neurons by magnitude", {"neuron_groups": parts}, {}


def share_on(model: SkipstoneForCausalLM, budget: float) -> float:
    """Share of a dense model's neurons that meets the budget in decoding: the gate's matrix, a third, is whole."""
    cost = model.cost(tokens=1, past=CONTEXT // 2)
    step = (cost.dense or cost).forward
    return round(1 - (1 - budget) * step.total / (step.mlp * 2 / 3), 4)


def recipe(model: dict[str, Any], options: dict[str, Any], given: argparse.Namespace, seed: int) -> dict[str, Any]:
    steps = max(1, given.tokens // (BATCH * CONTEXT))
    train = {"steps": steps, "batch_size": BATCH, "learning_rate": given.rate}
    train |= {"warmup_steps": steps // 10, "precision": "bf16", "loss_chunk": 256, "seed": seed}
    quiet = {"eval_every": 0, "eval_rows": 8, "save_every": 0, "log_every": max(1, steps // 10)}
    data = {**texts(given.text), "context": CONTEXT, "seed": seed}
    loss = {"language_modelling": given.language_modelling, "distillation": 1 - given.language_modelling}
    whole = {"loss": loss, "calibration_rows": 192, **options}
    return {"model": model, "data": data, "train": {**train, **quiet}, "adapt": whole}


def texts(path: Path) -> dict[str, Any]:
    """What of the recipe's section `data` tells the text."""
    if path.is_dir():
        return {"corpus": f"text:{path}"}
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["data"])


def figures(folder: Path, budget: float | None = None) -> dict[str, Any]:
    """Nats a token on each text that is judged, counted FLOPs a token, and a sample; measured once and kept.

    budget: with thresholds turned to it, for which the run has a budget table.
    """
    record = folder / ("judged.json" if budget is None else f"judged-{budget:g}.json")
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    found: dict[str, Any] = {"sample": sample(folder)} if budget is None else {}
    for name, (corpus, split) in JUDGED.items():
        loaded = load_run(folder, split, corpus, CONTEXT)
        assert loaded.data is not None
        model, data, device = loaded.model, loaded.data, loaded.model.device
        with turned(model, loaded.run, budget):
            loss = measure_loss(model, loaded.primary, batches(data, BATCH, device, ROWS), activations=False).loss
            flops = flop_check(model, loaded.primary, batches(data, 1, device, COUNTED)).counted
        found[name] = {"loss": loss, "flops": flops}
    record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def turned(model: SkipstoneForCausalLM, run: Run, budget: float | None) -> AbstractContextManager[Any]:
    """The model at another budget: by its budget table, or by taking more or fewer neurons by magnitude."""
    routers = [m for m in model.routing_modules() if isinstance(m, MagnitudeGroups)]
    if budget is None:
        return nullcontext()
    if not routers:
        return BudgetTable.load(run.model_folder()).at(model, budget)
    on = share_on(model, budget)
    for router in routers:
        router.schedule.pin(on + APART)
        router.down_schedule.pin(on - APART)
    return nullcontext()


def dialled(arm: str, folder: Path, budgets: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The same weights at other budgets."""
    routes = not arm.startswith(IN_DECODING)
    if routes and budgets and BudgetTable.find(Run(folder).model_folder()) is None:
        calibrate_run(folder, rows=DIALLED)
    kind = arm.split(" at ")[0]
    return {f"dialled {kind} at {b:.0%}": known(folder, b) for b in budgets}


def known(folder: Path, budget: float | None = None) -> dict[str, Any]:
    """A run's figures, the tokens that it has learned from, and its seed."""
    seed = int(folder.name.rpartition("seed")[2])
    return {**figures(folder, budget), "tokens": Run(folder).result()["tokens"], "seed": seed}


def sample(folder: Path) -> str:
    """Greedy words after the prompt."""
    run = Run(folder)
    model, tokenizer = run.load_model().eval(), run.load_tokenizer()
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.encode(PROMPT_TEXT)])
    out = model.generate(ids, max_new_tokens=SAMPLED, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


def decode_figures(runs: dict[str, tuple[Path, float | None]]) -> dict[str, dict[str, float]]:
    """FLOPs and tokens/s of one row by the source's, after words of the first text: what is skipped depends on them.

    runs: folders, and the budgets that they are turned to.
    """
    corpus, split = next(iter(JUDGED.values()))
    data = load_run(runs["source"][0], split, corpus, CONTEXT).data
    assert data is not None
    prompt = data.collate([data.validation[ROWS]])["input_ids"][:, :PROMPT]
    models = {name: Run(folder).load_model().eval() for name, (folder, _) in runs.items()}
    with ExitStack() as stack:
        for name, (folder, budget) in runs.items():
            stack.enter_context(turned(models[name], Run(folder), budget))
        flops = {name: decoding_flops(model, prompt) for name, model in models.items()}
        rates = take_turns({name: decode_task(model, prompt, STEPS) for name, model in models.items()}, TURNS)
    base = rates["source"].each
    return {
        name: {**middle([a / b for a, b in zip(rate.each, base, strict=True)]), "flops": flops[name] / flops["source"]}
        for name, rate in rates.items()
    }


@torch.no_grad()
def decoding_flops(model: SkipstoneForCausalLM, prompt: torch.Tensor) -> int:
    """Of the steps that follow the prompt, counted while they run."""
    cache = DynamicCache(config=model.config)
    token, total = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1), 0
    for _ in range(STEPS):
        said: list[Any] = []
        total += count_flops(lambda given=token, said=said: said.append(model(given, past_key_values=cache))).total  # type: ignore[misc]
        token = said[0].logits.argmax(-1)
    return total


def table(source: dict[str, Any], results: dict[str, list[dict[str, Any]]], speeds: dict[str, dict[str, float]]) -> str:
    names, tuned = list(JUDGED), results.get(TUNED)
    heads = [part for name in names for part in (f"{name}: FLOPs", "perplexity", "by tuned" if tuned else "by source")]
    heads = ["arm", "learned from, tokens", *heads, "decode: FLOPs", "tokens/s"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for arm, seeds in {"source": [source], **results}.items():
        cells = [f"{seeds[0]['tokens']:,}"]
        for name in names:
            losses = [seed[name]["loss"] for seed in seeds]
            share = statistics.fmean(seed[name]["flops"] for seed in seeds) / source[name]["flops"]
            loss = statistics.fmean(losses)
            spread = f" (range {math.exp(loss) * (max(losses) - min(losses)):.2f})" if len(seeds) > 1 else ""
            same = [one for one in tuned or () if any(one["seed"] == seed.get("seed") for seed in seeds)]
            base = statistics.fmean(one[name]["loss"] for one in same or tuned or [source])
            cells += [f"{share:.1%}", f"{math.exp(loss):.2f}{spread}", f"{math.expm1(loss - base):+.1%}"]
        cells += [f"{speeds[arm]['flops']:.1%}", f"{speeds[arm]['median']:.2f}"] if arm in speeds else ["–", "–"]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def samples(source: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> str:
    """What each writes, the first seed's."""
    told = {
        "source": source["sample"],
        **{arm: seeds[0]["sample"] for arm, seeds in results.items() if "sample" in seeds[0]},
    }
    lines = [f"* {arm}: “{PROMPT_TEXT} **{' '.join(text.split())}**”" for arm, text in told.items()]
    return "\n".join([f"Greedy, {SAMPLED} tokens after the same words:", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("text", type=Path)
    parser.add_argument("--dropped", type=int, nargs="+", default=[6, 11])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--language-modelling", type=float, default=0.5, help="its weight; the rest is distillation's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="train these arms alone, as two processes may share the work")
    parser.add_argument("--render", action="store_true", help="train nothing, publish the arms that are finished")
    parser.add_argument("--dial", type=float, nargs="*", default=[], help="judge the first run of what skips here, too")
    parser.add_argument("--name", default=NAME, help="of the page")
    parser.add_argument("--describe", default="", help="what TEXT is, a sentence for the page")
    parser.add_argument("--work", type=Path, default=Path("runs/adapt_frontier"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if not (given.work / "source").is_dir():
        convert(given.source, given.work / "source")
    trained, missing = train_all(given)
    for folder in (folder for folders in trained.values() for folder in folders):
        figures(folder)
    if given.only is None:
        publish(given, trained, missing)


def train_all(given: argparse.Namespace) -> tuple[dict[str, list[Path]], list[str]]:
    """Folders of each arm's finished runs, a seed each; what is missing."""
    model = Run(given.work / "source").load_model()
    whole = model.cost(tokens=CONTEXT).forward
    block = (whole.total - whole.head) / model.config.num_hidden_layers
    found: dict[str, list[Path]] = {}
    missing: list[str] = []
    for seed in given.seeds:
        todo: list[tuple[str, dict[str, Any], dict[str, Any]]] = [(TUNED, {}, {})] if given.language_modelling else []
        for dropped in given.dropped:
            budget = 1 - dropped * block / whole.total
            at = arms(dropped, budget, share_on(model, budget))
            todo += [(f"{kind} at {budget:.0%}", changed, options) for kind, changed, options in at]
        for arm, changed, options in todo:
            folder = given.work / f"{arm.replace(', ', '-').replace(' ', '-')}-{given.tokens}-seed{seed}"
            wanted = not given.render and (given.only is None or arm in given.only)
            if wanted and not (folder / "result.json").is_file():
                adapt(given.source, recipe(changed, options, given, seed), out=folder)
            if (ready := longest(folder)) is not None:
                found.setdefault(arm, []).append(ready)
            else:
                missing.append(f"{arm} (seed {seed})")
    return found, missing


def longest(folder: Path) -> Path | None:
    """The finished run of this folder's name; else the one of its arm and seed that has learned most."""
    if (folder / "result.json").is_file():
        return folder
    arm, _, seed = folder.name.rsplit("-", 2)
    others = [path.parent for path in folder.parent.glob(f"{arm}-*-{seed}/result.json")]
    return max(others, key=lambda run: Run(run).result()["tokens"], default=None)


def publish(given: argparse.Namespace, trained: dict[str, list[Path]], missing: list[str]) -> None:
    source = {**figures(given.work / "source"), "tokens": 0}
    results = {arm: [known(folder) for folder in folders] for arm, folders in trained.items()}
    runs: dict[str, tuple[Path, float | None]] = {"source": (given.work / "source", None)}
    runs |= {arm: (folders[0], None) for arm, folders in trained.items()}
    for kind in ("mixture of depths", IN_DECODING):
        arm = next((arm for arm in trained if arm.startswith(kind)), None)
        if arm is not None:
            more = dialled(arm, trained[arm][0], given.dial)
            results |= {name: [found] for name, found in more.items()}
            runs |= {name: (trained[arm][0], budget) for name, budget in zip(more, given.dial, strict=True)}
    speeds = decode_figures(runs)
    environment = surroundings(given.seeds[0])
    told = {
        name: value
        for name, value in vars(given).items()
        if name not in ("source", "text", "work", "out", "only", "render", "name")
    }
    record = {
        **told,
        "missing": missing,
        "source": source,
        "arms": results,
        "decode": speeds,
        "environment": environment,
    }
    dropped, seeds = (" ".join(map(str, values)) for values in (given.dropped, given.seeds))
    flags = f"--dropped {dropped} --tokens {given.tokens} --seeds {seeds}"
    flags += f" --rate {given.rate:g} --language-modelling {given.language_modelling:g}"
    flags += f" --dial {' '.join(f'{budget:g}' for budget in given.dial)}" if given.dial else ""
    end = closing(f"python benchmarks/adapt_frontier.py SOURCE TEXT {flags}", environment)
    drawings = {name: f"{given.name}-{name}.svg" for name in JUDGED} if given.out else {}
    shown = "\n\n".join(f"![{TITLE}: {name}]({file})" for name, file in drawings.items())
    absent = f"Not run: {', '.join(missing)}." if missing else ""
    parts = [
        f"{LEARNED if given.language_modelling else DISTILLED} {ABOUT} {given.describe}".strip(),
        table(source, results, speeds),
        absent,
        shown,
        samples(source, results),
        end,
    ]
    keep(given.out, given.name, TITLE, record, "\n\n".join(part for part in parts if part) + "\n")
    for name, file in drawings.items():
        (given.out / file).write_text(picture(source, results, speeds, name), encoding="utf-8")


if __name__ == "__main__":
    main()
