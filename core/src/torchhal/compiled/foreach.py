"""foreach_map under torch.compile.

Numbers are closed over by the functions, as constants or, from their second value on, as the symbols that Dynamo makes of
them. An int may then change without a new trace; a float is a constant of each trace, as it is where torch's own
``_foreach_`` functions are traced. Each combination of element types and numbers that occurs along the lists becomes a
function of its own, and one operator once the node is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchhal import scope
from torchhal._foreach_capture import BUILTINS, out_of_place
from torchhal._tracing import constant_while_tracing
from torchhal.compiled.call import FAMILIES, Argument, Family, Numbers, describe, record
from torchhal.errors import InvalidProblem
from torchhal.foreach import Policy, serve
from torchhal.ops import Description
from torchhal.reference.foreach import reduced_dtype


def foreach_map(
    fn: Any,
    operands: tuple[Any, ...],
    backend: str | None,
    keywords: dict[str, Any],
    reduction: str | None = None,
) -> Any:
    """The traced form of :func:`torchhal.foreach_map` and its reductions; destinations are written after the node."""
    out = keywords.pop("out", None)
    # Of a function made while tracing, or a bound method, Dynamo has no constant to hand to _twin.
    twin = _twin(fn) if isinstance(fn, BUILTINS) else None
    if twin is not None:
        fn, out = twin, operands[0]
    length = _length(operands)
    if length == 0:
        return []
    kinds = [_kind(operands, position) for position in range(length)]
    firsts = _firsts(kinds)
    distinct = sorted(set(firsts))
    tensors = [item for operand in operands for item in _tensors(operand)]
    state = scope.current.state  # read here so that Dynamo guards on it
    call = describe(
        family="foreach", which=[distinct.index(first) for first in firsts], backend=backend,
        operands=["each" if _is_list(o) else "all" for o in operands if _tensors(o)],
        scoped=None if state is scope.current else state.backend, reduction=reduction,
    )  # fmt: skip
    functions = [(_bind(fn, keywords, operands, first), _types(kinds[first])) for first in distinct]
    results = record(call, (), tensors, functions)
    several = len(results) % length == 1 or (length == 1 and len(results) > 1)
    lists = [list(results[start : start + length]) for start in range(0, len(results) - several, length)]
    if out is None:
        return tuple(lists) if several else lists[0]
    for destinations, values in zip(out if several else [out], lists, strict=True):
        for destination, value in zip(destinations, values, strict=True):
            destination.copy_(value)
    return out


@constant_while_tracing
def _twin(fn: Any) -> Any:
    return out_of_place(fn)


def _is_list(operand: Any) -> bool:
    return isinstance(operand, (list, tuple))


def _tensors(operand: Any) -> list[Tensor]:
    items = operand if _is_list(operand) else [operand]
    return [item for item in items if isinstance(item, Tensor)]


def _length(operands: tuple[Any, ...]) -> int:
    lengths = [len(operand) for operand in operands if _is_list(operand)]
    if not lengths or min(lengths) != max(lengths):
        raise InvalidProblem(
            f"foreach_map expects lists of one length, at least one of them, and got lengths {lengths}"
        )
    return lengths[0]


def _at(operand: Any, position: int) -> Any:
    return operand[position] if _is_list(operand) else operand


def _kind(operands: tuple[Any, ...], position: int) -> tuple[Any, ...]:
    """What may tell one position's function from another's: element types, 0-dim or not, and the numbers of lists."""
    items = [_at(operand, position) for operand in operands]
    return tuple(
        [
            (i.dtype, i.dim() == 0 and not _is_list(o)) if isinstance(i, Tensor) else i
            for i, o in zip(items, operands, strict=True)
            if isinstance(i, Tensor) or _is_list(o)
        ]
    )


def _firsts(kinds: list[tuple[Any, ...]]) -> list[int]:
    """For each position, the first one with the same function."""
    firsts: list[int] = []
    for position, kind in enumerate(kinds):
        # Known positions alone, one comparison of numbers after the other: that of tuples Dynamo refuses where a number
        # is symbolic, as it is from the second value on.
        found = position
        for first in set(firsts):
            if found == position and _alike(kind, kinds[first]):
                found = first
        firsts.append(found)
    return firsts


def _alike(kind: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    for mine, yours in zip(kind, other, strict=True):
        if isinstance(mine, tuple) or isinstance(yours, tuple):
            if not (isinstance(mine, tuple) and isinstance(yours, tuple) and mine == yours):
                return False
        # An int promotes otherwise than an equal float, and 0.0 is equal to -0.0.
        elif type(mine) is not type(yours) or mine != yours or mine == 0:
            return False
    return True


def _types(kind: tuple[Any, ...]) -> list[Argument]:
    """Types of the tensor arguments, and whether each stands for a 0-dim tensor."""
    return [entry for entry in kind if isinstance(entry, tuple)]


def _bind(fn: Any, keywords: dict[str, Any], operands: tuple[Any, ...], position: int) -> Callable[..., Any]:
    """``fn`` of the tensors at a position, its numbers in their places."""
    items = [_at(operand, position) for operand in operands]

    def bound(*values: Any) -> Any:
        rest = list(values)
        return fn(*[rest.pop(0) if isinstance(item, Tensor) else item for item in items], **keywords)

    return bound


def _operands(call: Description, tensors: Sequence[Tensor]) -> list[Any]:
    rest, length = list(tensors), len(call["which"])
    return [
        [rest.pop(0) for _ in range(length)] if how == "each" else rest.pop(0) for how in call["operands"]
    ]


def _shapes(
    call: Description, tensors: Sequence[Tensor], outputs: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    operands, count = _operands(call, tensors), counts[0] or 1
    results = []
    for index in range(count):
        for position, which in enumerate(call["which"]):
            items = [_at(operand, position) for operand in operands]
            shape = torch.broadcast_shapes(*[item.shape for item in items])  # type: ignore[no-untyped-call]
            dtype = outputs[which * count + index].dtype
            if call["reduction"]:
                shape, dtype = (), reduced_dtype(dtype, call["reduction"])
            results.append(items[0].new_empty(shape, dtype=dtype))
    return [*results, tensors[0].new_empty(0)] if counts[0] else results


def _run(
    call: Description, numbers: Numbers, tensors: Sequence[Tensor], functions: Sequence[Callable[..., Any]]
) -> Sequence[Tensor]:
    operands = _operands(call, tensors)
    found: dict[int, Any] = {}
    several = False
    for which, function in enumerate(functions):
        positions = [p for p, w in enumerate(call["which"]) if w == which]
        parts = [[operand[p] for p in positions] if _is_list(operand) else operand for operand in operands]
        result = serve(function, tuple(parts), None, {}, Policy(call["backend"], reduction=call["reduction"]))
        several = isinstance(result, tuple)
        found.update(zip(positions, zip(*(result if several else [result]), strict=True), strict=True))
    lists = zip(*(found[position] for position in range(len(call["which"]))), strict=True)
    flat = [tensor for values in lists for tensor in values]
    return [*flat, tensors[0].new_empty(0)] if several else flat


FAMILIES["foreach"] = Family(_shapes, _run)
