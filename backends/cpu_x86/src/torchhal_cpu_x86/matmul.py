"""Plans for the fused matrix product: packed panels, captured functions by the vector machine, gradients by recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from torchhal import Decline, Plan
from torchhal.derivatives import is_transformed
from torchhal.operands import MatmulOperands, Packed
from torchhal.pointwise.factors import reads
from torchhal.problems import MatmulProblem
from torchhal.reference import matmul as reference
from torchhal_cpu_x86 import chains, hardware, native, packed, product_gradients, products, programs
from torchhal_cpu_x86.maps import Column, is_readable
from torchhal_cpu_x86.packed import Operand
from torchhal_cpu_x86.product_graphs import BATCH, Captured, Functions, Fused, folded, fuse

Run = Callable[[Tensor, "Tensor | Packed", "Tensor | None", "MatmulOperands | None"], tuple[Tensor, ...]]
NOTHING: Final = Captured()
GRADIENTS: Final = frozenset({"backward", "captured_gradient"})
"""Features of a problem that ask for gradients."""


def plan(problem: MatmulProblem) -> Plan | Decline:
    """The native plan for a problem, or why this machine has none."""
    refusal = hardware.decline()
    if refusal is not None:
        return refusal
    refusal = None if problem.packing is None else packed.decline(problem)
    if refusal is not None:
        return refusal
    unknown = sorted(str(dtype) for dtype in set(problem.out_dtypes) - programs.TYPES.keys())
    if unknown:
        return Decline(
            "out_dtype", f"results are written in types of the vector machine, not {', '.join(unknown)}"
        )
    compute = reference.compute_dtype(problem)
    kernel = torch.bfloat16 if problem.dtypes == {torch.bfloat16} else compute
    return Plan(
        run=_runner(problem),
        description=f"native, {native.load().get_isa(kernel)}, packed panels, one rounding",
        differentiable=_wants_gradients(problem),
        bind=None if problem.packing is None else chains.bind,
        workspace="24 MB, and 1 MB for each thread",
    )


def _wants_gradients(problem: MatmulProblem) -> bool:
    return not GRADIENTS.isdisjoint(problem.features)


def _runner(problem: MatmulProblem) -> Run:
    """The ``run`` of a plan for a weight that is a tensor."""
    functions = Functions(problem.a_prologue, problem.b_prologue, problem.epilogue)
    product = Product(functions, reference.compute_dtype(problem), problem.bias_dtype, problem.out_dtypes)
    specification = reference.plan(problem).run
    learns = _wants_gradients(problem)
    plain = not learns and product.fused == Fused(Functions(), (False, False), False)

    def run(
        a: Tensor, b: Tensor | Packed, bias: Tensor | None, operands: MatmulOperands | None
    ) -> tuple[Tensor, ...]:
        captured = NOTHING if operands is None else _captured(operands)
        if is_transformed() or not is_readable(Column(_tensors(a, b, bias, captured))):
            return specification(a, b, bias, operands)  # type: ignore[no-any-return]
        right = b if isinstance(b, Tensor) else Operand.of(b)
        if a.dim() > 2 and right.dim() == 2 and _folds(a, functions):
            part = folded_product(product, captured, a.shape[-2])
            outputs = serve(part.product, a.flatten(0, -2), right, bias, part.captured)
            return tuple(out.view(*a.shape[:-1], out.shape[-1]) for out in outputs)
        return serve(product, a, right, bias, captured)

    def serve(
        product: Product, a: Tensor, b: Tensor | Operand, bias: Tensor | None, captured: Captured
    ) -> tuple[Tensor, ...]:
        if plain:
            return products.multiply(a, b, bias, products.NO_FUNCTIONS, product.out_dtypes)
        if learns:
            return product_gradients.apply(product, a, b, bias, captured)
        return product.run(a, b, bias, captured)

    return run


def _captured(operands: MatmulOperands) -> Captured:
    return Captured(operands.a_captured, operands.b_captured, operands.epilogue_captured)


def _tensors(a: Tensor, b: Tensor | Packed, bias: Tensor | None, captured: Captured) -> list[Any]:
    """What has to be readable as it lies in memory; a packed weight's parts are plain tensors."""
    given: list[Any] = [a, b] if isinstance(b, Tensor) else [a]
    given += [] if bias is None else [bias]
    return given if captured is NOTHING else [*given, *captured.a, *captured.b, *captured.epilogue]


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
        fused = self.fused if a.shape[-1] else self.fused_without_factors
        given = None if fused.bias else bias
        return products.multiply(a, b, given, fused.arrange(captured, bias), self.out_dtypes)

    @cached_property
    def fused(self) -> Fused:
        """The functions as the kernel runs them."""
        return fuse(self.functions, self.compute, self.bias_dtype, self.out_dtypes)

    @cached_property
    def fused_without_factors(self) -> Fused:
        """The same for an empty sum."""
        return fuse(self.functions, self.compute, self.bias_dtype, self.out_dtypes, hoist=False)


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
    found = _fold(product)
    (a, _, epilogue), (a_folded, _, epilogue_folded) = product.functions, found.functions
    if a is a_folded and epilogue is epilogue_folded:
        return _Folded(found, captured)
    count = torch.tensor(rows, dtype=torch.int32, device="cpu")
    return _Folded(
        found,
        Captured(
            captured.a if a is a_folded else (*captured.a, count),
            captured.b,
            captured.epilogue if epilogue is epilogue_folded else (*captured.epilogue, count),
        ),
    )


@lru_cache(maxsize=1024)
def _fold(product: Product) -> Product:
    a, b, epilogue = product.functions
    functions = Functions(None if a is None else folded(a), b, None if epilogue is None else folded(epilogue))
    return product if functions == product.functions else replace(product, functions=functions)
