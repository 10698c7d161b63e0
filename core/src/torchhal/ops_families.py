"""What each family's operator computes: the flat tensors back in their places, and the shapes of the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchhal import scope
from torchhal.operands import AttentionOperands, MatmulOperands, Packed, empty_output, packed_from_state
from torchhal.ops import Description, Operator, call, define
from torchhal.problems import AttentionProblem, ForeachProblem, MatmulProblem, Plan
from torchhal.reference.attention import score_dtype
from torchhal.selection import Route

if TYPE_CHECKING:
    from torchhal.attention_call import Call

# ---------------------------------------------------------------------------- attention


def attention(route: Route, given: Call, scale: float) -> Tensor | tuple[Tensor, ...]:
    """Record an attention call as one operator; the results are those of the plan."""
    named = [("query", given.query), ("key", given.key), ("value", given.value)]
    if given.attn_mask is not None:
        named.append(("attn_mask", given.attn_mask))
    operands = given.operands or AttentionOperands()
    named += [("captured", t) for t in operands.captured] + [
        ("mask_captured", t) for t in operands.mask_captured
    ]
    named += operands.layout().items()
    description = {
        "names": [name for name, _ in named],
        "scale": float(scale),
        "dropout_p": operands.dropout_p,
    }
    results = call(route, [tensor for _, tensor in named], description)
    return tuple(results) if len(results) > 1 else results[0]


def _run_attention(
    plan: Plan, problem: AttentionProblem, tensors: Sequence[Tensor], description: Description
) -> Sequence[Tensor]:
    single: dict[str, Any] = {}
    lists: dict[str, list[Tensor]] = {"captured": [], "mask_captured": []}
    for name, tensor in zip(description["names"], tensors, strict=True):
        if name in lists:
            lists[name].append(tensor)
        else:
            single[name] = tensor
    query, key, value, mask = (single.pop(name, None) for name in ("query", "key", "value", "attn_mask"))
    carried = AttentionOperands(
        tuple(lists["captured"]), tuple(lists["mask_captured"]), dropout_p=description["dropout_p"], **single
    )
    run = scope.uninstalled(plan.run)
    result = run(query, key, value, mask, description["scale"], carried)
    return result if problem.return_lse else (result,)


def attention_shapes(query: Tensor, key: Tensor, value: Tensor, rows: int) -> list[Tensor]:
    """Uninitialised results: ``out``, and as many contiguous tensors with a number for each row."""
    dtype = score_dtype(query.dtype, key.dtype, value.dtype)
    return [
        empty_output(query, value),
        *(query.new_empty(query.shape[:-1], dtype=dtype) for _ in range(rows)),
    ]


def _attention_shapes(
    problem: AttentionProblem, tensors: Sequence[Tensor], description: Description
) -> list[Tensor]:
    rows = problem.return_lse + problem.return_max_scores
    return attention_shapes(tensors[0], tensors[1], tensors[2], rows)


# ---------------------------------------------------------------------------- matmul


def matmul(
    route: Route, a: Tensor, b: Tensor | Packed, bias: Tensor | None, operands: MatmulOperands | None
) -> tuple[Tensor, ...]:
    """Record a fused matrix product as one operator."""
    carried = operands or MatmulOperands()
    groups = [carried.a_captured, carried.b_captured, carried.epilogue_captured]
    weight, packing = unpack_tensors(b)
    tensors = [a, *weight, *([] if bias is None else [bias]), *(t for group in groups for t in group)]
    description = {"packing": packing, "bias": bias is not None, "captured": [len(group) for group in groups]}
    return tuple(call(route, tensors, description))


def unpack_tensors(b: Tensor | Packed) -> tuple[list[Tensor], Description | None]:
    """The tensors of a weight, and for a packed one what else it holds, with the names of the tensors."""
    if isinstance(b, Tensor):
        return [b], None
    state = b.state()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in state.items() if name not in tensors}
    return list(tensors.values()), {"tensors": list(tensors), "rest": rest}


def pack_tensors(tensors: Iterator[Tensor], packing: Description | None) -> Tensor | Packed:
    """The inverse of :func:`unpack_tensors`, taking as many tensors as the weight has."""
    if packing is None:
        return next(tensors)
    return packed_from_state({**{name: next(tensors) for name in packing["tensors"]}, **packing["rest"]})


def _run_matmul(
    plan: Plan, problem: MatmulProblem, tensors: Sequence[Tensor], description: Description
) -> Sequence[Tensor]:
    rest = iter(tensors)
    a, b = next(rest), pack_tensors(rest, description["packing"])
    bias = next(rest) if description["bias"] else None
    groups = [tuple(next(rest) for _ in range(count)) for count in description["captured"]]
    return plan.run(a, b, bias, MatmulOperands(*groups))  # type: ignore[no-any-return]


def matmul_shape(a: Tensor | Packed, b: Tensor | Packed) -> list[Any]:
    """(..., M, N) of operands with at least two dimensions."""
    batch = torch.broadcast_shapes(a.shape[:-2], tuple(b.shape[:-2]))  # type: ignore[no-untyped-call]
    return [*batch, a.shape[-2], b.shape[-1]]


def _matmul_shapes(
    problem: MatmulProblem, tensors: Sequence[Tensor], description: Description
) -> list[Tensor]:
    rest = iter(tensors)
    a, b = next(rest), pack_tensors(rest, description["packing"])
    return [a.new_empty(matmul_shape(a, b), dtype=dtype) for dtype in problem.out_dtypes]


# ---------------------------------------------------------------------------- foreach


def foreach_map(
    route: Route, operands: Sequence[Any], captured: Sequence[Tensor]
) -> tuple[list[Tensor], ...]:
    """Record a foreach call as one operator; results are new tensors."""
    tensors: list[Tensor] = []
    entries: list[Any] = []
    for operand in operands:
        if isinstance(operand, Tensor):
            entries.append("tensor")
            tensors.append(operand)
        elif isinstance(operand, (list, tuple)) and isinstance(operand[0], Tensor):
            entries.append(len(operand))
            tensors += operand
        else:
            entries.append({"numbers": operand})
    results = call(route, [*tensors, *captured], {"operands": entries, "captured": len(captured)})
    length = max(entry for entry in entries if isinstance(entry, int))
    return tuple(results[start : start + length] for start in range(0, len(results), length))


def _foreach_operands(
    tensors: Sequence[Tensor], description: Description
) -> tuple[list[Any], tuple[Tensor, ...]]:
    rest = iter(tensors)
    operands: list[Any] = []
    for entry in description["operands"]:
        if entry == "tensor":
            operands.append(next(rest))
        elif isinstance(entry, int):
            operands.append([next(rest) for _ in range(entry)])
        else:
            operands.append(entry["numbers"])
    return operands, tuple(rest)


def _run_foreach(
    plan: Plan, problem: ForeachProblem, tensors: Sequence[Tensor], description: Description
) -> Sequence[Tensor]:
    results = plan.run(*_foreach_operands(tensors, description), None)
    return [tensor for values in results for tensor in values]


def _foreach_shapes(
    problem: ForeachProblem, tensors: Sequence[Tensor], description: Description
) -> list[Tensor]:
    """The reference, run on the fake tensors themselves, knows the shapes, types and strides."""
    from torchhal.reference.foreach import foreach_map as reference

    results = reference(problem, *_foreach_operands(tensors, description), None)
    return [tensor for values in results for tensor in values]


define("attention", Operator(_run_attention, _attention_shapes))
define("matmul", Operator(_run_matmul, _matmul_shapes))
define("foreach", Operator(_run_foreach, _foreach_shapes))
