"""Does routing stay as it is through supervised fine-tuning? The claim of arXiv 2603.13347, on a tiny model.

    pip install trl
    python benchmarks/sft_stability.py GSM8K.jsonl [--seeds 0 1 2] [--steps 13067] [--base-steps 3000] [--arms ARM ...]
        [--out results]

GSM8K.jsonl: rows of `question` and `answer`. A PolyGLU model learns Python code with Gumbel noise, tau falling to .1,
and is then tuned on the chats by TRL's SFTTrainer, unchanged: ChatML, loss on the assistant's tokens alone (the token
that ends its turn among them), tau frozen. What the routing does is measured on chats that are never trained on. A
second model learns without noise. Finished parts in --work are not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from publish import closing, keep, surroundings
from skipstone.adapt.harden import mean_logits
from skipstone.measure.passes import PASSES
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.runs import Run
from skipstone.train.training import train

NAME, TITLE = "sft_stability", "PolyGLU's routing through supervised fine-tuning"
VOCABULARY, CONTEXT, ROWS, HELD_OUT = 1024, 256, 2, 64
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARMS: dict[str, dict[str, Any]] = {"with noise": {}, "without noise": {"noise": False}}
DRIFT, FLIPS = 0.10, 0.01  # what counts as stable
LINES = 26  # of the routing's course
ABOUT = f"""Width 64, 4 blocks, a vocabulary of {VOCABULARY:,}, context {CONTEXT}. *Dynamic entropy* in nats, mean over
layers and over the tokens of {HELD_OUT} chats that are never trained on, noise off (ln 4 = 1.386). *Drift*: of the mean
entropy from the start of the tuning to its end, as a share of the start; *largest*, of any time between. *Flips*: the
share of neurons whose strongest activation on these chats is another one at the end. Stable: a drift of at most
{DRIFT:.0%} and flips of at most {FLIPS:.0%}. {ROWS} chats a step. Mean and range over seeds."""


def chats(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]


def make_tokenizer(rows: Sequence[dict[str, Any]], folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the chats, with ChatML's tokens. The turn's end is what generation stops on."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((m["content"] for row in rows for m in row["messages"]), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def base(arm: str, tokenizer: Path, given: argparse.Namespace, seed: int) -> Path:
    """The run folder of the model before tuning."""
    folder = given.work / f"base-{arm.replace(' ', '-')}-{given.base_steps}-seed{seed}"
    if folder.is_dir() and Run(folder).finished:
        return folder
    recipe = {
        "model": {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "activation": {"name": "polyglu", **ARMS[arm]},
        },
        "data": {"corpus": "python-stdlib", "tokenizer": f"pretrained:{tokenizer}", "context": CONTEXT, "seed": seed},
        "train": {
            "steps": given.base_steps,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "seed": seed,
            "warmup_steps": given.base_steps // 20,
            "eval_every": 0,
            "save_every": 0,
            "eval_rows": 128,
            "log_every": max(1, given.base_steps // 10),
        },
    }
    return train(recipe, out=folder, resume=folder.is_dir())


class Routing:
    """What the routing does on rows that stay the same."""

    def __init__(self, model: SkipstoneForCausalLM, rows: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.rows = model, rows
        self.first = self._strongest()

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Dynamic entropy in nats by layer, and the share of neurons that have changed their mind."""
        was_training = self.model.training
        self.model.eval()
        sums, count = torch.zeros(len(self.model.model.layers), dtype=torch.float64), 0
        for row in self.rows:
            records = PASSES["executed"].run(self.model, row, output_records=True).records
            for layer, (decided, block) in enumerate(zip(records, self.model.model.layers, strict=True)):
                activation: Any = block.mlp.activation  # type: ignore[union-attr]
                record: Any = decided[activation.placement.name]
                entropy = activation.dynamic_entropy(record).expand(record.reached_BT.shape)[record.reached_BT]
                sums[layer] += entropy.double().sum()
            count += int(row["input_ids"].numel())
        flips = torch.cat([a != b for a, b in zip(self.first, self._strongest(), strict=True)]).double().mean()
        self.model.train(was_training)
        return {"dynamic_entropy": (sums / count).tolist(), "flips": float(flips)}

    def _strongest(self) -> list[Tensor]:
        """[F] for each layer."""
        was_training = self.model.training
        dynamic = mean_logits(self.model.eval(), PASSES["executed"], self.rows)
        self.model.train(was_training)
        activations: list[Any] = [block.mlp.activation for block in self.model.model.layers]  # type: ignore[union-attr]
        return [(a.preference_FA + mean).argmax(-1) for a, mean in zip(activations, dynamic, strict=True)]


