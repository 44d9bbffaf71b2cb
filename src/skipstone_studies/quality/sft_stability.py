"""Whether PolyGLU's routing stays unchanged during supervised fine-tuning, as arXiv 2603.13347 claims, on a tiny model.

A PolyGLU model is trained on Python code while tau, the temperature of its mix of activations, falls to .1, and is then
tuned on GSM8K's chats by TRL's unmodified SFTTrainer: ChatML, loss on the assistant's tokens only (including the token
that ends its turn), tau frozen. Routing is measured on chats that are never trained on. A second model is trained
without noise. Needs trl, and gsm8k/train.jsonl in the folder that SKIPSTONE_DATA names.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from skipstone.adapt.harden import mean_logits
from skipstone.core.atomic_write import complete
from skipstone.core.plain_text import read_object
from skipstone.core.records import ActivationRecord, expect
from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.measure.passes import PASSES
from skipstone.mechanisms import PolyGLU
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.runs import Run
from skipstone_studies.study import Column, Figures, RecipeDict, Study, recipe_file, train_run

VOCABULARY, CONTEXT, ROWS, HELD_OUT = 1024, 256, 2, 64
BASE_STEPS, STEPS = 3000, 13_067
LINES = 26  # measurements during the tuning
DRIFT, FLIPS = 0.10, 0.01  # largest changes that count as stable
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SFT, COURSE = "sft", "course.jsonl"  # in the run folder: TRL's checkpoints, and measurements of the routing


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes of the base model by name: PolyGLU trained with Gumbel noise and without.

    Each is a dict of settings that makes one of the compared models. scale: not used.
    """
    return {"with noise": _recipe({}), "without noise": _recipe({"noise": False})}


