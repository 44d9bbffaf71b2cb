"""Route tokens around blocks of your own: a small byte-level model with and without Mixture-of-Depths.

    python examples/route_your_block.py --steps 100      # as a script
    marimo run examples/route_your_block.py              # as a page; `marimo edit` also shows the code

It trains two models on the Python sources of the standard library: one whose blocks see every token, and one in which
every second block computes only a quarter of the tokens of a row. It shows the loss, the training time, and which bytes
of a line the routed blocks kept. Both ways need `pip install 'skipstone[notebooks]'`; the script starts no server.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import sysconfig
    import time
    from pathlib import Path

    import marimo as mo
    import torch
    from torch import Tensor, nn

    from skipstone import MixtureOfDepths, Routed
    from skipstone.report import show_text

    WIDTH, BLOCKS, CONTEXT, ROWS = 96, 4, 256, 8
    LINE = b"def forward(self, hidden_states, attention_mask=None):"


@app.cell(hide_code=True)
def _():
    mo.md("""
    # Route tokens around blocks of your own

    `Routed(block, mechanism)` wraps a residual block that has no code for routing. Here, every second block of a small
    byte-level model computes a quarter of the tokens of a row; the others pass it by on the residual stream.
    """)
    return


@app.class_definition
class Block(nn.Module):
    """A residual block such as yours, with causal attention and an MLP and without any code for routing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add attention and MLP to the residual stream."""
        qkv = self.qkv(self.norm1(x_BTD)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in qkv)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        return x_BTD + self.mlp(self.norm2(x_BTD))


@app.class_definition
class Model(nn.Module):
    """A model that reads bytes and predicts the next byte. Every second block is routed if `capacity` is given."""

    def __init__(self, capacity: float | None = None) -> None:
        super().__init__()
        self.byte, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        blocks = [Block() for _ in range(BLOCKS)]
        if capacity is not None:
            for index in range(1, BLOCKS, 2):
                # "topk" keeps exactly this share of each row, so a training step never waits for a decision.
                blocks[index] = Routed(
                    blocks[index],
                    MixtureOfDepths(WIDTH, capacity=capacity, decision="topk", guidance=False, weight="raw"),
                )
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def stream(self, bytes_BT: Tensor) -> Tensor:
        """Return the residual stream before the first block."""
        return self.byte(bytes_BT) + self.position.weight[: bytes_BT.shape[1]]

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """Return the logits [B, T, 256]."""
        return self.head(self.norm(self.blocks(self.stream(bytes_BT))))


@app.function
def corpus() -> Tensor:
    """Return the Python files of the standard library as one tensor of bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


@app.function
def train(model: Model, text: Tensor, steps: int) -> tuple[float, float]:
    """Train for `steps` steps.

    Return the mean loss of the last ten in nats per byte, and the CPU seconds of all steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(0)
    losses, start = [], time.process_time()
    for _ in range(steps):
        begins = torch.randint(len(text) - CONTEXT - 1, (ROWS,), generator=draw)
        rows = torch.stack([text[begin : begin + CONTEXT + 1] for begin in begins.tolist()])
        logits = model(rows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:]), time.process_time() - start


@app.function
@torch.no_grad()
def kept(model: Model, line: bytes) -> list[list[bool]]:
    """Return which bytes each routed block computed, block by block."""
    x_BTD, found = model.stream(torch.tensor([list(line)])), []
    for block in model.blocks:
        if isinstance(block, Routed):
            # Top-k needs the whole row, so this is the decision of training; "threshold" and others can generate.
            x_BTD, records = block(x_BTD, routing="oracle", return_records=True)
            found.append(records["MixtureOfDepths"].kept_BT[0].tolist())
        else:
            x_BTD = block(x_BTD)
    return found


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
    print(f"{len(text):,} bytes of Python, {steps.value} steps of {ROWS} rows of {CONTEXT} bytes")
    models, rows = {}, []
    for name, capacity in (("every token", None), ("routed, 25 %", 0.25)):
        torch.manual_seed(0)
        models[name] = Model(capacity)
        loss, seconds = train(models[name], text, steps.value)
        rows.append(f"| {name} | {loss:.3f} | {seconds:.1f} |")
        print(f"{name:<14} loss {loss:.3f} nats a byte, {seconds:.1f} CPU seconds of training")
    routed = models["routed, 25 %"].eval()
    mo.md("\n".join(["| model | loss, nats a byte | CPU seconds of training |", "|---|---:|---:|", *rows]))
    return (routed,)


@app.cell
def _(routed):
    blocks = kept(routed, LINE)
    line = "".join(chr(byte) if keep else "·" for byte, keep in zip(LINE, blocks[0], strict=True))
    print("what the first routed block computes:", line, sep="\n")
    share = [sum(keeps) / len(blocks) for keeps in zip(*blocks, strict=True)]
    show_text(
        list(zip(LINE.decode(), share, strict=True)),
        "Which bytes the routed blocks computed",
        "{:.0%} of the routed blocks",
    )
    return


if __name__ == "__main__":
    app.run()
