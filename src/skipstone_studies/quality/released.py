"""The study of the released model: word boundaries on Python code, trained once, in every format of its weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.evaluate.tables import Section, markdown
from skipstone.generate import generate
from skipstone.measure.flops import flop_check
from skipstone.measure.passes import PASSES
from skipstone.measure.speed import Lap
from skipstone.model.quantise import quantise
from skipstone.runs import Run
from skipstone_studies import protocol
from skipstone_studies.measure import executed_training
from skipstone_studies.speed.interleaved import ratio, seconds
from skipstone_studies.speed.rivals.engines import now
from skipstone_studies.study import Column, Figures, RecipeDict, Study
from skipstone_studies.text_loss import by_block, capacities, mean_loss, rows, spaced

NAME = "segment-boundary-10m"
RECIPE: RecipeDict = {
    "model": {
        "hidden_size": 320,
        "num_hidden_layers": 9,
        "num_attention_heads": 5,
        "mechanisms": [{"name": "segment", "layers": "2:7", "decision": "boundary", "capacity": 0.125}],
    },
    "data": {"corpus": "distinct:python-code", "tokenizer": "byte", "context": 512, "sampling": "once"},
    "train": {
        "steps": 3200,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 320,
        "min_lr_ratio": 0.0,
        "average_last": 0.1,
        "precision": "bf16",
        "log_every": 50,
        "eval_every": 400,
        "eval_rows": 64,
        "save_every": 400,
    },
}
QUICK: RecipeDict = {
    "model": {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2},
    "data": {"context": 64},
    "train": {"steps": 3, "batch_size": 2, "warmup_steps": 1, "eval_every": 0, "save_every": 0, "log_every": 1},
}
BITS = (32, 16, 8, 4)
TEST_ROWS = {"laptop": (2048, 256), "quick": (4, 2)}  # of the model as trained, and of each format
PROMPT, NEW, ROUNDS = 128, 192, {"laptop": 7, "quick": 1}
SAMPLES = ("def mean(values):\n", "class Stack:\n    def __init__(self", 'if __name__ == "__main__":\n')
SAMPLED = {"laptop": 240, "quick": 4}  # bytes


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipe of the released model by its name; it is that of `recipes/segment-boundary-10m.yaml`.

    scale: "laptop", or "quick" for a tiny model.
    """
    if scale != "quick":
        return {NAME: RECIPE}
    return {NAME: {part: {**RECIPE[part], **QUICK[part]} for part in RECIPE}}


def measured(folder: Path) -> Figures:
    """Return the figures of the trained model: losses, FLOPs, and size, loss and decoding speed by format of weights.

    folder: the run folder. Keys: `training`, its summary; `training_flops`, executed; `loss` on evenly spaced rows of
    the test split, in nats a byte, and `blocks`, the same by block of text; `bits_per_byte`; `forward_flops`, counted
    per byte, and `forward_share`, these divided by the dense model's; `capacity`, the share of bytes kept by block;
    `formats`, by bits of a weight {`megabytes`, `loss` on fewer rows, `tokens_per_second` and `speed`, {"median",
    "min", "max"} of the dense model's CPU seconds a byte divided by this model's}; `samples`, texts by their prompts.
    """
    run, scale = Run(folder), folder.parent.name
    recipe, model = protocol.recipe_of(folder), run.load_model().eval()
    count, few = TEST_ROWS[scale]
    test = protocol.data_of(recipe["data"], "test")
    found = by_block(model, test, count)
    predictions = sum(part.predictions for part in found)
    loss = sum(part.nats for part in found) / predictions
    flops = flop_check(model, PASSES["executed"], rows(test, spaced(len(test.validation), protocol.COUNTED_ROWS)))
    twin = dense_twin(model)
    ids_BT = torch.as_tensor(test.validation[0]["input_ids"])[None]
    formats = {}
    for bits in BITS:
        small, other = (each if bits == 32 else quantise(each, bits).eval() for each in (model, twin))
        formats[str(bits)] = {
            "megabytes": sum(x.numel() * x.element_size() for x in small.parameters()) / 1e6,
            "loss": mean_loss(small, test, few),
            **speed(small, other, ids_BT, ROUNDS[scale]),
        }
    return {
        "training": run.result(),
        "training_flops": {"executed": executed_training(model, run, recipe["train"]["steps"])},
        "loss": loss,
        "blocks": [part.loss for part in found],
        "bits_per_byte": loss / math.log(2),
        "predictions": predictions,
        "test_bytes": test.validation_bytes,
        "forward_flops": flops.counted,
        "forward_share": flops.share,
        "capacity": capacities(found),
        "formats": formats,
        "samples": {prompt: sample(run, model, prompt, SAMPLED[scale]) for prompt in SAMPLES},
    }


def dense_twin(model: SkipstoneForCausalLM) -> SkipstoneForCausalLM:
    """Return a model of the same sizes without mechanisms, with random weights, to compare speeds."""
    torch.manual_seed(0)
    return SkipstoneForCausalLM(SkipstoneConfig(**{**model.config.to_dict(), "mechanisms": None})).eval()


