"""Packed weights as operands of a matrix product: their bytes as they are, dequantised where they are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torchhal.operands import Packed
from torchhal.problems import Decline, MatmulProblem


def decline(problem: MatmulProblem) -> Decline | None:
    """Why a product with this packed weight is not served, or None where it is."""
    function = problem.b_prologue
    if function is not None and function.captured and "captured_gradient" in problem.features:
        return Decline(
            "packed_prologue_gradient",
            "the gradient of what a prologue of a packed weight captures is as large as the dequantised weight, which is "
            "never made",
        )
    return None


class Operand(NamedTuple):
    """A packed weight, or its transpose, as far as a product asks what it would ask of a tensor."""

    weight: Packed
    """Its tensors are contiguous."""
    transposed: bool = False

    @staticmethod
    def of(weight: Packed) -> Operand:
        """The weight as an operand (K, N)."""
        if all([part.is_contiguous() for part in weight.tensors]):  # noqa: C419 (a list is quicker)
            return Operand(weight)
        state = weight.state().items()
        tensors = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in state}
        return Operand(type(weight).from_state(tensors))

    @property
    def shape(self) -> torch.Size:
        """(K, N)."""
        rows, columns = self.weight.shape
        return torch.Size((columns, rows) if self.transposed else (rows, columns))

    @property
    def dtype(self) -> torch.dtype:
        """Type that the weight stands for; with that of the other operand it decides what is computed with."""
        return self.weight.dtype

    @property
    def mT(self) -> Operand:
        """The transpose."""
        return Operand(self.weight, not self.transposed)

    def dim(self) -> int:
        """It is a matrix."""
        return 2

    def stride(self) -> tuple[int, int]:
        """Nobody reads elements by strides."""
        return 0, 0

    def data_ptr(self) -> int:
        """Nor where a tensor's memory would be."""
        return 0

    def expand(self, *shape: int) -> Tensor:
        """A stand-in whose strides along the batch are 0, as the weight serves all of it."""
        return torch.empty(1, device=self.weight.device).expand(shape)

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """A part of it as a tensor, of which there is none but the empty one."""
        if length:
            raise ValueError("only an empty part of a packed weight is a tensor")
        shape = list(self.shape)
        shape[dim] = 0
        return torch.empty(shape, dtype=self.dtype, device=self.weight.device)