class Watch(TrainerCallback):
    """Measures so often."""

    def __init__(self, routing: Routing, every: int) -> None:
        self.routing, self.every, self.course = routing, every, [{"step": 0, **routing.figures()}]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.course.append({"step": state.global_step, **self.routing.figures()})


def tune(run: Path, rows: list[dict[str, Any]], tokenizer: Any, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    record = run / "sft.json"
    if record.is_file() and (found := json.loads(record.read_text(encoding="utf-8")))["steps"] == given.steps:
        return found  # type: ignore[no-any-return]
    model = Run(run).load_model()
    held_out = [_ids(tokenizer, row) for row in rows[:HELD_OUT]]
    watch = Watch(Routing(model, held_out), max(1, given.steps // LINES))
    settings = SFTConfig(
        str(run / "sft"),
        max_steps=given.steps,
        learning_rate=2e-5,
        per_device_train_batch_size=ROWS,
        gradient_checkpointing=False,
        max_length=CONTEXT,
        assistant_only_loss=True,
        logging_steps=max(1, given.steps // LINES),
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows[HELD_OUT:]),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    tau = [float(a.tau) for a in model.routing_modules()]
    trainer.train()
    assert [float(a.tau) for a in model.routing_modules()] == tau, "tau has moved"
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    found = {"steps": given.steps, "tau": tau[0], "losses": losses, "course": watch.course}
    found["environment"] = surroundings(seed)
    record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _ids(tokenizer: Any, row: dict[str, Any]) -> dict[str, Tensor]:
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"][:CONTEXT]
    return {"input_ids": torch.tensor([ids])}


def summary(found: dict[str, Any]) -> dict[str, float]:
    means = [statistics.fmean(line["dynamic_entropy"]) for line in found["course"]]
    drifts = [mean / means[0] - 1 for mean in means]
    return {
        "start": means[0],
        "end": means[-1],
        "drift": drifts[-1],
        "largest": max(drifts, key=abs),
        "flips": found["course"][-1]["flips"],
        "first_loss": found["losses"][0],
        "last_loss": found["losses"][-1],
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    heads = ["learned", "SFT loss, first", "last", "dynamic entropy before", "after", "drift", "largest", "flips"]
    lines = [f"| {' | '.join([*heads, 'stable'])} |", "|---|" + "---:|" * len(heads)]
    for arm, seeds in results.items():
        told = [summary(found) for found in seeds]
        stable = sum(abs(each["drift"]) <= DRIFT and each["flips"] <= FLIPS for each in told)
        forms = {"first_loss": ".3f", "last_loss": ".3f", "start": ".4f", "end": ".4f"}
        forms |= {"drift": "+.1%", "largest": "+.1%", "flips": ".2%"}
        cells = [_range([each[key] for each in told], form) for key, form in forms.items()]
        lines.append(f"| {arm} | {' | '.join(cells)} | {stable} of {len(told)} |")
    return "\n".join(lines)


def _range(values: Sequence[float], form: str) -> str:
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=13_067)
    parser.add_argument("--base-steps", type=int, default=3000)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--work", type=Path, default=Path("runs/sft_stability"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows, results = chats(given.gsm8k), {}
    tokenizer = make_tokenizer(rows, given.work / "tokenizer")
    for seed in given.seeds:
        for arm in given.arms:
            run = base(arm, given.work / "tokenizer", given, seed)
            results.setdefault(arm, []).append(tune(run, rows, tokenizer, given, seed))
    seeds = " ".join(map(str, given.seeds))
    arms = " ".join(f'"{arm}"' for arm in given.arms)
    command = f"python benchmarks/sft_stability.py GSM8K.jsonl --seeds {seeds} --steps {given.steps} --arms {arms}"
    environment = surroundings(given.seeds[0])
    record = {"base_steps": given.base_steps, "seeds": given.seeds, "arms": results, "environment": environment}
    keep(given.out, NAME, TITLE, record, f"{ABOUT}\n\n{table(results)}\n\n{closing(command, environment)}\n")


if __name__ == "__main__":
    main()
