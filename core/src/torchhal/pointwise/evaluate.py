"""What a graph means: its evaluation with torch, differentiable, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.pointwise.dtypes import NAME_OF, is_float
from torchhal.pointwise.graph import Graph, Node
from torchhal.pointwise.primitives import PRIMITIVES, TENSOR_FIRST


def evaluate(
    graph: Graph,
    inputs: Sequence[Tensor],
    captured: Sequence[Tensor] = (),
    *,
    upcast: torch.dtype | None = None,
    clamp_indices: bool = False,
) -> tuple[Tensor, ...]:
    """Evaluate ``graph`` elementwise over broadcastable tensors.

    Args:
        graph: the function.
        inputs: one tensor per graph input, of the recorded dtype, of shapes that broadcast together.
        captured: one tensor per captured tensor of the graph, of the recorded dtype and rank.
        upcast: compute every floating value in this dtype, for oracles; floating inputs and captured
            tensors may then have any floating dtype.
        clamp_indices: bring indices into range before reading. Attention evaluates positions that the
            mask then discards; without clamping an index outside ``[-size, size)`` is a mistake.

    Returns:
        One tensor per output, of the recorded dtype (``upcast`` for floating ones). Each has the
        broadcast shape of what it depends on; one that depends on no input is 0-dim.

    Raises:
        InvalidProblem: wrong number of tensors, a dtype or rank other than recorded, or, where torch finds it (on the
            CPU), an index outside a captured tensor.

    Gradients flow through autograd to inputs and captured tensors.
    """
    _check(graph, inputs, captured, upcast)
    return _Evaluation(graph, inputs, captured, upcast, clamp_indices).run()


class _Evaluation:
    def __init__(
        self,
        graph: Graph,
        inputs: Sequence[Tensor],
        captured: Sequence[Tensor],
        upcast: torch.dtype | None,
        clamp_indices: bool,
    ) -> None:
        self.graph = graph
        self.inputs = inputs
        self.captured = captured
        self.upcast = upcast
        self.clamp_indices = clamp_indices
        self.device = next((t.device for t in (*inputs, *captured)), torch.device("cpu"))
        self.results: list[Any] = []

    def run(self) -> tuple[Tensor, ...]:
        for node in self.graph.nodes:
            self.results.append(self._node(node))
        return tuple(self._tensor(i) for i in self.graph.outputs)

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.upcast if self.upcast is not None and is_float(dtype) else dtype

    def _tensor(self, i: int) -> Tensor:
        """Node ``i``'s result as a tensor; Python numbers stay numbers for as long as torch takes them."""
        result = self.results[i]
        if isinstance(result, Tensor):
            return result
        return torch.full((), result, dtype=self._dtype(self.graph.nodes[i].dtype), device=self.device)

    def _node(self, node: Node) -> Any:
        if node.primitive == "constant":
            return node.value
        if node.primitive == "input":
            return self._cast(self.inputs[node.position], node.dtype)
        if node.primitive == "cast":
            return self._cast(self._tensor(node.operands[0]), node.dtype)
        if node.primitive == "gather":
            return self._gather(node)
        return self._apply(node)

    def _cast(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(self._dtype(dtype))

    def _apply(self, node: Node) -> Any:
        word = PRIMITIVES[node.primitive]
        assert word.torch is not None
        operands = [self.results[i] for i in node.operands]
        if word.tensors_only or not any(
            isinstance(operand, Tensor) for operand in self._typing(node, operands)
        ):
            operands = [self._tensor(i) for i in node.operands]
        elif node.primitive in TENSOR_FIRST:
            operands[0] = self._tensor(node.operands[0])
        return word.torch(*operands)

    @staticmethod
    def _typing(node: Node, operands: list[Any]) -> list[Any]:
        """The operands that decide the result's dtype: all but the condition of a where."""
        return operands[1:] if node.primitive == "where" else operands

    def _gather(self, node: Node) -> Tensor:
        source = self._cast(self.captured[node.position], node.dtype)
        if not node.operands:
            return source
        indices = [self._index(i, size) for i, size in zip(node.operands, source.shape, strict=True)]
        try:
            return source[tuple(indices)]
        except IndexError:
            _check_indices(node.position, source.shape, indices)
            raise

    def _index(self, i: int, size: int) -> Tensor:
        index = self._tensor(i).long()
        if not self.clamp_indices:
            return index
        return torch.clamp(index, -size, size - 1)


def _check(
    graph: Graph, inputs: Sequence[Tensor], captured: Sequence[Tensor], upcast: torch.dtype | None
) -> None:
    if upcast is not None and not is_float(upcast):
        raise InvalidProblem(f"upcast must be a floating dtype, got {upcast}")
    for kind, given, expected in (
        ("inputs", inputs, graph.inputs),
        ("captured tensors", captured, graph.captured),
    ):
        if len(given) != len(expected):
            raise InvalidProblem(f"this graph has {len(expected)} {kind}, got {len(given)}")
    for (name, dtype), tensor in zip(graph.inputs, inputs, strict=True):
        _check_dtype(f"input {name!r}", dtype, tensor, upcast)
    for i, (spec, tensor) in enumerate(zip(graph.captured, captured, strict=True)):
        _check_dtype(f"captured tensor {i}", spec.dtype, tensor, upcast)
        if tensor.dim() != spec.ndim:
            raise InvalidProblem(
                f"captured tensor {i} must have {spec.ndim} dimensions, got shape {tuple(tensor.shape)}"
            )


def _check_indices(position: int, shape: torch.Size, indices: Sequence[Tensor]) -> None:
    """Say which index is outside a captured tensor that torch could not index; data is read, for the call is over."""
    for dim, (index, size) in enumerate(zip(indices, shape, strict=True)):
        outside = index[(index < -size) | (index >= size)]
        if outside.numel():
            raise InvalidProblem(
                f"captured tensor {position} has shape {tuple(shape)}, and the function reads index "
                f"{int(outside.flatten()[0])} of its dimension {dim}; keep indices within the tensor, for example "
                "with torch.clamp, or make it larger"
            )


def _check_dtype(whose: str, dtype: torch.dtype, tensor: Tensor, upcast: torch.dtype | None) -> None:
    if tensor.dtype is dtype or (upcast is not None and is_float(dtype) and is_float(tensor.dtype)):
        return
    raise InvalidProblem(f"{whose} must be {NAME_OF[dtype]}, got {tensor.dtype}")
