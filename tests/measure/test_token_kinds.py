"""Loss and depth by kind of token agree with a slow reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.generate.folders import write_run

from skipstone.evaluate.evaluation import evaluate
from skipstone.measure.losses import TokenKinds, depths, token_nats
from skipstone.runs import Run

MOD = {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.5}
GATE = {"name": "token_selective", "layers": [3], "start_bias": 0.0, "threshold": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a stone that skips over water, and another that sinks.\n" * 300, encoding="utf-8")
    data = {"corpus": f"mixed:text:{path}", "context": 48, "validation_rows": 9}
    return write_run(tmp_path / "run", data, [MOD, GATE])


def test_a_mixed_stream_is_told_apart(run: Path) -> None:
    found = evaluate(run, batch_size=4)
    model, data = Run(run).load_model(), Run(run).data()
    sums: dict[str, list[float]] = {kind: [0.0, 0.0, 0.0, 0.0] for kind in ("operations", "fillers", "text")}
    for row in data.validation:
        with torch.no_grad():
            out = model(row["input_ids"][None], routing="causal", output_records=True)
        nats = token_nats(out.logits, row["shift_labels"][None])[0]
        for t, difficulty in enumerate(row["difficulty"].tolist()):
            kind = "operations" if difficulty >= 0 else "fillers" if difficulty == -1 else "text"
            depth = sum(all(bool(r.kept_BT[0, t]) for r in decided.values()) for decided in out.records)
            for i, value in enumerate((float(nats[t]), float(row["shift_labels"][t] != -100), depth, 1)):
                sums[kind][i] += value
    kinds = found.measured["executed"].kinds
    assert kinds is not None
    for kind, (nats_sum, predictions, depth_sum, tokens) in sums.items():
        assert kinds[kind]["loss"] == pytest.approx(nats_sum / predictions, abs=1e-5)
        assert kinds[kind]["depth"] == pytest.approx(depth_sum / tokens)
    assert "by kind of token" in found.markdown()
    assert {"oracle", "causal", "executed", "forced"} == set(found.measured)


def test_right_tokens_are_counted(run: Path) -> None:
    found = evaluate(run, batch_size=4)
    model, data, right, asked = Run(run).load_model(), Run(run).data(), 0, 0
    for row in data.validation:
        with torch.no_grad():
            guess = model(row["input_ids"][None], routing="causal").logits[0].argmax(-1)
        right += int((guess == row["shift_labels"]).sum())
        asked += int((row["shift_labels"] != -100).sum())
    assert found.to_dict()["ways"]["executed"]["token_accuracy"] == pytest.approx(right / asked)


def test_padding_belongs_to_no_kind() -> None:
    nats, target = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[5, 6, -100]])
    real, difficulty = torch.tensor([[True, True, False]]), torch.tensor([[3, -1, -1]])
    kinds = TokenKinds()
    kinds.add(nats, target, [{}, {}], difficulty, real)
    assert kinds.result() == {"operations": {"loss": 1.0, "depth": 2.0}, "fillers": {"loss": 2.0, "depth": 2.0}}
    assert depths([{}, {}], real).tolist() == [[2, 2, 0]]
