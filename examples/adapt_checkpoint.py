"""Adapt a dense checkpoint to compute less: a small Llama learns to skip a fifth of its FLOPs.

    python examples/adapt_checkpoint.py                                 # as a script, about a minute
    python examples/adapt_checkpoint.py --source PATH --text FOLDER     # a checkpoint and text of yours
    marimo run examples/adapt_checkpoint.py                             # as a page; `marimo edit` also shows the code

Without arguments a Llama of transformers is trained on the Python sources of the standard library for a few seconds, as
a stand-in for a checkpoint of yours. It is then adapted by the recipe below and compared with the source: the loss of
the pass that skips, and the FLOPs that this pass executes. Both ways need `pip install 'skipstone[notebooks]'`;
the script starts no server.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import sysconfig
    import tempfile
    from pathlib import Path
    from typing import Any

    import marimo as mo
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from skipstone.adapt import adapt
    from skipstone.data.tokenizers import byte_tokenizer
    from skipstone.evaluate import evaluate
    from skipstone.measure.token_trace import TokenTrace
    from skipstone.measure.trace import trace_tokens
    from skipstone.model.pretrained import convert
    from skipstone.report import show_trace

    LINE = "def adapt(model, budget):\n    return model.to(budget) if budget else None\n"
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
        "adapt": {"budget": 0.8},
    }


@app.cell(hide_code=True)
def _():
    mo.md("""
    # Adapt a checkpoint

    A recipe names the mechanism and a budget, here 80 % of the dense FLOPs. The blocks that change the residual stream
    least are routed; they start by computing every token, and the capacity falls while the model trains on.
    """)
    return


@app.function
def write_text(folder: Path) -> None:
    """Write two files of text, as `data.corpus=text:FOLDER` expects them."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    folder.mkdir()
    for name, part in (("train.txt", sources[:40]), ("validation.txt", sources[40:44])):
        (folder / name).write_text("\n\n".join(path.read_text("utf-8", "ignore") for path in part), encoding="utf-8")


@app.function
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


@app.function
def compared(
    source: str | None, text: str | None, steps: int
) -> tuple[dict[str, tuple[float, float]], TokenTrace, str]:
    """Adapt the checkpoint, then measure source and result by the passes that they execute.

    Return loss in nats a token and FLOPs a token of both, the decisions of the result for `LINE`, and its class.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, figures = Path(name), {}
        if source is None or text is None:
            write_text(folder / "text")
            write_checkpoint(folder / "source", folder / "text")
            source, text = str(folder / "source"), str(folder / "text")
        stage = {"train_only": "all", "steps": steps, "learning_rate": 1e-3}
        recipe = {
            **RECIPE,
            "data": {**RECIPE["data"], "corpus": f"text:{text}"},
            "adapt": {**RECIPE["adapt"], "stages": [stage]},
        }
        run = adapt(source, recipe, out=folder / "adapted")
        convert(source, folder / "dense")
        for what, path in (("source", folder / "dense"), ("adapted", run)):
            where = {"corpus": f"text:{text}", "context": 128} if what == "source" else {}
            measured = evaluate(path, batch_size=8, **where).to_dict()
            figures[what] = (measured["ways"]["executed"]["loss"], measured["flops_per_token"]["counted"])
        model = AutoModelForCausalLM.from_pretrained(run / "model")
        tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer(LINE, return_tensors="pt").input_ids
    trace = trace_tokens(model, {"input_ids": ids}, [tokenizer.decode([i]) for i in ids[0].tolist()])
    return figures, trace, type(model).__name__


@app.cell
def _():
    given = mo.cli_args()
    figures, trace, kind = compared(given.get("source"), given.get("text"), int(given.get("steps") or 40))
    for what, (loss, flops) in figures.items():
        print(f"{what:<8} loss {loss:.3f} nats a token, {flops:,.0f} FLOPs a token, as executed")
    print("the result is a Hugging Face model:", kind)
    lines = [f"| {what} | {loss:.3f} | {flops:,.0f} |" for what, (loss, flops) in figures.items()]
    mo.md("\n".join(["| model | loss, nats a token | FLOPs a token, as executed |", "|---|---:|---:|", *lines]))
    return (trace,)


@app.cell
def _(trace):
    show_trace(trace, "Which tokens the adapted model computes")
    return


if __name__ == "__main__":
    app.run()
