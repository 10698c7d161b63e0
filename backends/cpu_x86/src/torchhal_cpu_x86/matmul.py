"""Plans for the fused matrix product: packed panels, captured functions by the vector machine, gradients by recomputation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchhal import Decline, Plan
from torchhal.operands import MatmulOperands, Packed
from torchhal.pointwise.factors import reads
from torchhal.problems import MatmulProblem
from torchhal.reference import matmul as reference
from torchhal_cpu_x86 import hardware, native, packed, product_gradients, products
from torchhal_cpu_x86.gradients import is_transformed
from torchhal_cpu_x86.maps import Column, is_readable
from torchhal_cpu_x86.packed import Operand
from torchhal_cpu_x86.product_graphs import BATCH, Captured, Functions, folded, fuse

Run = Callable[[Tensor, "Tensor | Packed", "Tensor | None", "MatmulOperands | None"], tuple[Tensor, ...]]
GRADIENTS = frozenset({"backward", "captured_gradient"})
"""Features of a problem that ask for gradients."""


def plan(problem: MatmulProblem) -> Plan | Decline:
    """The native plan for a problem, or why this machine has none."""
    refusal = hardware.decline()
    if refusal is not None:
        return refusal
    refusal = None if problem.packing is None else packed.decline(problem)
    if refusal is not None:
        return refusal
    compute = reference.compute_dtype(problem)
    return Plan(
        run=_runner(problem),
        description=f"native, {native.load().get_isa(compute)}, packed panels",
        differentiable=_wants_gradients(problem),
        workspace="24 MB, and 1 MB for each thread",
    )


def _wants_gradients(problem: MatmulProblem) -> bool:
    return not GRADIENTS.isdisjoint(problem.features)


def _runner(problem: MatmulProblem) -> Run:
    """The ``run`` of a plan for a weight that is a tensor."""
    functions = Functions(problem.a_prologue, problem.b_prologue, problem.epilogue)
    product = Product(functions, reference.compute_dtype(problem), problem.bias_dtype, problem.out_dtypes)
    serve = product.differentiable if _wants_gradients(problem) else product.run
    specification = reference.plan(problem).run
    has_functions = any(graph is not None for graph in functions)

    def run(
        a: Tensor, b: Tensor | Packed, bias: Tensor | None, operands: MatmulOperands | None
    ) -> tuple[Tensor, ...]:
        captured = _captured(operands) if has_functions and operands is not None else Captured()
        if is_transformed() or not is_readable(Column([a, *_plain(b), *_tensors(bias, captured)])):
            return specification(a, b, bias, operands)  # type: ignore[no-any-return]
        right = b if isinstance(b, Tensor) else Operand.of(b)
        if a.dim() == 2 or right.dim() > 2 or not _folds(a, functions):
            return serve(a, right, bias, captured)
        rows = a.shape[-2]
        part = folded_product(product, captured, rows)
        serve_part = part.product.differentiable if _wants_gradients(problem) else part.product.run
        outputs = serve_part(a.flatten(0, -2), right, bias, part.captured)
        return tuple(out.view(*a.shape[:-1], out.shape[-1]) for out in outputs)

    return run


def _plain(b: Tensor | Packed) -> list[Tensor]:
    return [b] if isinstance(b, Tensor) else []


def _captured(operands: MatmulOperands) -> Captured:
    return Captured(operands.a_captured, operands.b_captured, operands.epilogue_captured)


def _tensors(bias: Tensor | None, captured: Captured) -> list[Tensor]:
    given = [] if bias is None else [bias]
    return [*given, *captured.a, *captured.b, *captured.epilogue]


# ---------------------------------------------------------------------------- one product


@dataclass(frozen=True)
class Product:
    """``epilogue(a_prologue(a) @ b_prologue(b) + bias)`` for operands of given types."""

    functions: Functions
    compute: torch.dtype
    bias_dtype: torch.dtype | None
    out_dtypes: tuple[torch.dtype, ...]

    def run(
        self, a: Tensor, b: Tensor | Operand, bias: Tensor | None, captured: Captured
    ) -> tuple[Tensor, ...]:
        """One tensor (..., M, N) for each of ``out_dtypes``."""
        fused = fuse(self.functions, self.compute, self.bias_dtype, self.out_dtypes, a.shape[-1] > 0)
        given = None if fused.bias else bias
        return products.multiply(a, b, given, fused.arrange(captured, bias), self.out_dtypes)

    def differentiable(
        self, a: Tensor, b: Tensor | Operand, bias: Tensor | None, captured: Captured
    ) -> tuple[Tensor, ...]:
        """The same, for autograd."""
        return product_gradients.apply(self, a, b, bias, captured)


# ---------------------------------------------------------------------------- a batch of rows


@dataclass(frozen=True)
class _Folded:
    product: Product
    captured: Captured


def _folds(a: Tensor, functions: Functions) -> bool:
    """Whether a batch of ``a`` before an unbatched ``b`` is a longer matrix: b is packed, or read, once for all of it."""
    shape, stride = a.shape[:-1], a.stride()[:-1]
    if 0 in shape or (functions.b_prologue is not None and reads(functions.b_prologue, (BATCH,))):
        return False
    return all(stride[i] == stride[i + 1] * shape[i + 1] or shape[i] == 1 for i in range(len(shape) - 1))


def folded_product(product: Product, captured: Captured, rows: int) -> _Folded:
    """The product of a matrix whose rows are those of a batch of matrices of ``rows``."""
    a, b, epilogue = product.functions
    functions = Functions(None if a is None else folded(a), b, None if epilogue is None else folded(epilogue))
    count = torch.tensor(rows, dtype=torch.int32)
    given = Captured(
        _with(captured.a, count, a is not functions.a_prologue),
        captured.b,
        _with(captured.epilogue, count, epilogue is not functions.epilogue),
    )
    return _Folded(Product(functions, product.compute, product.bias_dtype, product.out_dtypes), given)


def _with(tensors: Sequence[Tensor], count: Tensor, wanted: bool) -> Sequence[Tensor]:
    return (*tensors, count) if wanted else tensors
