"""Layer patterns such as "1::2", which name the blocks that carry a mechanism."""

from __future__ import annotations


def parse_layers(pattern: object, num_layers: int, where: str = "layers") -> list[int]:
    """Return the block indices, ascending, of a slice string such as "1::2" or "2:-1", a list of indices, or one index.

    pattern: one of these. num_layers: the number of blocks; negative indices count from the end. where: the option as
    error messages call it. Raises ValueError for anything else, for an index outside of the model and for a pattern
    that matches no block.
    """
    if isinstance(pattern, str):
        chosen = list(range(num_layers))[_slice(pattern, where)]
    elif isinstance(pattern, int) and not isinstance(pattern, bool):
        chosen = [pattern]
    elif isinstance(pattern, (list, tuple)) and all(isinstance(i, int) and not isinstance(i, bool) for i in pattern):
        chosen = list(pattern)
    else:
        raise ValueError(f'{where} must be a slice such as "1::2" or a list of block indices, got {pattern!r}')
    if outside := [i for i in chosen if not -num_layers <= i < num_layers]:
        raise ValueError(f"{where} names block {outside[0]}, but the model has blocks 0 to {num_layers - 1}")
    if not chosen:
        raise ValueError(f"{where} {pattern!r} matches none of the model's {num_layers} blocks")
    return sorted({i % num_layers for i in chosen})


def _slice(pattern: str, where: str) -> slice:
    """Return the slice that a string such as "1::2" describes. Raises ValueError, which names `where`, for others."""
    parts = pattern.split(":")
    try:
        if not 2 <= len(parts) <= 3:
            raise ValueError
        numbers = [int(part) if part.strip() else None for part in parts]
        if len(numbers) == 3 and numbers[2] == 0:
            raise ValueError
        return slice(*numbers)
    except ValueError:
        raise ValueError(
            f'{where} must be a slice such as "1::2" or a list of block indices, got {pattern!r}'
        ) from None
