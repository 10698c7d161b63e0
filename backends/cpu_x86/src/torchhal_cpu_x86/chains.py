"""Products with packed weights that follow each other, as one native operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torchhal.chains import Bound, Step
from torchhal.operands import GGUFWeight, Packed
from torchhal.products.graphs import STORED, Functions, fuse
from torchhal_cpu_x86 import native, programs
from torchhal_cpu_x86.packed import SCHEMES

NONE: Final = -1
HEAD: Final = 3
"""Numbers before the steps; ``native/src/chain.hpp`` has their order, and that of a step's."""
FIELDS: Final = 12
"""Numbers of a step, before the words of its epilogue."""


def bind(steps: Sequence[Step], required: bool = False) -> Bound | None:
    """What runs a chain natively; None for one that it has no form for.

    Args:
        steps: products that this backend has planned.
        required: raise an error for tensors that are not of the kind the chain was made for, instead of returning no results.
    """
    if not all(_is_plain(step) for step in steps):
        return None
    head = (int(required), native.DTYPES[steps[0].problem.a_dtype], len(steps))
    text = " ".join(map(str, (*head, *(number for step in steps for number in _numbers(step)))))
    operator = (
        torch.ops.torchhal_cpu_x86.products.default._op
    )  # as the overload calls it, less a frame of Python

    def run(a: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        return operator(a, parts, text)  # type: ignore[no-any-return]

    return run


def _is_plain(step: Step) -> bool:
    problem = step.problem
    types = {problem.a_dtype, problem.b_dtype, *problem.out_dtypes, problem.bias_dtype or torch.float32}
    return (
        problem.a_prologue is problem.b_prologue is None
        and types <= STORED[torch.float32]
        and len(problem.out_dtypes) == 1
    )


def _numbers(step: Step) -> list[int]:
    problem = step.problem
    functions = Functions(epilogue=problem.epilogue)
    graph = fuse(functions, torch.float32, problem.bias_dtype, problem.out_dtypes).functions.epilogue
    words = () if graph is None else programs.encode(graph)
    captured = 0 if graph is None or step.factor is not None else len(graph.captured)
    bias = NONE if problem.bias_dtype is None else native.DTYPES[problem.bias_dtype]
    places = [NONE if place is None else place for place in (step.source, step.factor)]
    types = (native.DTYPES[problem.b_dtype], bias, native.DTYPES[problem.out_dtypes[0]])
    return [*_weight(step.weight), *places, captured, *types, len(words), *words]


def _weight(weight: Packed) -> tuple[int, ...]:
    """Scheme, rows, columns, group, and whether there is a zero."""
    if isinstance(weight, GGUFWeight):
        return SCHEMES[weight.kind], *weight.shape, 1, 0
    return SCHEMES[f"int{weight.bits}"], *weight.shape, weight.group, int(weight.zero is not None)


def fake(a: Tensor, parts: Sequence[Tensor], chain: str) -> list[Tensor]:
    """The results of the operator without their numbers: of the steps that no other reads."""
    dtypes = {code: dtype for dtype, code in native.DTYPES.items()}
    numbers = [int(word) for word in chain.split(" ")]
    found, read, at = [], set(), HEAD
    for _ in range(numbers[HEAD - 1]):
        _, _, columns, _, _, source, factor, _, _, _, out_type, words = numbers[at : at + FIELDS]
        found.append(a.new_empty((*a.shape[:-1], columns), dtype=dtypes[out_type]))
        read |= {source, factor}
        at += FIELDS + words
    return [result for step, result in enumerate(found) if step not in read]