def _recipe(options: PlainDict) -> RecipeDict:
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    train = {"steps": BASE_STEPS, "batch_size": 8, "learning_rate": 2e-3, "warmup_steps": BASE_STEPS // 20}
    train |= {
        "eval_every": 0,
        "save_every": max(1, BASE_STEPS // 4),
        "eval_rows": 128,
        "log_every": max(1, BASE_STEPS // 10),
    }
    return {
        "model": {**sizes, "activation": {"name": "polyglu", **options}},
        "data": {"corpus": "python-stdlib", "context": CONTEXT},
        "train": train,
        "sft_steps": STEPS,
    }


def make(recipe: RecipeDict, folder: Path, resume: bool, callbacks: Sequence[TrainerCallback]) -> None:
    """Train the base model of a recipe into `folder`, with a tokenizer that is first trained on GSM8K's chats.

    recipe: an entry of `arms` with a seed. resume: whether to continue an interrupted training. callbacks: further
    callbacks of the trainer.
    """
    tokenizer = folder.with_name("tokenizer")
    if not tokenizer.is_dir():
        make_tokenizer(chats(), tokenizer)
    parts = {name: recipe[name] for name in ("model", "data", "train")}
    parts["data"] = {**parts["data"], "tokenizer": f"pretrained:{tokenizer}"}
    train_run(parts, folder, resume, callbacks)


def chats() -> list[PlainDict]:
    """Return GSM8K's training rows as chats, {"messages": [user, assistant]}.

    They are read from gsm8k/train.jsonl in the folder that SKIPSTONE_DATA names. Raises FileNotFoundError if it is
    missing.
    """
    path = Path(os.environ.get("SKIPSTONE_DATA", ""), "gsm8k", "train.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} was not found; put GSM8K into the folder that SKIPSTONE_DATA names")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    said = [({"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}) for r in rows]
    return [{"messages": list(messages)} for messages in said]


def make_tokenizer(rows: Sequence[PlainDict], folder: Path) -> None:
    """Train a byte-level BPE tokenizer with ChatML's special tokens on chats, and save it in `folder`.

    rows: the chats, {"messages": [user, assistant]}, where each message has "role" and "content". The token that ends a
    turn is the tokenizer's eos token.
    """
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
    with complete(folder) as partly:
        tokenizer.save_pretrained(partly)


class Routing:
    """Measurements of how a PolyGLU model's neurons choose their activations on fixed rows, compared with the start.

    model: the model before tuning; it is measured again while it changes. rows: model inputs, each with input_ids [1,
    T].
    """

    def __init__(self, model: SkipstoneForCausalLM, rows: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.rows = model, rows
        self.first = self._strongest()

    @torch.no_grad()
    def figures(self) -> PlainDict:
        """Return {"dynamic_entropy": one value per layer, "flips": a share}, as they are now.

        dynamic_entropy: for each layer, mean entropy in nats, over tokens and neurons, of the softmax over activations
        with all logits. flips: share of neurons whose strongest activation is not the one that it was when the object
        was built.
        """
        was_training = self.model.training
        self.model.eval()
        sums, count = torch.zeros(len(self.model.model.layers), dtype=torch.float64), 0
        for row in self.rows:
            records = PASSES["executed"].run(self.model, row, output_records=True).records or ()
            for layer, (decided, activation) in enumerate(zip(records, self.model.modules_of(PolyGLU), strict=True)):
                record = expect(decided[activation.placement.name], ActivationRecord)
                entropy = activation.dynamic_entropy(record).expand(record.reached_BT.shape)[record.reached_BT]
                sums[layer] += entropy.double().sum()
            count += int(row["input_ids"].numel())
        flips = torch.cat([a != b for a, b in zip(self.first, self._strongest(), strict=True)]).double().mean()
        self.model.train(was_training)
        return {"dynamic_entropy": (sums / count).tolist(), "flips": float(flips)}

    def _strongest(self) -> list[Tensor]:
        """Return each neuron's strongest activation for the mean logits of all rows, an index, int64 [F] per layer."""
        was_training = self.model.training
        dynamic = mean_logits(self.model.eval(), PASSES["executed"], self.rows)
        self.model.train(was_training)
        activations = self.model.modules_of(PolyGLU)
        return [(a.preference_FA + mean).argmax(-1) for a, mean in zip(activations, dynamic, strict=True)]


class Watch(TrainerCallback):
    """A trainer callback that measures every `every` steps how PolyGLU's neurons choose their activations.

    It also measures before the first step and after the last. routing: the model with the rows on which it is measured.
    path: file to which each measurement is appended as a line of JSON.
    """

    def __init__(self, routing: Routing, every: int, path: Path) -> None:
        self.routing, self.every, self.path = routing, every, path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove the measurements of steps that a resumed training repeats; in a new one, measure before step 1.

        args, state, control: what transformers' Trainer passes to its callbacks.
        """
        kept = [line for line in course(self.path) if line["step"] <= state.global_step]
        lines = kept or [{"step": 0, **self.routing.figures()}]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **self.routing.figures()}) + "\n")


def course(path: Path) -> list[PlainDict]:
    """Return the measurements that `Watch` wrote to a file, one dict per line, in order.

    A last line that a killed process left incomplete is left out. path: the file.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def measured(folder: Path) -> Figures:
    """Fine-tune the base model in `folder` by TRL's SFTTrainer, and return the figures of the tuning.

    folder: the run folder. Keys: `losses` and `course`, what was logged; `drift`, relative change of the dynamic
    entropy (of a neuron's softmax over activations); `flips`, share of neurons with another strongest activation;
    `stable`, 1 if both are small, else 0; and those that the function `figures` adds. An interrupted tuning is resumed.
    Raises ValueError if TRL is not installed or if the temperature tau has changed.
    """
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        raise ValueError("this study fine-tunes with TRL: pip install trl") from None
    run, rows = Run(folder), chats()
    recipe = read_object(recipe_file(folder))
    model, tokenizer, steps = run.load_model(), run.load_tokenizer(), recipe["sft_steps"]
    out, every = folder / SFT, max(1, steps // LINES)
    out.mkdir(exist_ok=True)
    settings = SFTConfig(
        str(out),
        max_steps=steps,
        learning_rate=2e-5,
        per_device_train_batch_size=ROWS,
        gradient_checkpointing=False,
        max_length=CONTEXT,
        assistant_only_loss=True,
        logging_steps=every,
        save_steps=every,
        save_total_limit=1,
        report_to=[],
        seed=recipe["train"]["seed"],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        disable_tqdm=True,
    )
    routing = Routing(model, [_ids(tokenizer, row) for row in rows[:HELD_OUT]])
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows[HELD_OUT:]),
        processing_class=tokenizer,
        callbacks=[Watch(routing, every, out / COURSE)],
    )
    routers = model.modules_of(PolyGLU)
    tau = [float(router.tau) for router in routers]
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)))
    if [float(router.tau) for router in routers] != tau:
        raise ValueError("tau has moved while the model was tuned")
    return figures([line["loss"] for line in trainer.state.log_history if "loss" in line], course(out / COURSE), tau[0])


def _ids(tokenizer: PreTrainedTokenizerBase, row: PlainDict) -> dict[str, Tensor]:
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"][:CONTEXT]
    return {"input_ids": torch.tensor([ids])}


def figures(losses: Sequence[float], lines: Sequence[PlainMapping], tau: float) -> Figures:
    """Return the figures of a fine-tuning: what was logged, and summaries.

    losses: the logged training losses. lines: measurements over time, dicts with `dynamic_entropy` (nats, one value per
    layer) and `flips`; the first is from before tuning. tau: the temperature of PolyGLU. Keys of the result: `losses`,
    `course` (the lines) and `tau` as given; `first_loss`, `last_loss`; `start` and `end`, dynamic entropies averaged
    over layers; `drift`, end / start - 1; `largest`, the largest such drift at any time, by its magnitude; `flips`, the
    share of neurons whose strongest activation has changed; `stable`, 1 if the drift is at most 10 % in either
    direction and the flips at most 1 %, else 0.
    """
    means = [statistics.fmean(line["dynamic_entropy"]) for line in lines]
    drifts, flips = [mean / means[0] - 1 for mean in means], lines[-1]["flips"]
    return {
        "losses": list(losses),
        "course": list(lines),
        "tau": tau,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "start": means[0],
        "end": means[-1],
        "drift": drifts[-1],
        "largest": max(drifts, key=abs),
        "flips": flips,
        "stable": float(abs(drifts[-1]) <= DRIFT and flips <= FLIPS),
    }


SFT_STABILITY = Study(
    name="sft_stability",
    purpose="PolyGLU's routing through supervised fine-tuning",
    about=(
        f"Width 64, 4 blocks, a vocabulary of {VOCABULARY:,}, context {CONTEXT}, {ROWS} chats per step. *Dynamic "
        f"entropy* is in nats, averaged over layers and over the tokens of {HELD_OUT} chats that are never trained on, "
        "without noise (ln 4 = 1.386). *Drift* is the relative change of the mean entropy from the start of "
        "fine-tuning to its end; *largest* is the largest such change at any time. *Flips* is the share of neurons "
        "whose strongest activation on these chats has changed by the end. A run is stable if it drifts by at most "
        f"{DRIFT:.0%} and flips at most {FLIPS:.0%}."
    ),
    arms=arms,
    seeds={"laptop": (0, 1, 2)},
    make=make,
    measure=measured,
    measure_together=None,
    columns=(
        Column(key="first_loss", title="SFT loss, first"),
        Column(key="last_loss", title="last"),
        Column(key="start", title="dynamic entropy before", format=".4f"),
        Column(key="end", title="after", format=".4f"),
        Column(key="drift", title="drift", format="+.1%"),
        Column(key="largest", title="largest", format="+.1%"),
        Column(key="flips", title="flips", format=".2%"),
        Column(key="stable", title="stable, share of seeds", format=".0%"),
    ),
)
