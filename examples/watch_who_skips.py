"""Watch which tokens skip: train a small routed model for a minute and show its depth map of a line of code.

    python examples/watch_who_skips.py --steps 80        # as a script
    marimo run examples/watch_who_skips.py               # as a page; `marimo edit` also shows the code

A byte-level model with Mixture-of-Depths on every second block learns from the Python sources of the standard library.
Then a text is shown with the blocks that computed each character; on the page, type another one. The script prints it.
Both ways need `pip install 'skipstone[notebooks]'`; the script starts no server.
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium")

with app.setup:
    import sysconfig
    from collections import defaultdict
    from pathlib import Path

    import marimo as mo
    import torch
    from transformers import TrainingArguments

    from skipstone import SkipstoneConfig, SkipstoneForCausalLM
    from skipstone.measure.token_trace import TokenTrace
    from skipstone.measure.trace import trace_tokens
    from skipstone.report import show_trace
    from skipstone.train import RoutingTrainer

    CONTEXT, ROWS = 192, 8
    LINE = "    def forward(self, hidden_states, mask=None):\n        return self.norm(x + 1)"


@app.cell(hide_code=True)
def _():
    mo.md("""
    # Watch who skips

    Four blocks, of which the second and the fourth compute about three tenths of the characters. The threshold that
    decides follows the scores while the model trains. A decision looks at the past alone, so generation can make it.
    """)
    return


@app.function
def rows(number: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of bytes from the standard library; a causal model's labels are its inputs."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py"))[:60])
    draw = torch.Generator().manual_seed(0)
    begins = torch.randint(len(text) - CONTEXT, (number,), generator=draw).tolist()
    parts = [torch.tensor(list(text[begin : begin + CONTEXT])) for begin in begins]
    return [{"input_ids": part, "labels": part} for part in parts]


@app.function
def trained(steps: int) -> SkipstoneForCausalLM:
    """Train a model of four blocks, two of them routed. `RoutingTrainer` is a Trainer that also advances thresholds."""
    torch.manual_seed(0)
    routed = {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.3, "decision": "ema_threshold"}
    config = SkipstoneConfig(hidden_size=96, num_hidden_layers=4, mechanisms=[routed])
    arguments = TrainingArguments(
        "unused", max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=3e-3, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=max(1, steps // 4),
    )  # fmt: skip
    model = SkipstoneForCausalLM(config)
    RoutingTrainer(model=model, args=arguments, train_dataset=rows(steps * ROWS)).train()
    return model.eval()


@app.function
def traced(model: SkipstoneForCausalLM, text: str) -> TokenTrace:
    """Return which characters each block computed, decided causally as in generation."""
    characters = text.encode("latin-1", "replace")[:CONTEXT]
    return trace_tokens(model, {"input_ids": torch.tensor([list(characters)])}, list(characters.decode("latin-1")))


@app.cell
def _():
    steps = mo.ui.slider(
        1, 400, value=int(mo.cli_args().get("steps") or 80), label="training steps", show_value=True, debounce=True
    )
    steps
    return (steps,)


@app.cell
def _(steps):
    model = trained(steps.value)
    promised = model.cost(tokens=CONTEXT)
    told = f"FLOPs a token: {promised.forward_per_token.total:,.0f}, {promised.ratio:.0%} of the dense model's"
    print(told)
    mo.md(told)
    return (model,)


@app.cell
def _():
    typed = mo.ui.text_area(value=LINE, label="text", rows=3, full_width=True)
    typed
    return (typed,)


@app.cell
def _(model, typed):
    trace = traced(model, typed.value or LINE)
    show_trace(trace, "Which characters the blocks computed")
    return (trace,)


@app.cell
def _(trace):
    routed_blocks = sorted(trace.routed)
    print(f"\n{''.join(trace.tokens)}\n")
    for number in routed_blocks:
        block = trace.kept_LT[number]
        shown = "".join("\n" if c == "\n" else c if keep else "·" for c, keep in zip(trace.tokens, block, strict=True))
        print(f"computed by block {number} ({sum(block) / len(block):.0%} of the characters):\n{shown}\n")
    received = defaultdict(set)
    for at, character in enumerate(trace.tokens):
        received[sum(trace.kept_LT[number][at] for number in routed_blocks)].add(character)
    told_by_count = [
        f"{count} of {len(routed_blocks)} routed blocks: {''.join(sorted(received[count])).strip()}"
        for count in sorted(received, reverse=True)
    ]
    print(*told_by_count, sep="\n")
    mo.md("\n".join(f"- {said.partition(':')[0]}: `` {said.partition(':')[2].strip()} ``" for said in told_by_count))
    return


if __name__ == "__main__":
    app.run()
