"""Loading of the dense checkpoint to start from, of its tokenizer and of a teacher with the same tokens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.pretrained import load_pretrained, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_dense(source: str, dtype: str = "float32") -> SkipstoneForCausalLM:
    """Load a dense model in evaluation mode with frozen weights.

    source: folder or Hub name of the checkpoint. dtype: name of the weights' dtype, such as "bfloat16". Raises
    FileNotFoundError or ValueError for a checkpoint that cannot be read, and ValueError for a model with mechanisms or
    quantised weights.
    """
    model = load_pretrained(source, dtype)
    if names := sorted({mechanism.placement.name for mechanism in model.routing_modules()}):
        raise ValueError(
            f"{source}: it is routed already ({', '.join(names)}); adapt a dense checkpoint, or make one of it with "
            "`skipstone convert --to dense`"
        )
    if model.config.weight_format != "float":
        kind = model.config.weight_format
        raise ValueError(f"{source}: it has {kind} weights, which cannot be trained; adapt the original, then quantise")
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def tokenizer_of(source: str, model: SkipstoneForCausalLM) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the checkpoint `source`.

    model: the checkpoint's model. Raises ValueError if there is no tokenizer, or if it has more tokens than the model.
    """
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ValueError(f"{source}: it has no tokenizer beside it; put one there, or name one as data.tokenizer")
    return checked(tokenizer, source, model)


def checked(tokenizer: PreTrainedTokenizerBase, name: str, model: SkipstoneForCausalLM) -> PreTrainedTokenizerBase:
    """Return `tokenizer` unchanged; raise ValueError if it has more tokens than the model's vocabulary.

    name: the tokenizer's name, for the message.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}")
    return tokenizer


def same_tokens(theirs: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, name: str, source: str) -> None:
    """Raise ValueError unless two tokenizers map the same tokens to the same ids.

    theirs: the tokenizer of something called `name`, such as a corpus. own: the tokenizer of the checkpoint `source`.
    The names are for the message.
    """
    if theirs.get_vocab() != own.get_vocab():
        raise ValueError(
            f"{name}: made with another tokenizer than the source's; make it with --tokenizer pretrained:{source}"
        )


def load_teacher(name: str, student: SkipstoneForCausalLM, tokenizer: PreTrainedTokenizerBase) -> SkipstoneForCausalLM:
    """Load a dense model from which the student will be distilled, in evaluation mode with frozen weights.

    name: folder or Hub name of its checkpoint. student: the model to be trained. tokenizer: the student's. Raises
    FileNotFoundError or ValueError for a checkpoint that cannot be read, and ValueError if it is not dense or if
    vocabulary size or tokenizer differ from the student's; if the teacher has no tokenizer, a message on stderr says
    so.
    """
    teacher = load_dense(name)
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"teacher {name}: its vocabulary has {theirs} tokens, the student's {ours}; they must be the same"
        )
    own = load_tokenizer(name)
    if own is None:
        print(f"skipstone: teacher {name} has no tokenizer; it is assumed to use the student's", file=sys.stderr)  # noqa: T201
    elif own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"teacher {name}: its tokenizer gives other ids than the student's; they must be the same")
    return teacher
