"""How much of the model a token passed: the share of the blocks' matrix FLOPs that its forward pass executed.

    compute = sum over blocks of (given * (K + V) + asked * (Q + O) + asked_mlp * MLP) / the same with every load 1

given and asked are the loads that the mechanisms leave of one token (core/load.py), from what they recorded. Weights
are the matrices' sizes. Left out, because they depend on the length of the row: attention scores; because they are
neither blocks nor saved: embeddings, head and routers. PolyGLU counts as a full MLP. A soft gate skips nothing.
Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.core.load import Load
from skipstone.core.records import DepthRecord, Records
from skipstone.nn.block import Block

WHOLE = Load(given=1.0, asked=1.0)


def compute_shares(blocks: Iterable[nn.Module], records: Sequence[Records]) -> Tensor:
    """fp32 [B, T] in [0, 1] on the CPU: the share of each token, from the records of the forward pass that it was in.

    Without any depth mechanism the records do not tell B and T, and the result is a one of shape [1, 1].
    """
    full = executed = torch.zeros(1, 1)
    for block, decided in zip(blocks, records, strict=True):
        assert isinstance(block, Block)
        attention, mlp = _matrices(block)
        full = full + attention["given"] + attention["asked"] + mlp
        executed = executed + _per_token(block, decided, attention, mlp)
    return executed / full


def _matrices(block: Block) -> tuple[dict[str, int], int]:
    """Weights that a given token and that an asking token are multiplied with in attention, and those of the MLP."""
    a = block.self_attn
    given = a.k_proj.weight.numel() + a.v_proj.weight.numel()
    asked = a.q_proj.weight.numel() + a.o_proj.weight.numel()
    mlp = sum(child.weight.numel() for child in block.mlp.children() if isinstance(child, nn.Linear))
    return {"given": given, "asked": asked}, mlp


def _per_token(block: Block, decided: Records, attention: Mapping[str, int], mlp: int) -> Tensor:
    """Matrix work [B, T] of the block; one value for each way in which its mechanisms can decide."""
    names = [name for site in block.sites.values() for name in site]
    if not names:
        return torch.full((1, 1), float(attention["given"] + attention["asked"] + mlp))
    kept = {name: record.kept_BT.cpu() for name, record in decided.items() if isinstance(record, DepthRecord)}
    # Inside a block that keeps nobody, no record is made: those inside kept nobody either.
    code_BT = torch.stack([kept[name].long() << bit for bit, name in enumerate(names) if name in kept]).sum(0)
    work = [_work(block, way, attention, mlp) for way in _ways(names)]
    return torch.tensor(work)[code_BT]


def _ways(names: Sequence[str]) -> Iterator[dict[str, float]]:
    """All combinations of kept (1) and skipped (0), the first name the lowest bit."""
    for code in range(2 ** len(names)):
        yield {name: float(code >> bit & 1) for bit, name in enumerate(names)}


def _work(block: Block, kept: Mapping[str, float], attention: Mapping[str, int], mlp: int) -> float:
    outer = _narrowed(block, "block", kept, WHOLE)
    a, m = _narrowed(block, "attention", kept, outer), _narrowed(block, "mlp", kept, outer)
    return a.given * attention["given"] + a.asked * attention["asked"] + m.asked * mlp


def _narrowed(block: Block, site: str, kept: Mapping[str, float], load: Load) -> Load:
    mechanisms: Any = block.mechanisms
    for name in block.sites[site]:
        load = mechanisms[name].narrow(load, kept[name])
    return load
