"""Random pointwise functions, composed of primitives: the same expression as a function of torch and as text.

An expression is drawn from a ``random.Random``, so a seed says all of it. Operands are kept where each primitive is defined
and of moderate size and slope, by what stands around them in the text: ``log(abs(x) + 0.5)`` and not ``log(x)``. So whatever
is drawn can be judged against float64, and a difference is somebody's fault and not the function's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

Values = Sequence[Any]
"""What an expression is evaluated on, in the order of its leaves: tensors, or the recording scalars of a capture."""


@dataclass(frozen=True)
class Expression:
    """A composed function of some leaves."""

    text: str
    """As Python would write it."""
    of: Callable[[Values], Any]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Word:
    """A primitive, inside what keeps its operands in its domain."""

    text: str
    """With ``{0}``, ``{1}`` and ``{2}`` for the operands."""
    of: Callable[..., Any]
    arity: int = 1
    exact: bool = False
    """Whether IEEE arithmetic or selection is all it does: no bit of it is left to an implementation."""
    smooth: bool = True
    """Whether a last bit more in an operand is about a last bit more in the result; jumps are for exact operands."""


def _tame(x: Any) -> Any:
    """Any number into (-1, 1), steadily."""
    return torch.tanh(x)


WORDS: Final = (
    Word("({0} + {1})", lambda x, y: x + y, 2, exact=True),
    Word("({0} - {1})", lambda x, y: x - y, 2, exact=True),
    Word("({0} * 0.75)", lambda x: x * 0.75, exact=True),
    Word("(-{0})", lambda x: -x, exact=True),
    Word("abs({0})", lambda x: torch.abs(x), exact=True),
    Word("relu({0})", lambda x: torch.relu(x), exact=True),
    Word("minimum({0}, {1})", lambda x, y: torch.minimum(x, y), 2, exact=True),
    Word("maximum({0}, {1})", lambda x, y: torch.maximum(x, y), 2, exact=True),
    Word("clamp({0}, -1.5, 2.0)", lambda x: torch.clamp(x, -1.5, 2.0), exact=True),
    Word("({0} / (abs({1}) + 1.0))", lambda x, y: x / (torch.abs(y) + 1.0), 2, exact=True),
    Word("(clamp({0}, -2.0, 2.0) * {1})", lambda x, y: torch.clamp(x, -2.0, 2.0) * y, 2, exact=True),
    Word("sqrt(abs({0}) + 0.25)", lambda x: torch.sqrt(torch.abs(x) + 0.25), exact=True),
    Word("where({0} > {1}, {0}, {2})", lambda x, y, z: torch.where(x > y, x, z), 3, exact=True, smooth=False),
    Word("where({0} <= 0.5, {1}, {2})", lambda x, y, z: torch.where(x <= 0.5, y, z), 3, exact=True, smooth=False),
    Word("floor({0})", lambda x: torch.floor(x), exact=True, smooth=False),
    Word("ceil({0})", lambda x: torch.ceil(x), exact=True, smooth=False),
    Word("round({0})", lambda x: torch.round(x), exact=True, smooth=False),
    Word("trunc({0})", lambda x: torch.trunc(x), exact=True, smooth=False),
    Word("fmod({0}, 1.5)", lambda x: torch.fmod(x, 1.5), exact=True, smooth=False),
    Word("remainder({0}, 1.5)", lambda x: torch.remainder(x, 1.5), exact=True, smooth=False),
    Word("floor_divide({0}, 0.75)", lambda x: torch.floor_divide(x, 0.75), exact=True, smooth=False),
    Word("sign({0})", lambda x: torch.sign(x), exact=True, smooth=False),
    Word("tanh({0})", lambda x: torch.tanh(x)),
    Word("sigmoid({0})", lambda x: torch.sigmoid(x)),
    Word("exp(-abs({0}))", lambda x: torch.exp(-torch.abs(x))),
    Word("exp2(tanh({0}))", lambda x: torch.exp2(_tame(x))),
    Word("expm1(tanh({0}))", lambda x: torch.expm1(_tame(x))),
    Word("log(abs({0}) + 0.5)", lambda x: torch.log(torch.abs(x) + 0.5)),
    Word("log2(abs({0}) + 0.5)", lambda x: torch.log2(torch.abs(x) + 0.5)),
    Word("log10(abs({0}) + 0.5)", lambda x: torch.log10(torch.abs(x) + 0.5)),
    Word("log1p(abs({0}))", lambda x: torch.log1p(torch.abs(x))),
    Word("rsqrt(abs({0}) + 0.5)", lambda x: torch.rsqrt(torch.abs(x) + 0.5)),
    Word("reciprocal(abs({0}) + 0.5)", lambda x: torch.reciprocal(torch.abs(x) + 0.5)),
    Word("sin(clamp({0}, -6.0, 6.0))", lambda x: torch.sin(torch.clamp(x, -6.0, 6.0))),
    Word("cos(clamp({0}, -6.0, 6.0))", lambda x: torch.cos(torch.clamp(x, -6.0, 6.0))),
    Word("tan(tanh({0}))", lambda x: torch.tan(_tame(x))),
    Word("asin(tanh({0}) * 0.875)", lambda x: torch.asin(_tame(x) * 0.875)),
    Word("acos(tanh({0}) * 0.875)", lambda x: torch.acos(_tame(x) * 0.875)),
    Word("atan({0})", lambda x: torch.atan(x)),
    Word("atan2({0}, abs({1}) + 0.5)", lambda x, y: torch.atan2(x, torch.abs(y) + 0.5), 2),
    Word("sinh(tanh({0}))", lambda x: torch.sinh(_tame(x))),
    Word("cosh(tanh({0}))", lambda x: torch.cosh(_tame(x))),
    Word("asinh({0})", lambda x: torch.asinh(x)),
    Word("acosh(abs({0}) + 1.5)", lambda x: torch.acosh(torch.abs(x) + 1.5)),
    Word("atanh(tanh({0}) * 0.75)", lambda x: torch.atanh(_tame(x) * 0.75)),
    Word("erf({0})", lambda x: torch.erf(x)),
    Word("erfc({0})", lambda x: torch.erfc(x)),
    Word("erfinv(tanh({0}) * 0.75)", lambda x: torch.erfinv(_tame(x) * 0.75)),
    Word("pow(abs({0}) + 0.5, tanh({1}))", lambda x, y: torch.pow(torch.abs(x) + 0.5, _tame(y)), 2),
)  # fmt: skip

EXACT: Final = tuple(word for word in WORDS if word.exact)
SMOOTH: Final = tuple(word for word in WORDS if word.smooth)


def expression(
    draw: random.Random, leaves: Sequence[str], depth: int = 3, words: Sequence[Word] = SMOOTH
) -> Expression:
    """A random function of some of the leaves.

    Args:
        draw: where the choices come from.
        leaves: names of the operands.
        depth: primitives above the deepest leaf, at most.
        words: what is composed: :data:`EXACT` where every bit is compared, :data:`SMOOTH` where an error is.
    """
    if depth == 0 or (depth < 3 and draw.random() < 0.2):
        return _leaf(draw, leaves)
    word = draw.choice(words)
    parts = [expression(draw, leaves, depth - 1, words) for _ in range(word.arity)]
    return Expression(word.text.format(*parts), lambda values: word.of(*(part.of(values) for part in parts)))


def _leaf(draw: random.Random, leaves: Sequence[str]) -> Expression:
    at = draw.randrange(len(leaves))
    return Expression(leaves[at], lambda values: values[at])


def around(value: str, whole: Expression) -> Expression:
    """Half the first leaf and an expression: a function that surely depends on the element it is applied to.

    Args:
        value: name of the first leaf.
        whole: what is added.
    """
    return Expression(f"({value} * 0.5 + {whole})", lambda values: values[0] * 0.5 + whole.of(values))


def over_indices(draw: random.Random, names: Sequence[str]) -> Expression:
    """A random number made of integer indices, exactly: a sixteenth of their differences and remainders.

    Args:
        draw: where the choices come from.
        names: names of the indices.
    """
    first, second = (draw.randrange(len(names)) for _ in range(2))
    step = draw.choice((2, 3, 5, 7))
    forms: tuple[tuple[str, Callable[[Any, Any], Any]], ...] = (
        (f"({{0}} - {{1}}) % {step}", lambda i, j: (i - j) % step),
        (f"({{0}} + {{1}}) % {step}", lambda i, j: (i + j) % step),
        (f"({{0}} * {step} + {{1}}) % 16", lambda i, j: (i * step + j) % 16),
        (f"({{0}} // {step}) - ({{1}} // {step})", lambda i, j: i // step - j // step),
        ("clamp({0} - {1}, -8, 8)", lambda i, j: torch.clamp(i - j, -8, 8)),
    )
    text, of = draw.choice(forms)
    return Expression(
        f"(({text.format(names[first], names[second])}) * 0.0625)",
        lambda values: of(values[first], values[second]) * 0.0625,
    )


def predicate(draw: random.Random, names: Sequence[str], depth: int = 2) -> Expression:
    """A random truth value made of integer indices.

    Args:
        draw: where the choices come from.
        names: names of the indices.
        depth: connectives above the deepest comparison, at most.
    """
    if depth == 0 or draw.random() < 0.3:
        return _comparison(draw, names)
    text, of, arity = draw.choice(_CONNECTIVES)
    parts = [predicate(draw, names, depth - 1) for _ in range(arity)]
    return Expression(text.format(*parts), lambda values: of(*(part.of(values) for part in parts)))


_CONNECTIVES: Final[tuple[tuple[str, Callable[..., Any], int], ...]] = (
    ("({0} & {1})", lambda p, q: p & q, 2),
    ("({0} | {1})", lambda p, q: p | q, 2),
    ("({0} ^ {1})", lambda p, q: p ^ q, 2),
    ("(~{0})", lambda p: torch.logical_not(p), 1),
)


def _comparison(draw: random.Random, names: Sequence[str]) -> Expression:
    first, second = (draw.randrange(len(names)) for _ in range(2))
    step, bound = draw.choice((2, 3, 5, 8)), draw.choice((0, 1, 4, 9))
    forms: tuple[tuple[str, Callable[[Any, Any], Any]], ...] = (
        ("({0} >= {1})", lambda i, j: i >= j),
        (f"({{0}} - {{1}} <= {bound})", lambda i, j: i - j <= bound),
        (f"(abs({{0}} - {{1}}) <= {bound})", lambda i, j: torch.abs(i - j) <= bound),
        (f"({{0}} // {step} == {{1}} // {step})", lambda i, j: i // step == j // step),
        (f"(({{0}} + {{1}}) % {step} != 0)", lambda i, j: (i + j) % step != 0),
        (f"({{0}} < {bound + 1})", lambda i, j: i < bound + 1),
    )
    text, of = draw.choice(forms)
    return Expression(
        text.format(names[first], names[second]), lambda values: of(values[first], values[second])
    )
