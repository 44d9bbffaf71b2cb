"""Layer patterns."""

from __future__ import annotations

import pytest

from skipstone.model.layers import parse_layers


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ("1::2", [1, 3, 5]),
        (":", [0, 1, 2, 3, 4, 5]),
        ("2:-1", [2, 3, 4]),
        ("::-1", [0, 1, 2, 3, 4, 5]),
        (" 1 : 3 ", [1, 2]),
        ("4:99", [4, 5]),
        ([3, 1, 3], [1, 3]),
        ((0, -1), [0, 5]),
        (2, [2]),
        (-1, [5]),
    ],
)
def test_patterns(pattern: object, blocks: list[int]) -> None:
    assert parse_layers(pattern, 6) == blocks


@pytest.mark.parametrize(
    "pattern", ["odd", "1", "1:2:3:4", "::0", "a:b", "1.5:", "", None, 1.0, True, [1, "2"], [True], {1}]
)
def test_no_patterns(pattern: object) -> None:
    with pytest.raises(ValueError, match=r'^m.layers must be a slice such as "1::2" or a list of block indices, got '):
        parse_layers(pattern, 6, "m.layers")


@pytest.mark.parametrize("pattern", [6, [0, 6], [-7], 99])
def test_blocks_outside_the_model(pattern: object) -> None:
    with pytest.raises(ValueError, match=r"^m.layers names block -?\d+, but the model has blocks 0 to 5$"):
        parse_layers(pattern, 6, "m.layers")


@pytest.mark.parametrize("pattern", ["6:", "3:2", []])
def test_patterns_without_blocks(pattern: object) -> None:
    with pytest.raises(ValueError, match="matches none of the model's 6 blocks"):
        parse_layers(pattern, 6)
