"""The compute share of each token: the share of the blocks' matrix FLOPs that its forward pass executed.

    compute = sum over blocks of (given * (K + V) + asked * (Q + O) + asked_mlp * MLP) / the same with all of them 1

For one token in one block, `given` is 1 if it provides a key and value, `asked` if it has a query, and `asked_mlp` if
the MLP computes it, by the recorded decisions, else 0. Capitals are the numbers of weights of the matrices. Attention
scores are left out because they depend on the length of the row; embeddings, head and routers because they are never
skipped. An MLP that mixes activations (PolyGLU) counts in full, an MLP of experts by the share of its choices that are
not no-ops, one with neuron groups by the share that is on. A soft gate skips nothing. Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from skipstone.core.counts import TokenCounts
from skipstone.core.records import DepthRecord, Records, of_kind
from skipstone.core.weights import weights_multiplied
from skipstone.nn.block import SEGMENT, Block

WHOLE = TokenCounts(kv_tokens=1.0, query_tokens=1.0)


def compute_shares(blocks: Iterable[nn.Module], records: Sequence[Records]) -> Tensor:
    """Compute for each token the share of the blocks' matrix FLOPs that its forward pass executed.

    The result is fp32 [B, T] (rows, tokens) in [0, 1] on the CPU: the FLOPs of the weight matrices of attention and MLP
    that were multiplied for the token, over all blocks, divided by those of the same blocks without mechanisms.
    Attention scores, embeddings, head and routers are not counted; a gate that only scales updates skips nothing.
    blocks: the model's blocks. records: their recorded decisions in the same order, a dict by mechanism name for each
    block. If no block recorded anything, B and T are unknown, and the result is the number 1 in shape [1, 1].
    """
    if not any(records):  # nothing has decided anything; adding up all blocks would take longer than their step
        return torch.ones(1, 1)
    full = executed = torch.zeros(1, 1)
    for block, decided in zip(blocks, records, strict=True):
        assert isinstance(block, Block)
        attention, mlp = _matrices(block), block.mlp.weights_per_pass()
        passes, computed_BT = block.mlp.dense_passes(1), block.mlp.token_passes(decided)
        full = full + attention["given"] + attention["asked"] + mlp * passes
        attended_BT, queried_BT = _per_token(block, decided, attention)
        executed = executed + attended_BT + queried_BT * computed_BT * mlp
    return executed / full


def _matrices(block: Block) -> dict[str, int]:
    """Return how many attention weights a token is multiplied with, by what it takes part as.

    Keys: "given", the weights of the key and value projections, for a token that provides a key and value; "asked",
    those of the query and output projections, for a token with a query.
    """
    a = block.self_attn
    given = weights_multiplied(a.k_proj) + weights_multiplied(a.v_proj)
    return {"given": given, "asked": weights_multiplied(a.q_proj) + weights_multiplied(a.o_proj)}


def _per_token(block: Block, decided: Records, attention: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return for each token of a block the attention weights that it was multiplied with, and whether the MLP ran.

    Both are fp32 [B, T], or [1, 1] for a block without depth mechanisms. decided: the block's records by mechanism
    name. attention: the result of `_matrices`.
    """
    names = [name for site in block.sites.values() for name in site]
    if not names:
        return torch.full((1, 1), float(attention["given"] + attention["asked"])), torch.ones(1, 1)
    kept = {name: record.kept_BT.cpu() for name, record in of_kind(decided, DepthRecord).items()}
    # Inside a block that keeps no token, no record is made: the mechanisms inside kept none either.
    code_BT = torch.stack([kept[name].long() << bit for bit, name in enumerate(names) if name in kept]).sum(0)
    attended, asked = torch.tensor([_work(block, way, attention) for way in _ways(names)]).unbind(1)
    return attended[code_BT], asked[code_BT]


def _ways(names: Sequence[str]) -> Iterator[dict[str, float]]:
    """Yield every combination of keeping (1) and skipping (0) a token by the mechanisms `names`, {name: 1 or 0}.

    Combination number c has bit i of c for the i-th name.
    """
    for code in range(2 ** len(names)):
        yield {name: float(code >> bit & 1) for bit, name in enumerate(names)}


def _work(block: Block, kept: Mapping[str, float], attention: Mapping[str, int]) -> tuple[float, float]:
    outer = _narrowed(block, "block", kept, _narrowed(block, SEGMENT, kept, WHOLE))
    a, m = _narrowed(block, "attention", kept, outer), _narrowed(block, "mlp", kept, outer)
    return a.kv_tokens * attention["given"] + a.query_tokens * attention["asked"], m.query_tokens


def _narrowed(block: Block, site: str, kept: Mapping[str, float], counts: TokenCounts) -> TokenCounts:
    for name in block.sites[site]:
        counts = block.mechanism(name).counts_inside(counts, kept[name])
    return counts
