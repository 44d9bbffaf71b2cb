"""Saved models that were changed by other code: untied heads, tokenizers of a single file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.adapt.export import export_dense
from skipstone.data.tokenizers import byte_tokenizer
from skipstone.model.card import write_card
from skipstone.runs import Run


def test_a_head_untied_since_is_exported_as_it_is(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, tie_word_embeddings=True)).eval()
    assert model.head_is_tied
    model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
    assert not model.head_is_tied
    write_card(model, tmp_path, title="untied")
    assert "(untied head)" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path / "ours")
    export_dense(tmp_path / "ours", tmp_path / "dense")
    ids = torch.arange(12)[None]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(dense(ids).logits, model(ids).logits)


def test_a_tokenizer_of_one_file_is_found(tmp_path: Path) -> None:
    sizes = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    SkipstoneForCausalLM(SkipstoneConfig(**sizes)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert (tmp_path / "tokenizer.json").is_file()
    tokenizer = Run(tmp_path).load_tokenizer()
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("Hi")["input_ids"], skip_special_tokens=True) == "Hi"
