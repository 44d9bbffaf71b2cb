"""The model card describes the model, and says what was not measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.model.card import render_card, write_card


def build(**options: object) -> SkipstoneForCausalLM:
    return tiny_model(vocab_size=31, hidden_size=16, num_hidden_layers=4, **options).train()


@pytest.fixture
def routed() -> SkipstoneForCausalLM:
    return build(
        mechanisms=[{"name": "mixture_of_depths", "capacity": 0.25}, {"name": "token_selective", "on": "mlp"}],
        activation={"name": "polyglu"},
    )


def header(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_capacities_of_every_block(routed: SkipstoneForCausalLM) -> None:
    card = render_card(routed, title="A", realised={1: {"mixture_of_depths": 0.2471}}, losses={"causal": 1.23456})
    assert "| mixture_of_depths | 1 | 0.25 | 0.2471 |" in card
    assert "| mixture_of_depths | 3 | 0.25 | not measured |" in card
    assert "| token_selective_on_mlp | 2 | not set | not measured |" in card
    assert "| polyglu | 0 | every token | every token |" in card
    assert "| causal | 1.2346 |" in card
    assert f"| parameters | {routed.num_parameters():,} |" in card


def test_header(routed: SkipstoneForCausalLM) -> None:
    values = header(render_card(routed, title="A", source="owner/name"))
    assert values["library_name"] == "skipstone"
    assert values["base_model"] == "owner/name"
    assert {"skipstone", "mixture-of-depths", "polyglu"} <= set(values["tags"])
    assert "license" not in values
    assert "base_model" not in header(render_card(routed, title="A", source="a-folder"))


def test_a_dense_model_that_nobody_measured() -> None:
    card = render_card(build(), title="A")
    assert "None: every token passes every block." in card
    assert "Not measured." in card


def test_the_same_model_has_the_same_card(routed: SkipstoneForCausalLM) -> None:
    assert render_card(routed, title="A") == render_card(routed, title="A")


def test_only_our_own_card_is_replaced(tmp_path: Path) -> None:
    model = build()
    write_card(model, tmp_path, title="A")
    write_card(model, tmp_path, title="B")
    assert "# B" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not overwritten"):
        write_card(model, tmp_path, title="C")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
