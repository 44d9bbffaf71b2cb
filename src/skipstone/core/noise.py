"""Random numbers that depend on the token or row, not on the order of calls.

    u = hash(seed of the forward pass, mechanism, row, index in the row, channel) in (0, 1)

The decoder draws one seed per forward pass from torch's generator (`Tokens.noise_seed`). A token then gets the same
numbers whatever else is drawn: in both executors (computing kept tokens only, or all tokens), whether or not a block
keeps any token, and when activation checkpointing recomputes a block. The CPU never waits for the GPU. The hash has 32
bits and two rounds of multiplication by odd constants between shifts; a test checks means, quantiles and correlations.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.core.tokens import Tokens

BITS = 0xFFFFFFFF
ROUNDS = ((15, 0x2C1B3C6D), (12, 0x297A2D39))  # constants below 2^31, so that no product overflows int64
LAST_SHIFT = 15
MANTISSA = 23  # fp32 bits of a number just below 1


def draw_seed(device: torch.device | str) -> Tensor:
    """Draw a random seed from torch's default generator: an int64 scalar tensor on `device`."""
    return torch.randint(0, 2**31, (), device=device)


def token_noise(tokens: Tokens, key: int, rows: int, *channels: int) -> Tensor:
    """Return uniform random numbers in (0, 1), fp32 [B, T, *channels], independent for every token and channel.

    They are a hash of the pass's seed, `key`, row and index of the token in its row, so that a token gets the same
    numbers however the pass is executed. tokens: the tokens of this call. key: a number that separates the draws of
    this caller from all others, such as `Placement.noise_key`. rows: B. channels: trailing shape; none for one number
    per token.
    """
    slot_BT = tokens.slot_BT.expand(rows, -1)
    return _uniform(_mixed(_rows(tokens, key, rows)[:, None] ^ (slot_BT & BITS)), channels)


def row_noise(tokens: Tokens, key: int, rows: int, *channels: int) -> Tensor:
    """Return uniform random numbers in (0, 1), fp32 [B, *channels], shared by all tokens of a row.

    They are a hash of the pass's seed, `key` and the index of the row. tokens: the tokens of this call. key: a number
    that separates the draws of this caller from all others, such as `Placement.noise_key`. rows: B. channels: trailing
    shape; none for one number per row.
    """
    return _uniform(_mixed(_rows(tokens, key, rows) ^ 0x5BF03635), channels)


def _rows(tokens: Tokens, key: int, rows: int) -> Tensor:
    """Return one hash for each row of the batch, int64 [B], from the pass's seed, `key` and the index of the row.

    tokens, key and rows are as in `token_noise`; a row's index counts from `Tokens.first_row`.
    """
    device = tokens.slot_BT.device
    seed = draw_seed(device) if tokens.noise_seed is None else tokens.noise_seed
    row_B = torch.arange(rows, device=device) if tokens.rows is None else tokens.rows.index_R
    if tokens.first_row is not None:
        row_B = row_B + tokens.first_row
    return _mixed(_mixed(seed ^ (key & BITS)) ^ row_B)


def _mixed(hash_: Tensor) -> Tensor:
    """Return hashes, int64 of 32 bits and any shape, with their bits mixed, so that close ones become unrelated."""
    for shift, factor in ROUNDS:
        hash_ = ((hash_ ^ (hash_ >> shift)) * factor) & BITS
    return hash_ ^ (hash_ >> LAST_SHIFT)


def _uniform(hash_: Tensor, channels: tuple[int, ...]) -> Tensor:
    """Return uniform fp32 numbers in (0, 1), in the shape of `hash_` with the axes `channels` appended.

    hash_: int64 of 32 bits, one for each token or row; a number depends on it and on the index of its channel.
    """
    count = torch.Size(channels).numel()
    channel = torch.arange(count, device=hash_.device) * 0x1F123BB5 & BITS
    hash_ = _mixed(hash_[..., None] ^ channel).view(*hash_.shape, *channels)
    return ((hash_ >> (32 - MANTISSA)).float() + 0.5) * 2.0**-MANTISSA
