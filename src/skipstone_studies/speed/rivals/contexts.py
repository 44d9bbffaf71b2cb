"""Engines that hold the prompts of several rows in a cache, so that the same decoding steps can be timed repeatedly.

Shape letters: R rows, T tokens of a prompt, S decoding steps. Ours and transformers' models are PyTorch modules;
llama.cpp decodes all rows in one call of its C interface, which its Python bindings expose.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

CELLS = 256  # llama.cpp rounds the tokens that a row may hold up to a multiple of this number


class Contexts(Protocol):
    """The interface of an engine that reads one prompt for each row and then decodes all rows together."""

    def read(self, ids_RT: Tensor) -> Tensor:
        """Forget everything, read the prompts, and return the likeliest next token of each row, int64 [R, 1].

        ids_RT: token ids of the prompts, int64 [R, T]: R rows of T tokens.
        """

    def steps(self, fed_RS: Tensor) -> Tensor:
        """Run S decoding steps, and return the likeliest token of each row after each of them, int64 [R, S].

        fed_RS: the tokens that the R rows continue with, one column for each step, int64 [R, S], whatever the engine
        finds likely.
        """

    def back(self, steps: int) -> None:
        """Forget the last `steps` tokens of every row."""


class TorchContexts:
    """An engine (see `Contexts`) that holds rows in the cache of a PyTorch model, ours or transformers', which grows.

    model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.eval()
        self.cache: Any = None

    @torch.inference_mode()
    def read(self, ids_RT: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self._next(ids_RT)

    @torch.inference_mode()
    def steps(self, fed_RS: Tensor) -> Tensor:
        return torch.cat([self._next(token_R1) for token_R1 in fed_RS.split(1, dim=1)], dim=1)

    @torch.inference_mode()
    def back(self, steps: int) -> None:
        self.cache.crop(-steps)

    def _next(self, ids_RT: Tensor) -> Tensor:
        """Continue the rows with the tokens `ids_RT` [R, T] and return the likeliest next ones, [R, 1]."""
        out = self.model(ids_RT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits.argmax(-1)  # type: ignore[no-any-return]


class LlamaContexts:
    """An engine (see `Contexts`) that holds rows in llama.cpp's key-value cache, each a sequence with its own buffer.

    What is not said here is as llama.cpp chooses it: keys and values in F16, prompts in batches of 512 tokens. file:
    the GGUF file. rows: number of rows. tokens: how many each row must hold. threads: number of CPU threads. flash:
    whether attention is one kernel (flash attention). Raises ImportError without the bindings, and ValueError if
    llama.cpp cannot load the file or has no memory.
    """

    def __init__(self, file: Path, rows: int, tokens: int, threads: int, flash: bool) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self.lib, self.rows = llama_cpp, rows
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp does not load {str(file)!r}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = rows * -(-tokens // CELLS) * CELLS, rows
        options.n_threads = options.n_threads_batch = threads
        flashing, plain = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.flash_attn_type = flashing if flash else plain
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise ValueError(f"llama.cpp has no memory for {rows} rows of {tokens} tokens")
        self.most = llama_cpp.llama_n_batch(self.context)
        self.batch = llama_cpp.llama_batch_init(self.most, 0, 1)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.length = 0

    def close(self) -> None:
        """Free the memory of llama.cpp; nothing may be called afterwards."""
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def read(self, ids_RT: Tensor) -> Tensor:
        self.lib.llama_memory_clear(self.memory, False)
        found, length = [], ids_RT.shape[1]
        for row, ids in enumerate(ids_RT.tolist()):
            for start in range(0, length, self.most):
                end = min(start + self.most, length)
                last = [at == length - 1 for at in range(start, end)]
                chosen = self._decode(ids[start:end], range(start, end), [row] * (end - start), last)
            found.append(chosen)
        self.length = length
        return torch.tensor(found)

    def steps(self, fed_RS: Tensor) -> Tensor:
        found = []
        for token_R in fed_RS.t().tolist():
            found.append(self._decode(token_R, [self.length] * self.rows, range(self.rows), [True] * self.rows))
            self.length += 1
        return torch.tensor(found).t()

    def back(self, steps: int) -> None:
        self.length -= steps
        for row in range(self.rows):
            self.lib.llama_memory_seq_rm(self.memory, row, self.length, -1)

    def _decode(
        self, tokens: Sequence[int], positions: Sequence[int], rows: Sequence[int], wanted: Sequence[bool]
    ) -> list[int]:
        """Run one call of llama.cpp and return the likeliest next token after each token whose logits are wanted.

        tokens, positions, rows, wanted: for each token its id, its place in its row, its row, and whether its logits
        are wanted.
        """
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row, logits) in enumerate(zip(tokens, positions, rows, wanted, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, logits
            batch.seq_id[i][0] = row
        if self.lib.llama_decode(self.context, batch) != 0:
            raise ValueError("llama.cpp does not decode the batch")
        return [self._likeliest(i) for i, logits in enumerate(wanted) if logits]

    def _likeliest(self, i: int) -> int:
        at = self.lib.llama_get_logits_ith(self.context, i)
        return int(np.ctypeslib.as_array(at, shape=(self.vocabulary,)).argmax())
