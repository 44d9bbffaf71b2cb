"""Add a mechanism of your own: a gate that is trained to close where an update is not worth its price.

    python examples/add_a_mechanism.py --steps 120       # as a script
    marimo run examples/add_a_mechanism.py               # as a page; `marimo edit` also shows the code

The mechanism is one class and one call of `register`. Decoder, trainer, cost model and pictures then work with it;
docs/add-a-mechanism.md lists what a mechanism may declare. Both ways need
`pip install 'skipstone[notebooks]'`; the script starts no server.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import sysconfig
    from dataclasses import dataclass
    from pathlib import Path

    import marimo as mo
    import torch
    from torch import Tensor, nn
    from transformers import TrainingArguments
    from transformers import initialization as init

    from skipstone import SkipstoneConfig, SkipstoneForCausalLM
    from skipstone.core.records import Records
    from skipstone.core.seam import Update
    from skipstone.core.tokens import Tokens, real_mask
    from skipstone.measure.trace import trace_tokens
    from skipstone.mechanisms import DEPTH, DepthMechanism, Placement, register
    from skipstone.mechanisms.gating import apply_gate, is_hard
    from skipstone.ops import score_linear
    from skipstone.report import show_trace
    from skipstone.train import RoutingTrainer

    CONTEXT, ROWS = 128, 8
    LINE = "class Sluice(DepthMechanism):\n    def forward(self, update, x, tokens):"


@app.cell(hide_code=True)
def _():
    mo.md("""
    # Add a mechanism

    Options are a frozen dataclass. `forward` receives the update that the mechanism wraps, the residual stream and the
    tokens, and returns what is added to the stream with a record of its decision.
    """)
    return


@app.class_definition
@dataclass(frozen=True, kw_only=True)
class SluiceConfig:
    """threshold: gain at and below which a causal pass skips a token. price: of an open sluice in the loss."""

    threshold: float = 0.5
    price: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")


@app.class_definition
class Sluice(DepthMechanism):
    """A token's update is scaled by sigmoid(w . x + b); a causal pass skips tokens with gains up to `threshold`."""

    Config = SluiceConfig
    config: SluiceConfig
    default_layers = "1:"
    has_auxiliary_loss = True

    def __init__(
        self, hidden_size: int, placement: Placement | None = None, config: object = None, **options: object
    ) -> None:
        super().__init__(hidden_size, placement, config, **options)
        self.weight, self.bias = nn.Parameter(torch.empty(1, hidden_size)), nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Open the sluice for most tokens."""
        init.normal_(self.weight, 0.0, 0.1)
        init.constant_(self.bias, 1.0)

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return the gated update, and the record of who is kept."""
        score_BT = score_linear(x_BTD, self.weight, self.bias).squeeze(-1)
        open_BT, reached_BT, kept_BT = score_BT.sigmoid(), real_mask(tokens, score_BT), None
        if is_hard("hard", tokens):  # in training the gain is soft, and every token is computed
            kept_BT = open_BT > self.config.threshold if tokens.forced_BT is None else tokens.forced_BT
            kept_BT = kept_BT & reached_BT
        delta_BTD, inner = apply_gate(update, x_BTD, tokens, open_BT, kept_BT)
        shown_BT = reached_BT if kept_BT is None else kept_BT
        records = self.record(
            score_BT=score_BT,
            kept_BT=shown_BT,
            weight_BT=torch.where(shown_BT, open_BT, 0.0),
            reached_BT=reached_BT,
            loss_BT=torch.where(reached_BT, open_BT, 0.0) * (self.config.price / self.placement.count),
        )
        return delta_BTD, {**records, **inner}

    @torch.no_grad()
    def set_identity(self) -> None:
        """Open the sluice for every token, as if it were not there."""
        self.weight.zero_()
        self.bias.fill_(8.0)

    def flops(self, tokens: float, routing: str) -> float:
        """Return the FLOPs of the scores of `tokens` tokens."""
        return 2 * tokens * self.weight.numel()


@app.function
def rows(number: int) -> list[dict[str, Tensor]]:
    """Return rows of bytes from the standard library; a causal model's labels are its inputs."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
    draw = torch.Generator().manual_seed(0)
    begins = torch.randint(len(text) - CONTEXT, (number,), generator=draw).tolist()
    parts = [torch.tensor(list(text[begin : begin + CONTEXT])) for begin in begins]
    return [{"input_ids": part, "labels": part} for part in parts]


@app.cell
def _():
    DEPTH.pop("sluice", None)  # a cell runs again whenever what it uses is edited
    register("sluice", Sluice)
    steps = mo.ui.slider(
        1, 400, value=int(mo.cli_args().get("steps") or 120), label="training steps", show_value=True, debounce=True
    )
    price = mo.ui.slider(
        0.0, 0.5, step=0.05, value=0.2, label="price of an open sluice", show_value=True, debounce=True
    )
    mo.hstack([steps, price], justify="start")
    return price, steps


@app.cell
def _(price, steps):
    torch.manual_seed(0)
    sluice = {"name": "sluice", "layers": "1:", "price": price.value}
    model = SkipstoneForCausalLM(SkipstoneConfig(hidden_size=96, num_hidden_layers=4, mechanisms=[sluice]))
    arguments = TrainingArguments(
        "unused", max_steps=steps.value, per_device_train_batch_size=ROWS, learning_rate=3e-3, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=max(1, steps.value // 4),
    )  # fmt: skip
    RoutingTrainer(model=model, args=arguments, train_dataset=rows(steps.value * ROWS)).train()
    model.eval()
    return (model,)


@app.cell
def _(model):
    ids = torch.tensor([list(LINE.encode())])
    trace = trace_tokens(model, {"input_ids": ids}, list(LINE))
    print(f"updates that a causal pass computes: {trace.depth:.0%}")
    show_trace(trace, "For whom the sluices are open")
    return ids, trace


@app.cell
def _(ids, model, trace):
    with torch.no_grad():
        gathered = model(ids, routing="causal").logits
        masked = model(ids, routing="causal", executor="masked").logits
        shorter = model(ids[:, :20], routing="causal").logits
    told = [
        f"FLOPs a token: {trace.flops:,.0f}, {trace.flops / trace.dense_flops:.0%} of the dense model's",
        f"computing the kept tokens alone changes logits by at most {(gathered - masked).abs().max():.0e}",
        f"later tokens change earlier logits by at most {(gathered[:, :20] - shorter).abs().max():.0e}",
    ]
    print(*told, sep="\n")
    mo.md("\n".join(f"- {line}" for line in told))
    return


if __name__ == "__main__":
    app.run()
