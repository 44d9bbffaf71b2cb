"""Route tokens around the blocks of a decoder that Skipstone has no code for: a small mixture of experts.

    python examples/route_any_decoder.py --steps 100     # as a script
    marimo run examples/route_any_decoder.py             # as a page; `marimo edit` also shows the code

It trains a byte-level Qwen3-MoE of transformers on the Python sources of the standard library, puts Mixture-of-Depths
around every second block in place, and trains on. It shows losses, the FLOPs that execute, and what the model writes
with its own cache and without. Both ways need `pip install 'skipstone[notebooks]'`; the script starts no server.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import sysconfig
    from collections.abc import Callable
    from pathlib import Path

    import marimo as mo
    import torch
    from torch import Tensor
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    import skipstone
    from skipstone.measure.flops import count_flops

    CONTEXT, ROWS = 128, 8


@app.cell(hide_code=True)
def _():
    mo.md("""
    # Route any decoder, in place

    `skipstone.route(model, mechanisms)` puts mechanisms around the blocks of a decoder of transformers and leaves the
    model what it was: its own class, its own cache, its own masks.
    """)
    return


@app.function
def decoder() -> Qwen3MoeForCausalLM:
    """Return a decoder that reads bytes and predicts the next byte."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, max_position_embeddings=CONTEXT,
        pad_token_id=None, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


@app.function
def corpus() -> Tensor:
    """Return the Python files of the standard library as one tensor of bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


@app.function
def train(model: Qwen3MoeForCausalLM, text: Tensor, steps: int, after: Callable[[float], None]) -> float:
    """Train for `steps` steps and return the mean loss of the last ten in nats per byte.

    after: called after each step with the progress, from 0 to 1.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        begins = torch.randint(len(text) - CONTEXT, (ROWS,), generator=draw)
        rows = torch.stack([text[begin : begin + CONTEXT] for begin in begins.tolist()])
        loss = model.train()(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after((step + 1) / steps)
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


@app.function
@torch.no_grad()
def measured(model: Qwen3MoeForCausalLM, text: Tensor) -> str:
    """Return the loss on rows that were not used in training, and FLOPs per token."""
    rows = text[-ROWS * CONTEXT :].view(ROWS, CONTEXT)
    loss = model.eval()(rows, labels=rows).loss
    flops = count_flops(lambda: model(rows)).total / rows.numel()
    return f"loss {loss:.3f} nats a byte, {flops:,.0f} FLOPs a token"


@app.cell
def _():
    steps = mo.ui.slider(
        1, 400, value=int(mo.cli_args().get("steps") or 100), label="training steps", show_value=True, debounce=True
    )
    steps
    return (steps,)


@app.cell
def _(steps):
    text = corpus()
    model = decoder()
    train(model, text[: -ROWS * CONTEXT], steps.value, after=lambda progress: None)
    dense = measured(model, text)
    mechanisms = [{"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.25}]
    routed = skipstone.route(model, mechanisms, dense_start=True)  # computes what the dense model computes, at first
    # The capacity falls, and thresholds follow the scores.
    train(model, text[: -ROWS * CONTEXT], steps.value, after=routed.advance)
    told = [f"dense:  {dense}", f"routed: {measured(model, text)}"]
    told.append(f"tokens times blocks that were computed: {routed.kept_share():.0%}")
    print(*told, sep="\n")
    mo.md("\n".join(f"- {line}" for line in told))
    return (model,)


@app.cell
def _(model):
    prompt = torch.tensor([list(b"def forward(self")])
    write = {"max_new_tokens": 24, "do_sample": False}
    with_cache, without = (model.generate(prompt, use_cache=cached, **write) for cached in (True, False))
    written = bytes(with_cache[0].tolist()).decode(errors="replace")
    same = f"the same without a cache: {torch.equal(with_cache, without)}"
    print(written, same, sep="\n")
    mo.vstack([mo.plain_text(written), mo.md(same)])
    return


if __name__ == "__main__":
    app.run()
