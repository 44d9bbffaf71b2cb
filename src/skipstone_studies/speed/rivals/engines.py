"""The source in other engines and weight formats: transformers, torchao and llama.cpp, with the same weights.

An engine decodes greedily, one token a step, for timings; where it gives logits they are judged as any other way's.
"""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from skipstone.core.strict import PlainDict
from skipstone.generate import stream
from skipstone.measure.speed import Lap
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone_studies.speed.rivals.source import source

QUANTISED = {"F16": 1, "Q8_0": 7}  # llama.cpp's numbers of its file types
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_parameters",
    "max_position_embeddings",
)


class Engine(Protocol):
    """The interface of what decodes one row greedily and can be timed."""

    def lap(self, ids_1T: Tensor, new: int) -> Lap:
        """Time `new` greedy tokens after the prompt ids_1T, in seconds of `now`; the prompt's pass is not timed."""


def now() -> float:
    """Return CPU seconds if torch uses one thread, which other processes hardly disturb; else seconds of wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Torch:
    """The engine of a PyTorch model, ours or transformers', with a growing cache."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.eval()

    @torch.inference_mode()
    def lap(self, ids_1T: Tensor, new: int) -> Lap:
        cache = DynamicCache(config=self.model.config)
        token = self.model(ids_1T, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        start = now()
        for _ in range(new):
            token = self.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return Lap(tokens=new, seconds=now() - start, joules=None)


class Drafted:
    """The engine of our model with speculative decoding, whose number of guesses follows from measured times.

    draft: source of the guesses, as in `stream`. guessed: [tokens that the draft had proposed, all tokens] so far.
    """

    def __init__(self, model: SkipstoneForCausalLM, draft: str) -> None:
        self.model, self.draft, self.guessed = model.eval(), draft, [0, 0]

    def lap(self, ids_1T: Tensor, new: int) -> Lap:
        steps = stream(self.model, ids_1T, max_new_tokens=new + 1, eos_token_id=[], draft=self.draft)
        next(steps)
        start = now()
        found = [bool(step.guessed_B) for step in steps]
        self.guessed = [self.guessed[0] + sum(found), self.guessed[1] + new]
        return Lap(tokens=new, seconds=now() - start, joules=None)


class PromptLookup:
    """The engine of transformers' own prompt lookup, with transformers' Llama.

    count: tokens guessed at a time (`prompt_lookup_num_tokens`).
    """

    def __init__(self, model: LlamaForCausalLM, count: int) -> None:
        self.model, self.count = model, count

    @torch.inference_mode()
    def lap(self, ids_1T: Tensor, new: int) -> Lap:
        """Time the tokens after the first, as the difference of two calls of `generate`."""
        options: PlainDict = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        seconds = []
        for count, more in ((1, {}), (new + 1, {"prompt_lookup_num_tokens": self.count})):
            start = now()
            self.model.generate(ids_1T, max_new_tokens=count, **options, **more)
            seconds.append(now() - start)
        return Lap(tokens=new, seconds=seconds[1] - seconds[0], joules=None)


class LlamaCpp:
    """The engine of llama.cpp through its Python bindings, which a user installs: `pip install llama-cpp-python`.

    name: the name of the source model, a file in SKIPSTONE_DATA. format: "F16", "Q8_0", or anything else for the file
    as it is. folder: where the file in another format is written. threads: CPU threads.
    """

    def __init__(self, name: str, format: str, folder: Path, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.lib, self.file = llama_cpp, folder / f"{format}.gguf"
        options = llama_cpp.llama_model_quantize_default_params()
        given = Path(os.environ["SKIPSTONE_DATA"], f"{name}.gguf")
        options.ftype, options.allow_requantize, options.nthread = QUANTISED.get(format, 0), True, threads
        if format not in QUANTISED:
            self.file = given
        elif llama_cpp.llama_model_quantize(str(given).encode(), str(self.file).encode(), options) != 0:
            raise ValueError(f"llama.cpp does not write {format} of {str(given)!r}")
        self.model = llama_cpp.Llama(
            str(self.file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def _feed(self, ids: list[int]) -> Any:
        """Return the logits of the last token."""
        self.model.eval(ids)
        at = self.lib.llama_get_logits_ith(self.model.ctx, -1)
        return np.ctypeslib.as_array(at, shape=(self.model.n_vocab(),))

    def lap(self, ids_1T: Tensor, new: int) -> Lap:
        self.model.reset()
        token = int(self._feed(ids_1T[0].tolist()).argmax())
        start = now()
        for _ in range(new):
            token = int(self._feed([token]).argmax())
        return Lap(tokens=new, seconds=now() - start, joules=None)

    def logits(self, ids_1T: Tensor) -> Tensor:
        """Return the logits [T, V] of every token of ids_1T, fed one by one."""
        self.model.reset()
        return torch.stack([torch.tensor(self._feed([token])) for token in ids_1T[0].tolist()])

    def bytes(self) -> float:
        return self.file.stat().st_size


def llama(name: str) -> LlamaForCausalLM:
    """Return transformers' Llama with the weights of the source `name`.

    Raises ValueError if the source does not compute what a Llama computes.
    """
    ours = source(name)
    values = {field: getattr(ours.config, field) for field in SHARED}
    tied, eps = ours.head_is_tied, ours.config.norm_eps
    config = LlamaConfig(**values, rms_norm_eps=eps, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(ours.state_dict())
    ids_1T = torch.arange(5)[None]
    with torch.inference_mode():
        if not torch.allclose(model(ids_1T).logits, ours(ids_1T).logits, rtol=1e-3, atol=1e-3):
            raise ValueError(f"{name!r} does not compute what transformers' Llama computes")
    return model


def torchao(name: str, bits: int) -> tuple[nn.Module, float]:
    """Return the source with linear layers in torchao's format, and the bytes of weights that a token reads.

    name: the name of the source model. bits: 8, or 4 (in groups of 32, stored in one byte each on a CPU). The tied
    output head keeps 4 bytes a weight, because torchao does not change it.
    """
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    model = copy.deepcopy(source(name))
    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32))  # type: ignore[attr-defined]
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    small, scales = sum(m.weight.numel() for m in layers), sum(m.weight.shape[0] for m in layers)
    quantize_(model, config, filter_fn=lambda module, path: isinstance(module, nn.Linear) and path != "lm_head")
    rest = sum(p.numel() for p in source(name).parameters()) - small
    return model, small + 4 * (rest + (scales if bits == 8 else small // 32))
