"""Blocks as rows of the tables that a compiled decoding step reads (`ops/decode_stack.py`).

A compiled step is one call of numba code that runs several blocks. It can run a block with a gated MLP (also one that
chooses neurons by its own activations), RMS norms and weights in fp32 or a compact format, if every mechanism in it
describes its decision as data (`core/stream_gate.py`).

Shape letters: L blocks, C columns, G depth mechanisms (called gates here), N numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from skipstone.core.depth import DepthModule
from skipstone.core.stream_gate import Functions, Mixture, NeuronChoice, Scorer, StreamGate, StreamMix, declares
from skipstone.nn.attention import Attention
from skipstone.nn.block import SEGMENT, Block
from skipstone.nn.float16 import Float16Linear
from skipstone.nn.int4 import Int4Linear
from skipstone.nn.int8 import Int8Linear
from skipstone.nn.linear import OutputLinear
from skipstone.nn.magnitude_mlp import MagnitudeMLP
from skipstone.nn.mlp import GatedMLP
from skipstone.nn.norm import OffsetRMSNorm, RMSNorm
from skipstone.ops import decode_stack, decode_step, float16
from skipstone.ops.int8 import FINE, GROUP

LINEAR = (nn.Linear, OutputLinear, Int8Linear, Int4Linear, Float16Linear)
NORMS = (RMSNorm, OffsetRMSNorm)
INSIDE = ("block", "attention", "mlp")
ALONE = -1.0  # the decay of a mixture that depends on the token alone


def sizes_of(blocks: Sequence[Block]) -> decode_stack.Sizes | None:
    """Return the sizes that all blocks have, or None if they differ or a compiled decoding step cannot run one of them.

    Sizes are widths, head counts and constants. Such a step is one call of numba code for several blocks. It can run a
    block with a gated MLP, root-mean-square norms and weights in fp32 or a compact format, if every mechanism in it
    describes its decision as data (`core/stream_gate.py`).
    """
    found = {_sizes(block) if _served(block) else None for block in blocks}
    return found.pop() if len(found) == 1 else None


def gates_of(blocks: Sequence[Block]) -> list[tuple[int, str, DepthModule]]:
    """Return the depth mechanisms of consecutive blocks in the order in which they decide.

    Each is given as (index, site, mechanism): the index of its block in `blocks`, and what it wraps, a "segment" of
    several blocks, the "block", its "attention" or its "mlp". A mechanism around a segment is listed at the segment's
    first block.
    """
    found = []
    for i, block in enumerate(blocks):
        around = () if block.segment_start() is not None else (SEGMENT,)
        found += [
            (i, site, block.mechanisms[name])
            for site in (*around, *INSIDE)
            for name in block.sites[site]
            if name in block.mechanisms
        ]
    return found


def _served(block: nn.Module) -> bool:
    if type(block) is not Block or block.parallel or block.shared_norm or block.residual_scale != 1 or block.training:
        return False
    attention, mlp = block.self_attn, block.mlp
    if type(attention) is not Attention or not (type(mlp) is GatedMLP or _chooses(mlp)):
        return False
    if attention.soft_cap is not None or attention.norm_over_all_heads:
        return False
    norms, matrices = [norm for norm in _norms(block) if norm is not None], _matrices(block)
    if not all(type(norm) in NORMS for norm in norms) or not all(type(matrix) in LINEAR for matrix in matrices):
        return False
    if any(isinstance(m, Int8Linear) and m.in_features % GROUP for m in matrices):
        return False
    if any(isinstance(m, Float16Linear) and m.in_features % float16.STEP for m in matrices):
        return False
    return _mix_is_served(mlp.activation) and all(
        declares(gate, "stream_gate") and _readable(gate.stream_gate()) for gate in block.mechanisms.values()
    )


def _chooses(mlp: Any) -> bool:
    """Return whether an MLP leaves out neurons by a rule that a compiled step can compute."""
    if type(mlp) is not MagnitudeMLP or not declares(mlp.router, "stream_choice"):
        return False
    read_in_part = (mlp.up_proj, mlp.down_proj)
    if any(isinstance(matrix, Int4Linear | Float16Linear) for matrix in read_in_part):  # `quantise` makes none of these
        return False
    if any(isinstance(matrix, Int8Linear) and matrix.group == FINE for matrix in read_in_part):
        return False
    return _readable(mlp.router.stream_choice()) and all(matrix.bias is None for matrix in mlp.matrices())


def choice_of(block: Block) -> NeuronChoice | None:
    """Return the description of how a block's MLP chooses neurons, for numba code; None if it computes all neurons.

    block: a block that a compiled decoding step, one numba call for several blocks, can run.
    """
    return block.mlp.router.stream_choice() if isinstance(block.mlp, MagnitudeMLP) else None


def layouts_of(blocks: Sequence[Block]) -> dict[int, bool]:
    """Return how the down projections of `blocks` have to lie in memory for numba code that leaves out neurons.

    The result maps the `id` of each weight and scale tensor to True if the weights of one neuron must be contiguous
    (the transpose of the usual layout), and to False for the usual layout. Tensors of other layers and of other MLPs
    are absent.
    """
    found: dict[int, bool] = {}
    for block in blocks:
        if isinstance(mlp := block.mlp, MagnitudeMLP):
            down: Any = mlp.down_proj
            parts = [down.weight, down.weight_scale] if isinstance(down, Int8Linear) else [down.weight]
            found |= {id(x): mlp.skips for x in parts if x.dim() == 2}
    return found


def _mix_is_served(activation: Any) -> bool:
    if not declares(activation, "stream_mix"):
        return False
    mix = activation.stream_mix()
    if isinstance(mix, Functions):
        return all(name in decode_stack.FUNCTIONS for name, _ in mix.runs)
    return _readable(mix)


def _readable(described: StreamGate | StreamMix | NeuronChoice | None) -> bool:
    """Return whether there is a description and all of its tensors are contiguous fp32 tensors on the CPU."""
    return described is not None and all(_plain(x) and x.is_contiguous() for x in described.tensors())


def _plain(x: Tensor) -> bool:
    return type(x) in decode_step.PLAIN and x.is_cpu and x.dtype == torch.float32


def _norms(block: Block) -> list[Any]:
    attention = block.self_attn
    return [
        block.input_layernorm,
        block.attention_output_layernorm,
        block.post_attention_layernorm,
        block.mlp_output_layernorm,
        attention.q_norm,
        attention.k_norm,
    ]


def _matrices(block: Block) -> list[Any]:
    attention, mlp = block.self_attn, cast("GatedMLP | MagnitudeMLP", block.mlp)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _sizes(block: Block) -> decode_stack.Sizes | None:
    norms = {(type(norm), norm.eps) for norm in _norms(block) if norm is not None}
    if len(norms) != 1:
        return None
    kind: Any
    kind, eps = norms.pop()
    attention, E = block.self_attn, block.self_attn.head_dim
    return decode_stack.Sizes(
        width=attention.q_proj.in_features,
        neurons=cast("GatedMLP | MagnitudeMLP", block.mlp).up_proj.out_features,
        heads=attention.q_proj.out_features // E,
        groups=attention.k_proj.out_features // E,
        head_size=E,
        eps=eps,
        offset=kind.offset,
        scaling=attention.scaling,
    )


def program_of(blocks: Sequence[Block], spans: Sequence[int], sizes: decode_stack.Sizes) -> tuple[Any, list[Tensor]]:
    """Return the tables by which one numba call runs blocks (a `decode_stack.Program`), and tensors to keep alive.

    The tables contain addresses of the weights, of the mechanisms' tensors and of the tensors returned. blocks: L
    blocks that such a call can run. spans: for each block, the number of blocks in the segment (blocks that a mechanism
    skips as a whole) that begins there, or 0. sizes: the sizes that all blocks share, found by `sizes_of`.
    """
    gates = gates_of(blocks)
    described = [gate.stream_gate() for _, _, gate in gates]
    mixes = [block.mlp.activation.stream_mix() for block in blocks]
    runs = [_runs(mix, sizes.neurons) for mix in mixes]
    rows = []
    for i, block in enumerate(blocks):
        row = _row(block)
        for site in (SEGMENT, *INSIDE):
            at = [g for g, (index, where, _) in enumerate(gates) if (index, where) == (i, site)]
            row += [at[0] if at else 0, len(at)]
        rows.append([*row, spans[i], runs[i].data_ptr(), len(runs[i]), *_mixture(mixes[i]), *choice_row(block)])
    gate_GC, number_GN = gate_tables(described)
    widths = [_hidden(gate.scorer) + _hidden(gate.line.scorer) for gate in described if gate is not None]
    widths += [len(mix.context_bias) for mix in mixes if isinstance(mix, Mixture)]
    program = decode_stack.Program(
        sizes=sizes,
        table_LC=torch.tensor(rows),
        number_LN=torch.tensor([_numbers(mix) for mix in mixes]),
        gate_GC=gate_GC,
        number_GN=number_GN,
        hidden=max(widths, default=0),
        mixes=any(isinstance(mix, Mixture) for mix in mixes),
        chooses=any(choice_of(block) is not None for block in blocks),
        int8=any(isinstance(matrix, Int8Linear) for block in blocks for matrix in _matrices(block)),
        int4=any(isinstance(matrix, Int4Linear) for block in blocks for matrix in _matrices(block)),
    )
    return program, runs


def choice_row(block: Block) -> list[int]:
    """Return the numbers by which numba code leaves out neurons of a block's MLP in decoding; zeros if it does not.

    In order: the index of the rule in `decode_stack.DECISIONS`, the number of neuron groups multiplied by the up
    projection, the number multiplied by the down projection, the neurons per group, the address of a factor for each
    neuron (`NeuronChoice.typical`), and 1 if neurons are really left out, 0 if that does not pay.
    """
    if (choice := choice_of(block)) is None:
        return [0] * decode_stack.CHOICE
    decision = decode_stack.DECISIONS.index(choice.decision)
    skips = cast("MagnitudeMLP", block.mlp).skips
    return [decision, choice.tried, choice.kept, choice.size, choice.typical.data_ptr(), int(skips)]


def gate_tables(described: Sequence[StreamGate | None]) -> tuple[Tensor, Tensor]:
    """Return the decisions of depth mechanisms as two tables: integers, int64 [G, C], and numbers, fp32 [G, N].

    described: the description of each of G mechanisms; None entries are left out. The C columns, most of them
    addresses, are listed in `ops/decode_gates_native.py`. The N = 3 numbers are the sign of the score, the threshold,
    and the coefficient of the auxiliary loss (0 if there is none).
    """
    states = states_of(described)
    rows = [_gate(gate, states) for gate in described if gate is not None]
    numbers = [(g.sign, g.line.value, g.loss or 0.0) for g in described if g is not None]
    return torch.tensor(rows, dtype=torch.long), torch.tensor(numbers, dtype=torch.float32)


def states_of(described: Iterable[StreamGate | None]) -> list[str]:
    """Return the names of the tensors that depth mechanisms carry from block to block, in order of first use.

    described: the description of each mechanism's decision; entries may be None.
    """
    return list(dict.fromkeys(gate.state for gate in described if gate is not None and gate.state is not None))


def _gate(gate: StreamGate, states: list[str]) -> list[int]:
    """Return one mechanism's row of addresses and integers for `gate_tables`.

    states: the names of the carried tensors, in which the row gives the index of the mechanism's own.
    """
    return [
        *_router(gate.scorer),
        *_router(gate.line.scorer or Scorer()),
        int(gate.line.scorer is not None),
        _address(gate.line.threshold),
        _address(gate.scale),
        decode_stack.WEIGHTS.index(gate.weight),
        int(gate.compares == "opening"),
        int(gate.acts_on == "update"),
        int(gate.others == "keys"),
        -1 if gate.state is None else states.index(gate.state),
    ]


def _router(scorer: Scorer) -> list[int]:
    parts = (scorer.hidden_weight, scorer.hidden_bias, scorer.weight, scorer.bias)
    return [*map(_address, parts), _hidden(scorer), int(scorer.norm)]


def _hidden(scorer: Scorer | None) -> int:
    return 0 if scorer is None or scorer.hidden_bias is None else len(scorer.hidden_bias)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _runs(mix: StreamMix | None, neurons: int) -> Tensor:
    """Return the activation function of each range of adjacent neurons, int64 [N, 2] for N ranges.

    A row is the index of the function in `decode_stack.FUNCTIONS` and the index after its last neuron. The result has
    no rows if every neuron mixes several functions. neurons: the number of neurons of the MLP.
    """
    if not isinstance(mix, Functions):
        return torch.empty(0, 2, dtype=torch.long)
    ends, end = [], 0
    for name, count in mix.runs:
        end = neurons if count is None else end + count
        ends.append((decode_stack.FUNCTIONS.index(name), end))
    return torch.tensor(ends)


def _mixture(mix: StreamMix | None) -> list[int]:
    if not isinstance(mix, Mixture):
        return [0] * decode_stack.MIXTURE
    parts = (mix.context_weight, mix.context_bias, mix.mix_weight, mix.mix_bias, mix.scale, mix.preference, mix.tau)
    return [*map(_address, parts), len(mix.context_bias)]


def _numbers(mix: StreamMix | None) -> tuple[float, float]:
    if not isinstance(mix, Mixture):
        return ALONE, 0.0
    return ALONE if mix.decay is None else mix.decay, mix.preference_scale


def _row(block: Block) -> list[int]:
    """Return the addresses of the block's norms and matrices, the first columns listed in `ops/decode_frame.py`.

    For each matrix they are the weight, its scales (0 without), its bias (0 without), and the number of scales per
    output, or what dtype a weight without scales has.
    """
    row = [0 if norm is None else norm.weight.data_ptr() for norm in _norms(block)]
    for matrix in _matrices(block):
        at, scale_at, scales = matrix.weight.data_ptr(), 0, decode_stack.FLOATS[torch.float32]
        if isinstance(matrix, Int8Linear):
            scale_at, scales = matrix.weight_scale.data_ptr(), matrix.weight_scale.numel() // matrix.out_features
        elif isinstance(matrix, Int4Linear):
            scale_at, scales = at, 0
        elif isinstance(matrix, Float16Linear):
            scales = decode_stack.FLOATS[matrix.stored]
        row += [at, scale_at, 0 if matrix.bias is None else matrix.bias.data_ptr(), scales]
    return row