def speed(model: SkipstoneForCausalLM, other: SkipstoneForCausalLM, ids_BT: torch.Tensor, rounds: int) -> Figures:
    """Time two models that read the same text byte by byte with a cache, in turns, after the same prompt.

    model, other: the models. ids_BT: the text, int64 [1, T]. rounds: number of timings. Keys of the result:
    `tokens_per_second` of `model`, and `speed`, {"median", "min", "max"} of the seconds of `other` divided by those of
    `model`. Seconds are CPU seconds of this process.
    """
    prompt = min(PROMPT, ids_BT.shape[1] // 2)
    new = min(NEW, ids_BT.shape[1] - prompt)

    def lap(each: SkipstoneForCausalLM) -> Lap:
        with torch.inference_mode():
            cache = each(ids_BT[:, :prompt], use_cache=True).past_key_values
            start = now()
            for i in range(prompt, prompt + new):
                each(ids_BT[:, i : i + 1], past_key_values=cache).logits.argmax(-1)
            return Lap(tokens=new, seconds=now() - start, joules=None)

    taken = seconds({"model": lambda: lap(model), "other": lambda: lap(other)}, rounds)
    rate = new / statistics.median(taken["model"])
    return {"tokens_per_second": rate, "speed": ratio(taken["other"], taken["model"])}


def sample(run: Run, model: SkipstoneForCausalLM, prompt: str, length: int) -> str:
    """Return text that the model continues a prompt with, sampled at temperature .7 from the 20 likeliest bytes.

    run: the run, for its tokenizer. prompt: the prompt. length: number of new bytes.
    """
    tokenizer = run.load_tokenizer()
    assert tokenizer is not None
    ids_BT = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    made_BT = generate(model, ids_BT, max_new_tokens=length, temperature=0.7, top_k=20, seed=0)
    return str(tokenizer.decode(made_BT[0, ids_BT.shape[1] :], skip_special_tokens=True))


def details(figures: Mapping[str, Mapping[int, Figures]]) -> str:
    """Return the Markdown below the table: formats of the weights, and samples of text.

    figures: the figures of every run, {arm (compared recipe): {seed: nested dict}}.
    """
    of_seed = figures.get(NAME, {})
    if not of_seed:
        return ""
    found = of_seed[min(of_seed)]
    table = Section(
        title="By format of the weights",
        columns=[
            "bits of a weight",
            "MB",
            "loss, nats a byte",
            "bytes/s",
            "times the dense model's speed: median (range)",
        ],
        rows=[
            [
                str(bits),
                f"{one['megabytes']:.1f}",
                f"{one['loss']:.4f}",
                f"{one['tokens_per_second']:,.0f}",
                f"{one['speed']['median']:.2f} ({one['speed']['min']:.2f} to {one['speed']['max']:.2f})",
            ]
            for bits, one in ((bits, found["formats"][str(bits)]) for bits in BITS)
        ],
        notes=[FORMATS],
    )
    texts = [f"```text\n{prompt}{text}\n```" for prompt, text in ((each, found["samples"][each]) for each in SAMPLES)]
    return "\n\n".join([markdown([table]).strip("\n"), "### What it writes", WRITES, *texts])


FORMATS = (
    "Losses on an eighth of the test rows. Speeds are those of reading a text byte by byte with a cache, one row, one "
    "thread, in CPU time and in turns with a dense model of the same sizes and format (random weights)."
)
WRITES = "The first lines of each text were given; the rest is sampled at temperature .7 from the 20 likeliest bytes."
COLUMNS = (
    Column(key="loss", title="test loss, nats a byte", format=".4f"),
    Column(key="bits_per_byte", title="bits a byte", format=".3f"),
    Column(key="training.parameters", title="parameters, M", format=".2f", unit=1e6),
    Column(key="training.tokens", title="bytes read, M", format=".1f", unit=1e6),
    Column(key="training_flops.executed", title="training TFLOPs", format=",.0f", unit=1e12),
    Column(key="forward_flops", title="forward MFLOPs a byte", format=".2f", unit=1e6),
    Column(key="forward_share", title="share of the dense model's", format=".2f"),
    Column(key="training.seconds", title="seconds", format=",.0f"),
)
RELEASED = Study(
    name="released",
    purpose="the released model: word boundaries on Python code",
    about=(
        "A byte model of nine blocks, five of which run at word boundaries alone, trained once on the source code of "
        "installed packages, split by package, without near-copies (`recipes/segment-boundary-10m.yaml`). Its loss is "
        "that of the executed pass on 2,048 evenly spaced rows of 512 bytes of the test split. One run, one seed, and "
        "no dense model trained beside it: what word boundaries gain is measured in "
        "[decisive_short](decisive_short.md), at a smaller size."
    ),
    arms=arms,
    seeds={"laptop": (0,), "quick": (0,)},
    columns=COLUMNS,
    measure=measured,
    measure_together=None,
    details=details,
)
