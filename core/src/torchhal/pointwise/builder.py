"""Builds graphs node by node: types checked, constants folded, equal nodes merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchhal.errors import InvalidProblem
from torchhal.pointwise.dtypes import NAME_OF, Number, convert, is_float, is_integer, promote
from torchhal.pointwise.fold import fold
from torchhal.pointwise.graph import Attribute, CapturedSpec, Graph, Input, Node
from torchhal.pointwise.primitives import COMMUTATIVE, PRIMITIVES, is_index, misfit

_LEAVES = frozenset(("input", "constant", "gather"))


class GraphBuilder:
    """A graph under construction; every method returns the id of a node.

    Args:
        inputs: (name, dtype) of each scalar argument.
        captured: dtype and rank of each captured tensor; :meth:`add_captured` appends more.
    """

    def __init__(
        self, inputs: Sequence[tuple[str, torch.dtype]], captured: Sequence[tuple[torch.dtype, int]] = ()
    ) -> None:
        self.inputs = tuple(Input(name, dtype) for name, dtype in inputs)
        self.captured = [CapturedSpec(dtype, ndim) for dtype, ndim in captured]
        self.nodes: list[Node] = []
        self._ids: dict[Node, int] = {}
        self._reads: list[frozenset[int]] = []
        """For each node, the inputs it depends on, whose shapes its own is made of."""
        for name, dtype in self.inputs:
            _check_dtype(dtype, f"input {name!r}")

    def add_captured(self, dtype: torch.dtype, ndim: int) -> int:
        """Declare one more captured tensor; returns its position."""
        _check_dtype(dtype, f"captured tensor {len(self.captured)}")
        self.captured.append(CapturedSpec(dtype, ndim))
        return len(self.captured) - 1

    def dtype(self, node: int) -> torch.dtype:
        """The dtype of a node."""
        return self.nodes[node].dtype

    def input(self, position: int) -> int:
        """The scalar argument at ``position``."""
        return self._intern(Node("input", (), self.inputs[position].dtype, position))

    def constant(self, value: Number, dtype: torch.dtype) -> int:
        """``value`` converted to ``dtype``."""
        number = convert(value, dtype)
        attribute: Attribute = repr(number) if isinstance(number, float) else number
        return self._intern(Node("constant", (), dtype, attribute))

    def exponent(self, value: Number) -> int:
        """``value`` as the exponent of a float32 ``pow``: a float32 constant that keeps its float64 digits.

        Torch's kernel rounds a number to float32 for the elements it raises by vectors, and does not for the rest.
        """
        return self._intern(Node("constant", (), torch.float32, repr(float(value))))

    def gather(self, position: int, indices: Sequence[int]) -> int:
        """The captured tensor at ``position``, indexed down to a scalar.

        Raises:
            InvalidProblem: too few or too many indices, or one that is neither int32 nor int64.
        """
        spec = self.captured[position]
        if len(indices) != spec.ndim:
            raise InvalidProblem(
                f"captured {position} has {spec.ndim} dimensions, got {len(indices)} indices"
            )
        dtypes = [self.dtype(i) for i in indices]
        if not all(is_index(dtype) for dtype in dtypes):
            raise InvalidProblem(misfit("gather", dtypes))
        return self._intern(Node("gather", tuple(indices), spec.dtype, position))

    def cast(self, operand: int, dtype: torch.dtype) -> int:
        """``operand`` converted to ``dtype``; nothing where it has it, or only widened from it, already."""
        source = self.nodes[operand]
        if source.dtype is dtype:
            return operand
        if source.primitive == "cast" and _keeps(self.dtype(source.operands[0]), source.dtype):
            return self.cast(source.operands[0], dtype)
        return self._fold("cast", (operand,), dtype)

    def apply(self, primitive: str, *operands: int) -> int:
        """``primitive`` over ``operands``.

        Raises:
            InvalidProblem: unknown primitive, wrong number of operands, or dtypes it does not accept.
        """
        word = PRIMITIVES.get(primitive)
        if word is None or primitive in _LEAVES or primitive == "cast":
            raise InvalidProblem(f"{primitive!r} is no primitive that apply() can emit")
        dtypes = [self.dtype(i) for i in operands]
        dtype = word.rule(dtypes) if len(operands) == word.arity else None
        if dtype is None:
            raise InvalidProblem(misfit(primitive, dtypes))
        if primitive in COMMUTATIVE and self._is_constant(operands[0]) and not self._is_constant(operands[1]):
            operands = (operands[1], operands[0])
        return self._simplify(primitive, operands, dtype)

    def finish(self, outputs: Sequence[int]) -> Graph:
        """The canonical graph computing ``outputs``; inputs and captured tensors stay as declared."""
        order = self._walk(outputs)
        number = {old: new for new, old in enumerate(order)}
        nodes = []
        for old in order:
            primitive, operands, dtype, attribute = self.nodes[old]
            nodes.append(Node(primitive, tuple([number[i] for i in operands]), dtype, attribute))
        return Graph(self.inputs, tuple(self.captured), tuple(nodes), tuple([number[i] for i in outputs]))

    def import_nodes(
        self, graph: Graph, inputs: Sequence[int], captured: Sequence[int] | None = None
    ) -> list[int]:
        """Copy ``graph``'s nodes in; returns the id each of its nodes has here.

        Args:
            graph: the graph to copy.
            inputs: the node here that stands for each input of ``graph``.
            captured: the position here of each captured tensor of ``graph``; the same by default.
        """
        here: list[int] = []
        for primitive, operands, dtype, attribute in graph.nodes:
            mapped = [here[i] for i in operands]
            if primitive == "input":
                here.append(inputs[int(attribute or 0)])
            elif primitive == "gather":
                position = int(attribute or 0)
                here.append(self.gather(position if captured is None else captured[position], mapped))
            elif primitive == "constant":
                here.append(self._intern(Node(primitive, (), dtype, attribute)))
            elif primitive == "cast":
                here.append(self.cast(mapped[0], dtype))
            else:
                here.append(self.apply(primitive, *mapped))
        return here

    def constant_value(self, node: int) -> Number | None:
        """The number behind a constant node, None for any other."""
        return self.nodes[node].value if self._is_constant(node) else None

    def _is_constant(self, node: int) -> bool:
        return self.nodes[node].primitive == "constant"

    def _simplify(self, primitive: str, operands: tuple[int, ...], dtype: torch.dtype) -> int:
        first = self.nodes[operands[0]]
        if primitive == "where" and first.primitive == "constant":
            return operands[1] if first.attribute else operands[2]
        # Between equal branches a condition still counts where it reads an input that they do not: it broadcasts them.
        if primitive == "where" and operands[1] == operands[2] and self._reads_no_more(*operands[:2]):
            return operands[1]
        if primitive == "logical_not" and first.primitive == "logical_not":
            return first.operands[0]
        if primitive in ("logical_and", "logical_or"):
            known = self.nodes[operands[1]]
            if operands[0] == operands[1]:
                return operands[0]
            if known.primitive == "constant":
                return operands[0] if known.attribute is (primitive == "logical_and") else operands[1]
        return self._fold(primitive, operands, dtype)

    def _fold(self, primitive: str, operands: tuple[int, ...], dtype: torch.dtype) -> int:
        values = []
        for operand in operands:
            node = self.nodes[operand]
            if node.primitive != "constant":
                return self._intern(Node(primitive, operands, dtype))
            values.append(node.value)
        folded = fold(primitive, values, self.dtype(operands[0]), dtype)
        return (
            self._intern(Node(primitive, operands, dtype)) if folded is None else self.constant(folded, dtype)
        )

    def _reads_no_more(self, node: int, other: int) -> bool:
        return self._reads[node] <= self._reads[other]

    def _intern(self, node: Node) -> int:
        known = self._ids.get(node)
        if known is None:
            known = self._ids[node] = len(self.nodes)
            self.nodes.append(node)
            own = (node.position,) if node.primitive == "input" else ()
            self._reads.append(frozenset(own).union(*[self._reads[i] for i in node.operands]))
        return known

    def _walk(self, outputs: Sequence[int]) -> list[int]:
        """Ids in the order a depth-first walk finishes them; a loop, because graphs may be deep."""
        order: dict[int, None] = {}
        stack = [(i, False) for i in reversed(outputs)]
        while stack:
            node, ready = stack.pop()
            if node in order:
                continue
            if ready:
                order[node] = None
                continue
            stack.append((node, True))
            stack += [(i, False) for i in reversed(self.nodes[node].operands)]
        return list(order)


def _check_dtype(dtype: torch.dtype, whose: str) -> None:
    if dtype not in NAME_OF:
        raise InvalidProblem(
            f"{whose} has dtype {dtype}; the pointwise language has {', '.join(NAME_OF.values())}"
        )


def _keeps(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every value of ``narrow`` survives a conversion to ``wide``."""
    if narrow is torch.bool:
        return True
    if is_float(narrow):
        return is_float(wide) and promote(narrow, wide) is wide
    if is_integer(wide):
        return promote(narrow, wide) is wide
    return is_float(wide) and _digits(narrow) <= _MANTISSA[wide]


def _digits(dtype: torch.dtype) -> int:
    return {torch.int64: 63, torch.int32: 31, torch.int16: 15, torch.int8: 7, torch.uint8: 8}[dtype]


_MANTISSA = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
