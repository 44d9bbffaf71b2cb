"""Two mechanisms that are defined in this file only work everywhere, so a mechanism needs no code outside of its file.

`Valve` has a router with a name of its own, a threshold, a schedule and an auxiliary loss. `RowDropout` has none of
these: in training, random whole rows skip a block. docs/add-a-mechanism.md explains the former step by step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import initialization as init

from adapt.sources import recipe as adapt_recipe
from adapt.sources import run as adapted
from adapt.sources import save_source
from pages import Page, unformatted
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.counts import TokenCounts
from skipstone.core.noise import row_noise
from skipstone.core.records import Records, lift
from skipstone.core.seam import Update
from skipstone.core.tokens import Tokens, real_mask
from skipstone.evaluate.budget_curve import calibrate_run
from skipstone.evaluate.evaluation import evaluate
from skipstone.generate.text_generation import stream_text
from skipstone.mechanisms import DEPTH, DepthMechanism, Placement, register
from skipstone.mechanisms.gating import apply_gate, is_hard
from skipstone.mechanisms.option_threshold import OptionThreshold
from skipstone.ops import score_linear
from skipstone.report.rendering import write_report
from skipstone.runs import Run
from skipstone.train.estimate import estimate
from skipstone.train.watch import Interrupted
from train.tool import DENSE, at_step, equal, lines, recipe, train, weights

ROOT = Path(__file__).resolve().parents[2]
OPEN = 8.0  # a gain of 1 - 3e-4, whose gradient is still alive
pytestmark = pytest.mark.usefixtures("registered")


@dataclass(frozen=True, kw_only=True)
class ValveConfig:
    """threshold: gain at and below which a causal pass skips a token. price: of an open valve in the loss."""

    threshold: float = 0.5
    price: float = 0.01
    execution: Literal["hard", "soft"] = "hard"


class Valve(DepthMechanism):
    """A token's update is scaled by sigmoid(sharpness * (w . x + b)); sharpness rises from 1 to 1.5 in training."""

    Config = ValveConfig
    config: ValveConfig
    default_layers = "1:"
    budget_by = "threshold"
    has_auxiliary_loss = True
    sharpness: Tensor

    def __init__(
        self, hidden_size: int, placement: Placement | None = None, config: Any = None, **options: Any
    ) -> None:
        super().__init__(hidden_size, placement, config, **options)
        self.scorer = nn.Parameter(torch.empty(1, hidden_size))
        self.scorer_bias = nn.Parameter(torch.empty(1))
        self.register_buffer("sharpness", torch.ones(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.scorer, 0.0, 0.1)
        init.constant_(self.scorer_bias, 2.0)
        init.ones_(self.sharpness)

    @property
    def skips(self) -> bool:
        return self.config.execution == "hard"

    def score_threshold(self) -> OptionThreshold | None:
        return OptionThreshold(self, keeps_above=True) if self.skips else None

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        score_BT = self.sharpness * score_linear(x_BTD, self.scorer, self.scorer_bias).squeeze(-1)
        open_BT, reached_BT, kept_BT = score_BT.sigmoid(), real_mask(tokens, score_BT), None
        if is_hard(self.config.execution, tokens):
            # compared as a score, which fp32 resolves where gains are all 1
            least = OptionThreshold(self, keeps_above=True).get()
            kept_BT = score_BT > least if tokens.forced_BT is None else tokens.forced_BT
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

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        self.sharpness.fill_(1 + progress / 2)

    def moving(self) -> dict[str, Tensor]:
        return {self.log_name("sharpness"): self.sharpness}

    @torch.no_grad()
    def set_identity(self) -> None:
        self.scorer.zero_()
        self.scorer_bias.fill_(OPEN)

    def flops(self, tokens: float, routing: str) -> float:
        return 2 * tokens * self.scorer.numel()


@dataclass(frozen=True, kw_only=True)
class RowDropoutConfig:
    """rate: probability with which a row skips the block in training."""

    rate: float = 0.5


class RowDropout(DepthMechanism):
    """In training with noise whole rows skip the block by chance; otherwise nothing happens."""

    Config = RowDropoutConfig
    config: RowDropoutConfig
    skips = False

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        score_BT = x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.promote_types(x_BTD.dtype, torch.float32))
        reached_BT = real_mask(tokens, score_BT)
        kept_BT, inner = reached_BT, {}
        if tokens.forced_BT is not None:
            kept_BT = tokens.forced_BT & reached_BT
        elif tokens.mode.noise and tokens.mode.routing == "oracle":
            kept_B = row_noise(tokens, self.placement.noise_key, len(x_BTD)) >= self.config.rate
            kept_BT = kept_B[:, None] & reached_BT
        if kept_BT is reached_BT:
            delta_BTD, inner = update(x_BTD, tokens)
        else:
            part = tokens.select_kept(kept_BT)
            delta_BTD = x_BTD * 0
            if not part.is_empty:
                delta_BKD, found = update(part.gather(x_BTD), tokens.select(part))
                delta_BTD, inner = part.scatter(delta_BKD), lift(found, part, tokens.state)
        weight_BT = kept_BT.to(score_BT.dtype)
        records = self.record(score_BT=score_BT, kept_BT=kept_BT, weight_BT=weight_BT, reached_BT=reached_BT)
        return delta_BTD, {**records, **inner}

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        return counts if kept is None else counts.restricted_to(kept)

    def set_identity(self) -> None:
        """Nothing: without noise it is not there."""

    def flops(self, tokens: float, routing: str) -> float:
        return 0


TOYS: dict[str, type[DepthMechanism]] = {"valve": Valve, "row_dropout": RowDropout}


