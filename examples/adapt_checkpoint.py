"""Adapt a dense checkpoint to compute less: a small Llama learns to skip a fifth of its FLOPs.

Run it with `python examples/adapt_checkpoint.py` (about a minute), or name a checkpoint and a folder of text:
`python examples/adapt_checkpoint.py PATH TEXT`. Without arguments a Llama of transformers is trained on the Python
sources of the standard library for a few seconds, as a stand-in for a checkpoint of yours. It is then adapted by the
recipe below and compared with the source: the loss of the pass that skips, and the FLOPs that this pass executes.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from skipstone.adapt import adapt
from skipstone.data.tokenizers import byte_tokenizer
from skipstone.evaluate import evaluate
from skipstone.model.pretrained import convert

STEPS = 40
RECIPE: dict[str, Any] = {
    "model": {
        "mechanisms": [
            {
                "name": "mixture_of_depths",
                "layers": {"score": "block_influence", "count": 2},  # the blocks that change the stream least
                "kv": "full",
                "capacity_warmup": 0.3,
            }
        ]
    },
    "data": {"context": 128},
    "train": {"batch_size": 8, "warmup_steps": 5, "eval_every": 0, "save_every": 0, "eval_rows": 32},
    "adapt": {"budget": 0.8, "stages": [{"train_only": "all", "steps": STEPS, "learning_rate": 1e-3}]},
}


def write_text(folder: Path) -> None:
    """Write two files of text, as `data.corpus=text:FOLDER` expects them."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    folder.mkdir()
    for name, part in (("train.txt", sources[:40]), ("validation.txt", sources[40:44])):
        (folder / name).write_text("\n\n".join(path.read_text("utf-8", "ignore") for path in part), encoding="utf-8")


def write_checkpoint(folder: Path, text: Path, steps: int = 60) -> None:
    """Train a dense byte-level Llama for a moment and save it, in place of a checkpoint of your own."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=5, num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.tensor(list((text / "train.txt").read_bytes()[:400_000]))
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.stack([ids[b : b + 128] for b in torch.randint(len(ids) - 128, (8,), generator=draw).tolist()])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(source: str | None = None, text: str | None = None) -> None:
    """Adapt the checkpoint, then measure source and result by the passes that they execute."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if source is None or text is None:
            write_text(folder / "text")
            write_checkpoint(folder / "source", folder / "text")
            source, text = str(folder / "source"), str(folder / "text")
        recipe = {**RECIPE, "data": {**RECIPE["data"], "corpus": f"text:{text}"}}
        run = adapt(source, recipe, out=folder / "adapted")
        convert(source, folder / "dense")
        for what, model in (("source", folder / "dense"), ("adapted", run)):
            where = {"corpus": f"text:{text}", "context": 128} if what == "source" else {}
            figures = evaluate(model, batch_size=8, **where).to_dict()
            loss, flops = figures["ways"]["executed"]["loss"], figures["flops_per_token"]["counted"]
            print(f"{what:<8} loss {loss:.3f} nats a token, {flops:,.0f} FLOPs a token, as executed")
        print("the result is a Hugging Face model:", type(AutoModelForCausalLM.from_pretrained(run / "model")).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:3])
