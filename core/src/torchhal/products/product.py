"""One fused matrix product around a kernel, and the ``run`` of a Plan that is made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.derivatives import is_transformed
from torchhal.operands import MatmulOperands, Packed, is_readable
from torchhal.pointwise.factors import reads
from torchhal.problems import MatmulProblem
from torchhal.products import gradients
from torchhal.products.graphs import BATCH, Captured, Function, Functions, Fused, folded, fuse
from torchhal.products.packed import Operand
from torchhal.reference import matmul as reference

Run = Callable[[Tensor, "Tensor | Packed", "Tensor | None", "MatmulOperands | None"], tuple[Tensor, ...]]
Multiply = Callable[
    [
        Tensor,
        "Tensor | Operand",
        "Tensor | None",
        "tuple[Function | None, Function | None, Function | None]",
        "tuple[torch.dtype, ...]",
    ],
    tuple[Tensor, ...],
]
"""``(a, b, bias, functions, out_dtypes)`` to one contiguous tensor (..., M, N) for each of ``out_dtypes``: the kernel. ``functions``
are ``a_prologue``, ``b_prologue`` and ``epilogue``, each of ``(value)`` or ``(value, batch, row, col)``. The results of an
epilogue have ``out_dtypes``; without one there is one result, of a type in :data:`torchhal.products.graphs.STORED`."""
NOTHING: Final = Captured()
NO_FUNCTIONS: Final = (None, None, None)
GRADIENTS: Final = frozenset({"backward", "captured_gradient"})
"""Features of a problem that ask for gradients."""


def wants_gradients(problem: MatmulProblem) -> bool:
    """Whether autograd is to follow the result."""
    return not GRADIENTS.isdisjoint(problem.features)


def runner(problem: MatmulProblem, who: str, multiply: Multiply) -> Run:
    """The ``run`` of a Plan, as :func:`torchhal.hookspecs.torchhal_matmul` has it.

    Args:
        problem: what is served.
        who: the backend, for messages.
        multiply: its kernel, for tensors that are what their memory says; of others plain torch computes.
    """
    functions = Functions(problem.a_prologue, problem.b_prologue, problem.epilogue)
    product = Product(
        functions, reference.compute_dtype(problem), problem.bias_dtype, problem.out_dtypes, multiply, who
    )
    specification = reference.plan(problem).run
    learns = wants_gradients(problem)
    plain = not learns and product.fused == Fused(Functions(), (False, False), False)

    def run(
        a: Tensor, b: Tensor | Packed, bias: Tensor | None, operands: MatmulOperands | None
    ) -> tuple[Tensor, ...]:
        captured = NOTHING if operands is None else _captured(operands)
        if is_transformed() or not is_readable(_tensors(a, b, bias, captured)):
            return specification(a, b, bias, operands)  # type: ignore[no-any-return]
        right = b if isinstance(b, Tensor) else Operand.of(b)
        if a.dim() > 2 and right.dim() == 2 and _folds(a, functions) and _gains(a, product):
            part = folded_product(product, captured, a.shape[-2], a.device)
            outputs = serve(part.product, a.flatten(0, -2), right, bias, part.captured)
            return tuple(out.view(*a.shape[:-1], out.shape[-1]) for out in outputs)
        return serve(product, a, right, bias, captured)

    def serve(
        product: Product, a: Tensor, b: Tensor | Operand, bias: Tensor | None, captured: Captured
    ) -> tuple[Tensor, ...]:
        if plain:
            return multiply(a, b, bias, NO_FUNCTIONS, product.out_dtypes)
        if learns:
            return gradients.apply(product, a, b, bias, captured)
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
    multiply: Multiply
    who: str
    """The backend, for messages."""

    def run(
        self, a: Tensor, b: Tensor | Operand, bias: Tensor | None, captured: Captured
    ) -> tuple[Tensor, ...]:
        """One tensor (..., M, N) for each of ``out_dtypes``."""
        fused = self.fused if a.shape[-1] else self.fused_without_factors
        given = None if fused.bias else bias
        return self.multiply(a, b, given, fused.arrange(captured, bias), self.out_dtypes)

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


def _gains(a: Tensor, product: Product) -> bool:
    """Whether the longer matrix is worth that functions work out batch and row of each element, on a processor with no cheap division."""
    return a.device.type == "cpu" or a.shape[-2] < FEW or _fold(product) is product


FEW: Final = 64
"""Rows of a matrix that do not fill a tile of its own."""


def folded_product(product: Product, captured: Captured, rows: int, device: torch.device) -> _Folded:
    """The product of a matrix whose rows are those of a batch of matrices of ``rows``."""
    found = _fold(product)
    # Equal graphs need not be the same object: what was folded for one is kept for all.
    of_a, _, of_epilogue = (was != now for was, now in zip(product.functions, found.functions, strict=True))
    if not (of_a or of_epilogue):
        return _Folded(found, captured)
    count = torch.full((), rows, dtype=torch.int32, device=device)  # which a device graph can hold
    return _Folded(
        found,
        Captured(
            (*captured.a, count) if of_a else captured.a,
            captured.b,
            (*captured.epilogue, count) if of_epilogue else captured.epilogue,
        ),
    )


@lru_cache(maxsize=1024)
def _fold(product: Product) -> Product:
    a, b, epilogue = product.functions
    functions = Functions(None if a is None else folded(a), b, None if epilogue is None else folded(epilogue))
    return product if functions == product.functions else replace(product, functions=functions)
