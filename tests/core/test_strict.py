"""Conversion of plain dicts to dataclasses: every mistake is one line with the place, the value and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from skipstone.core.strict import Mistakes, choose, from_dict, unknown


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float
    steps: int = 3


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "x"
    kind: Literal["hard", "soft"] = "hard"
    width: int | None = None
    flag: bool = False
    layers: list[int] = field(default_factory=list)
    pair: tuple[float, ...] = ()
    inner: Inner | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        if self.width == 0:
            raise ValueError("width must not be 0")


def test_good_values_pass_and_are_converted() -> None:
    got = from_dict(
        Outer,
        {"kind": "soft", "width": 4, "flag": True, "layers": [1, 2], "pair": [1, "2e-1"], "inner": {"rate": "1e-3"}},
    )
    assert got == Outer(kind="soft", width=4, flag=True, layers=[1, 2], pair=(1.0, 0.2), inner=Inner(rate=0.001))
    assert isinstance(from_dict(Inner, {"rate": 2}).rate, float)
    assert from_dict(Outer, {"inner": Inner(rate=1.0), "width": None}) == Outer(inner=Inner(rate=1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "a"}, "unknown key in model 'nmae'; did you mean 'name'? (allowed: "),
        ({"zzz": 1}, "unknown key in model 'zzz' (allowed: anything, flag, inner, kind, layers, name, pair, width)"),
        ({3: 1}, "unknown key in model 3 (allowed: "),
        ({"kind": "hrad"}, "unknown model.kind 'hrad'; did you mean 'hard'? (allowed: hard, soft)"),
        ({"kind": ["hard"]}, "unknown model.kind ['hard']"),
        ({"width": "wide"}, "model.width must be int, got 'wide'"),
        ({"width": 2.0}, "model.width must be int, got 2.0"),
        ({"width": True}, "model.width must be int, got True"),
        ({"width": 0}, "model: width must not be 0"),
        ({"flag": 1}, "model.flag must be bool, got 1"),
        ({"name": None}, "model.name must be str, got None"),
        ({"layers": [1, "2"]}, "model.layers[1] must be int, got '2'"),
        ({"layers": 3}, "model.layers must be list, got 3"),
        ({"pair": [None]}, "model.pair[0] must be float, got None"),
        ({"inner": {}}, "model.inner.rate is missing"),
        ({"inner": {"rate": "fast"}}, "model.inner.rate must be float, got 'fast'"),
        ({"inner": {"rate": True}}, "model.inner.rate must be float, got True"),
        ({"inner": {"rate": 1, "stpes": 2}}, "unknown key in model.inner 'stpes'; did you mean 'steps'?"),
        ({"inner": 5}, "model.inner must be a mapping of keys to values, got 5"),
    ],
)
def test_mistakes_are_one_clear_line(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        from_dict(Outer, values, "model")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@dataclass(frozen=True, kw_only=True)
class Bounded:
    low: int = 0
    high: int = 10
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError(f"low must not be negative, got {self.low}")
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate must be in [0, 1], got {self.rate}")


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"low": -1, "rate": 7}, ["low must not be negative, got -1", "rate must be in [0, 1], got 7.0"]),
        ({"low": 11, "high": -5, "rate": 7}, ["low (11) must not exceed high (-5)", "rate must be in [0, 1], got 7.0"]),
        ({"low": "x", "high": -5, "rate": 7}, ["b.low must be int, got 'x'", "rate must be in [0, 1], got 7.0"]),
        ({"lwo": 1, "rate": "x", "low": -2}, ["key in b 'lwo'", "b.rate must be float, got 'x'", "low must not be"]),
    ],
)
def test_all_mistakes_are_told_and_no_consequences(values: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(Mistakes) as error:
        from_dict(Bounded, values, "b")
    assert len(error.value.lines) == len(lines)
    assert all(text in line for text, line in zip(lines, error.value.lines, strict=True))


def test_without_a_place_the_class_is_named() -> None:
    with pytest.raises(ValueError, match=r"^unknown key in Inner 'rat'; did you mean 'rate'\?"):
        from_dict(Inner, {"rat": 1})
    with pytest.raises(ValueError, match=r"^rate is missing$"):
        from_dict(Inner, {})
    with pytest.raises(ValueError, match=r"^Inner must be a mapping of keys to values, got 'rate'"):
        from_dict(Inner, "rate")  # type: ignore[arg-type]


def test_names() -> None:
    assert unknown("norm", "rsmnorm", ["rmsnorm", "layernorm"]) == (
        "unknown norm 'rsmnorm'; did you mean 'rmsnorm'? (allowed: layernorm, rmsnorm)"
    )
    assert choose("norm", "a", {"a": 1}) == 1
    for wrong in ("b", None, ["a"]):
        with pytest.raises(ValueError, match="unknown norm"):
            choose("norm", wrong, {"a": 1})
