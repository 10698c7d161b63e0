"""The specification of the fused matrix product, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from torchhal.operands import MatmulOperands, Packed
from torchhal.pointwise import Graph, evaluate
from torchhal.problems import MatmulProblem, Plan
from torchhal.reference.packing import unpack

_DEQUANTISED: Final = "the whole weight is dequantised first"
_UNFUSED: Final = {
    "a_prologue": "the whole of a is rewritten first",
    "b_prologue": "the whole of b is rewritten first",
    "bias": "it is added to the finished product",
    "epilogue": "it is applied to the finished product",
    "packed_int8": _DEQUANTISED,
    "packed_int4": _DEQUANTISED,
    "packed_gguf": _DEQUANTISED,
}


def plan(problem: MatmulProblem) -> Plan:
    """The reference serves every matmul problem."""

    def run(
        a: Tensor, b: Tensor | Packed, bias: Tensor | None, operands: MatmulOperands | None
    ) -> tuple[Tensor, ...]:
        return matmul(problem, a, b, bias, operands)

    unfused = {name: why for name, why in _UNFUSED.items() if name in problem.features}
    return Plan(run, "plain torch", differentiable=True, workspace="O(M K + K N + M N)", unfused=unfused)


def matmul(
    problem: MatmulProblem,
    a: Tensor,
    b: Tensor | Packed,
    bias: Tensor | None,
    operands: MatmulOperands | None,
) -> tuple[Tensor, ...]:
    """``epilogue(a_prologue(a) @ b_prologue(b) + bias)``, rounded once.

    Args:
        problem: the types and the captured functions.
        a: (..., M, K).
        b: (..., K, N), or a packed weight of that logical shape, whose elements are used as dequantised in
            float32, before any rounding to its own type. Batch dimensions broadcast.
        bias: (N,) or None.
        operands: captured tensors of each function, None where there are none.

    Returns:
        One tensor (..., M, N) for each of ``problem.out_dtypes``. A ``batch`` index counts the broadcast batch,
        flattened.
    """
    operands = operands or MatmulOperands()
    compute = compute_dtype(problem)
    with _no_autocast(a.device.type):
        right = unpack(b, compute) if isinstance(b, Packed) else b.to(compute)
        batch = _broadcast(a.shape[:-2], right.shape[:-2])
        left = _apply(problem.a_prologue, a.to(compute), batch, operands.a_captured)[0].to(compute)
        right = _apply(problem.b_prologue, right, batch, operands.b_captured)[0].to(compute)
        total = torch.matmul(left, right)
        if bias is not None:
            total = total + bias.to(compute)
        if problem.epilogue is None:
            return (total.to(problem.out_dtypes[0]),)
        outputs = _apply(problem.epilogue, total, batch, operands.epilogue_captured)
        return tuple(_store(value, dtype) for value, dtype in zip(outputs, problem.out_dtypes, strict=True))


def compute_dtype(problem: MatmulProblem) -> torch.dtype:
    """The type elements have inside the functions and the accumulation: float32, or float64 where an operand is."""
    return torch.float64 if torch.float64 in (problem.a_dtype, problem.b_dtype) else torch.float32


def _apply(
    graph: Graph | None, value: Tensor, batch: torch.Size, captured: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    if graph is None:
        return (value,)
    inputs = [value, *_indices(value, batch)][: len(graph.inputs)]
    outputs = evaluate(graph, inputs, captured)
    # A function that reads the batch index spreads over the whole batch; a constant one has no shape at all.
    return tuple(o.expand(_broadcast(o.shape, value.shape)) for o in outputs)


def _broadcast(one: torch.Size, other: torch.Size) -> torch.Size:
    return torch.Size(torch.broadcast_shapes(one, other))  # type: ignore[no-untyped-call]


def _indices(value: Tensor, batch: torch.Size) -> list[Tensor]:
    rows, columns = value.shape[-2:]

    def count(size: int) -> Tensor:
        return torch.arange(size, dtype=torch.int32, device=value.device)

    return [count(batch.numel()).reshape(*batch, 1, 1), count(rows).unsqueeze(-1), count(columns)]


def _store(value: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy of its own for each output: the epilogue may return one value twice, or a captured tensor.
    return value.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _no_autocast(device: str) -> AbstractContextManager[object]:
    # Autocast would round the operands of the product, against "accumulated in float32 or wider".
    asked = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if asked else nullcontext()
