"""A checkpoint, the source, in other engines and weight formats: transformers, torchao and llama.cpp.

An engine decodes greedily, one token a step, and is timed. All have the source's weights, some of them rounded.
llama.cpp's also returns logits, which tell how far its predictions are from the source's.
"""

from __future__ import annotations

import copy
import logging
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
    """The interface of an engine, which decodes one row greedily and is timed."""

    def lap(self, ids_1T: Tensor, new: int) -> Lap:
        """Time the greedy decoding of `new` tokens after the prompt `ids_1T` (T token ids, int64 [1, T]).

        The pass over the prompt is not timed. The result has `tokens` (`new`) and `seconds`. Seconds are CPU time if
        torch uses one thread, else wall time.
        """


def now() -> float:
    """Return the time in seconds on the clock of all engines: CPU time if torch uses one thread, else wall time.

    Other processes hardly disturb CPU time, but it adds up over threads.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Torch:
    """The engine of a PyTorch model, ours or transformers', which decodes greedily with a cache that grows.

    An engine decodes one row token by token and is timed. model: the model.
    """

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
    """The engine of our model with speculative decoding: it decodes one row greedily and is timed.

    model: the model. draft: what proposes tokens: "lookup" (earlier text), "exit" or "exit:N" (the first half, or first
    N, of the blocks), "skip" (every other block), "int8" or "int4" (the model in fewer bits), "budget:SHARE" (the model
    at fewer FLOPs), "head" (a trained draft head) or the folder of another model. Attribute `guessed`: [number of
    decoded tokens that a draft had proposed, number of all decoded tokens], over all timings so far.
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
    """The engine of transformers' Llama with transformers' prompt lookup decoding (guesses copied from the prompt).

    An engine decodes one row greedily and is timed. model: the Llama, of transformers. count: number of tokens guessed
    at a time (`prompt_lookup_num_tokens`).
    """

    def __init__(self, model: LlamaForCausalLM, count: int) -> None:
        self.model, self.count = model, count

    @torch.inference_mode()
    def lap(self, ids_1T: Tensor, new: int) -> Lap:
        """Time the decoding of `new` tokens after the prompt `ids_1T`, with transformers' prompt lookup.

        The result has `tokens` (`new`) and `seconds`, the time of generating `new` + 1 tokens minus that of generating
        the first one.
        """
        options: PlainDict = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        seconds = []
        for count, more in ((1, {}), (new + 1, {"prompt_lookup_num_tokens": self.count})):
            start = now()
            self.model.generate(ids_1T, max_new_tokens=count, **options, **more)
            seconds.append(now() - start)
        return Lap(tokens=new, seconds=seconds[1] - seconds[0], joules=None)


class LlamaCpp:
    """The engine of llama.cpp through its Python bindings, which the user installs: `pip install llama-cpp-python`.

    It decodes one row greedily, up to 512 tokens, and is timed. name: the source model (the checkpoint that is
    decoded), the file NAME.gguf in the folder SKIPSTONE_DATA. format: "F16" or "Q8_0", to which the file is converted;
    anything else means the file as it is. folder: where the converted file is written. threads: number of CPU threads.
    Raises ImportError without the bindings, and ValueError if llama.cpp cannot convert the file.
    """

    def __init__(self, name: str, format: str, folder: Path, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.lib, self.file = llama_cpp, gguf(name, format, folder, threads)
        self.model = llama_cpp.Llama(
            str(self.file), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def _feed(self, ids: list[int]) -> Any:
        """Continue the context with the tokens `ids` and return the logits of the last one, [V]."""
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
        """Return the logits after each of T tokens, which are fed one by one: [T, V] for V tokens of the vocabulary.

        ids_1T: token ids, int64 [1, T].
        """
        self.model.reset()
        return torch.stack([torch.tensor(self._feed([token])) for token in ids_1T[0].tolist()])

    def bytes(self) -> float:
        """Return the size of the GGUF file in bytes."""
        return self.file.stat().st_size


def gguf(name: str, format: str, folder: Path, threads: int) -> Path:
    """Return the path of the source model as a GGUF file in a format that llama.cpp converts it to.

    name: the source model, the file NAME.gguf in the folder SKIPSTONE_DATA. format: "F16" or "Q8_0"; anything else
    means that file as it is. folder: where the converted file is written. threads: number of CPU threads. Raises
    ImportError without llama.cpp's Python bindings, and ValueError if llama.cpp cannot convert the file.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # what it says of every tensor goes to stderr
    given, made = Path(os.environ["SKIPSTONE_DATA"], f"{name}.gguf"), folder / f"{format}.gguf"
    if format not in QUANTISED:
        return given
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = QUANTISED[format], True, threads
    if llama_cpp.llama_model_quantize(str(given).encode(), str(made).encode(), options) != 0:
        raise ValueError(f"llama.cpp does not write {format} of {str(given)!r}")
    return made


def llama(name: str) -> LlamaForCausalLM:
    """Return transformers' Llama with the weights of the source model (decoded checkpoint) `name`, in fp32.

    Raises ValueError if its logits differ from the source's, because the architecture of the source is then not a
    Llama.
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
    """Return a copy of the source model with linear layers quantised by torchao, and the bytes it reads for a token.

    Only weights are quantised; the bytes are those of the weights that decoding a token reads. name: the name of the
    source model, the checkpoint whose decoding is studied. bits: 8, or 4 (in groups of 32 weights; on a CPU, torchao
    stores each in one byte). The output head keeps 4 bytes a weight, because torchao does not change tied weights.
    """
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    model = copy.deepcopy(source(name))
    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32))  # type: ignore[attr-defined]
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    small, scales = sum(m.weight.numel() for m in layers), sum(m.weight.shape[0] for m in layers)
    quantize_(model, config, filter_fn=lambda module, path: isinstance(module, nn.Linear) and path != "lm_head")
    rest = sum(p.numel() for p in source(name).parameters()) - small
    return model, small + 4 * (rest + (scales if bits == 8 else small // 32))
