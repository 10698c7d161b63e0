"""Plans for the fused matrix product: the portable Triton kernels with tiles for this device, and cuBLAS for plain products."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from torchhal.portable import matmul
from torchhal.problems import Decline, MatmulProblem, Plan
from torchhal.products.graphs import Function
from torchhal.products.packed import Operand
from torchhal.products.product import NO_FUNCTIONS, wants_gradients
from torchhal_cuda128 import matmul_tiles, tiles
from torchhal_cuda128.hardware import Hardware

LEAST: Final = 512
"""Rows, columns and terms from which on plain products are cuBLAS's. Of fewer it may cut the sum into parts and round those to
the element type (``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``), which the specification forbids."""


def plan(problem: MatmulProblem, hardware: Hardware) -> Plan | Decline:
    """The plan for a matrix product on the hardware that was seen."""
    device = tiles.device_of(problem, hardware)
    if isinstance(device, Decline):
        return device
    refusal = matmul.decline(problem)
    if refusal is not None:
        return refusal
    return Plan(
        run=matmul.runner(problem, "cuda128", Multiplier(matmul.Multiplier(matmul_tiles.tuning(device)))),
        description=f"Triton, {device.architecture}, one pass" + _engines(problem),
        deterministic=True,
        differentiable=wants_gradients(problem),
        workspace="O(M N) where few tiles cut their sums into parts",
    )


def _engines(problem: MatmulProblem) -> str:
    """What else computes, for a person."""
    functions = (
        problem.a_prologue,
        problem.b_prologue,
        problem.epilogue,
        problem.bias_dtype,
        problem.packing,
    )
    plain = all(found is None for found in functions) and len(problem.dtypes) == 1
    return f", cuBLAS from {LEAST} rows, columns and terms on" if plain else ""


class Multiplier:
    """:data:`torchhal.products.product.Multiply` by Triton or, of large plain products, by cuBLAS through torch."""

    def __init__(self, triton: matmul.Multiplier) -> None:
        self.triton = triton

    def __call__(
        self,
        a: Tensor,
        b: Tensor | Operand,
        bias: Tensor | None,
        functions: tuple[Function | None, Function | None, Function | None],
        out_dtypes: tuple[torch.dtype, ...],
    ) -> tuple[Tensor, ...]:
        if (
            functions == NO_FUNCTIONS
            and bias is None
            and isinstance(b, Tensor)
            and out_dtypes == (a.dtype,) == (b.dtype,)
            and is_large(a, b)
            and not torch.is_autocast_enabled("cuda")
        ):
            return (torch.matmul(a, b),)
        return self.triton(a, b, bias, functions, out_dtypes)


def is_large(a: Tensor, b: Tensor) -> bool:
    """Whether cuBLAS takes the matrices as they lie in memory, and does not cut their sums."""
    if a.dim() != 2 or b.dim() != 2 or min(*a.shape, b.shape[1]) < LEAST:
        return False
    return all(1 in t.stride() and max(t.stride()) < 2**31 for t in (a, b))
