"""Faults in what packed weights stand for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from torchhal_conformance.families.blocks import KINDS
from torchhal_conformance.mutants import Change, Mutant, Run


def _weight(change: Callable[[Any], Any], *schemes: str) -> Change:
    """``change(weight)`` is used instead of a weight whose scheme begins with one of ``schemes``."""

    def make(run: Run, problem: Any) -> Run:
        def faulty(a: Any, b: Any, bias: Any, operands: Any) -> Any:
            chosen = (problem.packing or "").startswith(schemes)
            return run(a, change(b) if chosen else b, bias, operands)

        return faulty

    return make


def _data(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    return lambda weight: dataclasses.replace(weight, data=change(weight.data))


def _swapped(data: Tensor) -> Tensor:
    return (data >> 4) | (data << 4)


def _blocks(change: Callable[[Tensor], None], kind: str) -> Callable[[Any], Any]:
    """``change`` is given the blocks (N, blocks, bytes) of a copy, to write to."""

    def changed(weight: Any) -> Any:
        data = weight.data.clone()
        size = KINDS[kind]
        change(data.view(data.shape[0], data.shape[1] // size, size))
        return dataclasses.replace(weight, data=data)

    return changed


def _swapped_quants(blocks: Tensor) -> None:
    blocks[..., -16:] = _swapped(blocks[..., -16:])


def _no_minimum(blocks: Tensor) -> None:
    blocks[..., 2:4] = 0


def _unsigned(blocks: Tensor) -> None:
    """Quants are halved without their sign: int8 holds no number above 127."""
    blocks[..., 2:] >>= 1


def _no_zero(weight: Any) -> Any:
    return weight if weight.zero is None else dataclasses.replace(weight, zero=weight.zero * 0)


def _first_group(weight: Any) -> Any:
    return dataclasses.replace(weight, scale=weight.scale[:1].expand(weight.scale.shape))


_m = functools.partial(Mutant, killers=("matmul.numbers",), family="matmul")

MUTANTS: Final = (
    _m("int4_halves", "the halves of int4's bytes change places", change=_weight(_data(_swapped), "int4")),
    _m("no_zero_point", "zero points are ignored", change=_weight(_no_zero, "int8", "int4")),
    _m("first_group_scale", "the first group's scale serves all groups", change=_weight(_first_group, "int8", "int4")),
    _m("q4_0_halves", "elements 0 to 15 are read from high halves", change=_weight(_blocks(_swapped_quants, "q4_0"), "gguf:q4_0")),
    _m("q4_1_no_minimum", "the minimum is ignored", change=_weight(_blocks(_no_minimum, "q4_1"), "gguf:q4_1")),
    _m("q8_0_unsigned", "signed bytes are read without their sign", change=_weight(_blocks(_unsigned, "q8_0"), "gguf:q8_0")),
)  # fmt: skip