def pytest_configure() -> None:
    """With `-p mechanisms.test_toy_mechanism` the laws find both in the table when they are collected."""
    for name, kind in TOYS.items():
        register(name, kind)


@pytest.fixture
def registered() -> Iterator[None]:
    for name, kind in TOYS.items():
        register(name, kind)
    yield
    for name in TOYS:
        del DEPTH[name]


@pytest.mark.parametrize("name", TOYS)
def test_some_laws_hold(name: str) -> None:
    """Those that a newcomer met as errors before laws asked for declarations."""
    from laws import test_builders, test_cost, test_executors, test_gradients, test_losses, test_records, test_rows
    from laws.builders import case, entry

    alone, nested = case(entry(name)), case(entry("mixture_of_depths"), entry(name), activation="polyglu")
    for chosen in (alone, nested):
        test_builders.test_decisions_are_not_trivial(chosen)
        test_executors.test_oracle(chosen, noise=True)
        test_executors.test_causal_with_padding(chosen)
        test_gradients.test_every_parameter_learns_from_the_first_step(chosen)
        test_losses.test_labels_equal_shift_labels_and_the_parts_add_up(chosen)
        test_records.test_records_are_complete_and_consistent(chosen)
        test_cost.test_training_executes_what_cost_says(chosen, 1)
    test_rows.test_a_step_waits_as_often_as_its_mechanisms_declare(alone)
    test_records.test_inner_records_are_lifted_to_the_outer_row(name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TOYS)
def test_all_laws_hold(name: str) -> None:
    """On the quick suite's cover: alone, outside and inside of another mechanism, at every site."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/laws"]
    command += ["-p", "mechanisms.test_toy_mechanism", "-k", name, "-m", "not slow"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))}
    environment.pop("PYTEST_XDIST_WORKER", None)
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:]
    passed = int(found.stdout.rstrip().splitlines()[-1].split(" passed")[0].split()[-1].strip("="))
    assert passed >= 40


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="mechanism 'valve' is registered already"):
        register("valve", Valve)


def test_what_bf16_loading_leaves_alone(tmp_path: Path) -> None:
    """Router and schedule stay fp32, unasked; the decoder's own weights do not."""
    config = SkipstoneConfig(**DENSE, vocab_size=31, mechanisms=[{"name": "valve"}])
    SkipstoneForCausalLM(config).save_pretrained(tmp_path)
    loaded = SkipstoneForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    types = {name: x.dtype for name, x in loaded.state_dict().items()}
    own = {dtype for name, dtype in types.items() if ".valve." in name}
    assert own == {torch.float32}
    assert {dtype for name, dtype in types.items() if ".valve." not in name} == {torch.bfloat16}
    assert loaded(torch.arange(8)[None]).logits.isfinite().all()


def test_default_layers_costs_and_decay() -> None:
    from skipstone.train.decay import kinds_of

    config = SkipstoneConfig(**DENSE, vocab_size=31, mechanisms=[{"name": "valve"}])
    model = SkipstoneForCausalLM(config)
    assert [len(block.mechanisms) for block in model.model.layers] == [0, 1]
    assert model.cost(tokens=10).forward.router == 2 * 10 * 32
    kinds = {n.rpartition(".")[2]: kind for n, kind in kinds_of(model).items() if ".valve." in n}
    assert kinds == {"scorer": "routers", "scorer_bias": "biases"}


def test_the_page_has_the_code_of_this_file() -> None:
    """But for indentation and empty lines, which are a formatter's affair."""
    blocks = Page("docs/add-a-mechanism.md").blocks()
    assert len(blocks) >= 4
    assert all(unformatted(block) in unformatted(Path(__file__).read_text(encoding="utf-8")) for block in blocks)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toys")


@pytest.mark.usefixtures("coarse_tables")
def test_a_run_is_trained_resumed_and_read_everywhere(folder: Path) -> None:
    """Both in one model: train, stop and resume, evaluate, generate, estimate, report, budget."""
    mechanisms = [{"name": "valve", "layers": ":"}, {"name": "row_dropout", "layers": ":", "rate": 0.3}]
    config = recipe(folder, {**DENSE, "mechanisms": mechanisms})
    assert estimate(config).flops > 0
    whole = train(config, folder / "whole")
    stopped = folder / "stopped"
    with at_step(7, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(config, stopped)
    train(config, stopped, resume=True)
    assert equal(weights(whole), weights(stopped))
    assert lines(whole) == lines(stopped)
    logged = [line for line in Run(whole).metrics() if line["split"] == "train"]
    assert [line["sharpness/1/valve"] for line in logged] == pytest.approx([1 + line["step"] / 24 for line in logged])
    assert all(0 < line["capacity/1/row_dropout"] <= 1 for line in logged)
    assert {"capacity/0/valve", "gate/1/valve"} <= set(logged[0])
    found = evaluate(whole)
    assert json.loads(json.dumps(found.to_dict()))
    assert "".join(piece.text for piece in stream_text(whole, prompt="It was", max_new_tokens=5, greedy=True))
    assert "valve" in write_report([whole], out=folder / "report.html").read_text(encoding="utf-8")
    assert calibrate_run(whole, rows=4).budget_table.points


@pytest.mark.slow
def test_a_dense_model_is_adapted(folder: Path, source: Path) -> None:
    """The valve starts open, learns the budget's share and meets it by its threshold."""
    config = adapt_recipe(folder, {"mechanisms": [{"name": "valve", "layers": "1:"}]}, {"budget": 0.8})
    result = Run(adapted(source, config, folder / "adapted")).result()
    assert result["neutral_start"]["difference"] <= 1e-3 * result["neutral_start"]["largest"]
    assert result["within_budget"]
