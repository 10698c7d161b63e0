"""The public functions under torch.compile: one node for each call, user functions included.

Dynamo can not put a Python function into a graph, but it can trace one into the body of a higher-order
operator, where it finds by itself every tensor and symbolic number the function reads, wherever it was
closed over. So each call becomes one node ``torchhal_call(body, *tensors)`` whose body feeds stand-ins
for the function's arguments to the user's functions and declares the shapes of the result. That node does not
outlive the next stage: when AOTAutograd runs it, :class:`_Call` captures the body's functions into graphs
(:mod:`torchhal.pointwise`), chooses a backend, and leaves one ordinary operator in its place.

The stand-ins are tensors of one element, not of none: indexing a tensor with a 0-dim tensor makes torch
read its value, which a compiler can not, while with one element it is a gather.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.variables.higher_order_ops import BaseHOPVariable, _hop_name_to_variable_class
from torch._higher_order_ops.base_hop import BaseHOP
from torch.fx import GraphModule, Interpreter, Node

from torchhal._text import dtype_from_name
from torchhal._tracing import constant_while_tracing
from torchhal.ops import Description, library

Numbers = tuple[Any, ...]
"""Numbers of a call that Dynamo may keep symbolic."""


@dataclass(frozen=True)
class Family:
    """How a family of calls ends: the shapes of its results, and the call itself once functions are captured."""

    shapes: Callable[[Description, Sequence[Tensor], Sequence[Tensor], Sequence[int]], list[Tensor]]
    """``(description, tensors, outputs, counts)`` to results of the right shapes; ``outputs`` are what the functions
    give for stand-ins, ``counts`` how many each returns as a tuple, 0 for one that returns a lone value."""
    run: Callable[[Description, Numbers, Sequence[Tensor], Sequence[Callable[..., Any]]], Sequence[Tensor]]
    """``(description, numbers, tensors, functions)`` to results, by way of the family's eager code."""


FAMILIES: dict[str, Family] = {}

Argument = tuple[torch.dtype, bool]
"""Type of a stand-in, and whether it is 0-dim, so that it promotes as weakly as what it stands for."""

# The types travel as text, as the call does: until 2.11 torch hands ScalarType[] to Python as plain integers.
library.define("arguments(Tensor like, str types) -> Tensor[]")
library.define("results(Tensor[] tensors, Tensor[] outputs, int[] counts, str call) -> Tensor[]")


def _arguments(like: Tensor, types: str) -> list[Tensor]:
    return [
        like.new_zeros(() if number else (1,), dtype=dtype_from_name(dtype))
        for dtype, number in json.loads(types)["arguments"]
    ]


def _results(tensors: list[Tensor], outputs: list[Tensor], counts: list[int], call: str) -> list[Tensor]:
    description = json.loads(call)
    return FAMILIES[description["family"]].shapes(description, tensors, outputs, counts)


for _name, _function in (("arguments", _arguments), ("results", _results)):
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torchhal::{_name}", _function, lib=library)


class _Call(BaseHOP):
    """The node Dynamo leaves for one call; becomes an ordinary operator when AOTAutograd runs it."""

    def __init__(self) -> None:
        super().__init__("torchhal_call")

    def __call__(self, body: GraphModule, *operands: Any, call: str, numbers: Numbers) -> tuple[Tensor, ...]:
        if not isinstance(body, GraphModule):  # Dynamo's own look at the function, before it is a graph
            return super().__call__(body, *operands, call=call, numbers=numbers)
        description = json.loads(call)
        return tuple(FAMILIES[description["family"]].run(description, numbers, *_open(body, operands)))


_call: Any = _Call()


class _CallVariable(BaseHOPVariable):
    """Dynamo's view of the node. Query, key and value cut from one projection share storage, which is harmless
    to a call that writes to none of its inputs.
    """

    supports_aliasing = True


_hop_name_to_variable_class[_call._name] = _CallVariable


@constant_while_tracing
def describe(**description: Any) -> str:
    """The JSON text of a description; Dynamo runs it while tracing, since all its values are constants."""
    return json.dumps(description, default=lambda dtype: str(dtype).removeprefix("torch."))


def record(
    call: str,
    numbers: Numbers,
    tensors: list[Tensor],
    functions: list[tuple[Callable[..., Any], list[Argument]]],
) -> Any:
    """Leave one node for a call, from code that Dynamo traces.

    Args:
        call: text of the description.
        numbers: numbers that may be symbolic, in the order that ``Family.run`` expects.
        tensors: main tensors, in the order that ``Family.run`` expects.
        functions: user functions, each with the types of its arguments.
    """

    def body(*main: Tensor) -> Any:
        outputs: list[Tensor] = []
        counts: list[int] = []
        for function, arguments in functions:
            result = function(*torch.ops.torchhal.arguments(main[0], describe(arguments=arguments)))
            counts.append(len(result) if isinstance(result, tuple) else 0)
            for output in result if isinstance(result, tuple) else (result,):
                outputs.append(output if isinstance(output, Tensor) else torch.full((), output))
        return torch.ops.torchhal.results(list(main), outputs, counts, call)

    return _call(body, *tensors, call=call, numbers=numbers)


class _Function:
    """One user function inside the body of a call, callable with the arguments of a capture."""

    def __init__(
        self,
        body: GraphModule,
        operands: Sequence[Any],
        arguments: Sequence[Node],
        outputs: Sequence[Node],
        structure: str,
    ) -> None:
        self.body = body
        self.operands = operands
        self.arguments = arguments
        self.outputs = outputs
        self.structure = structure

    def __call__(self, *values: Any) -> Any:
        placeholders = [n for n in self.body.graph.nodes if n.op == "placeholder"]
        env = dict(zip(placeholders, map(_as_captured, self.operands), strict=True))
        env.update({node: values[cast(int, node.args[1])] for node in self.arguments})
        results = tuple(_Slice(self.body, output).evaluate(env) for output in self.outputs)
        return results if self.structure == "tuple" else results[0]


class _Slice(Interpreter):
    """Runs just the nodes of a body that one output depends on."""

    def __init__(self, body: GraphModule, output: Node) -> None:
        super().__init__(body, garbage_collect_values=False)
        self.wanted = output

    def evaluate(self, env: dict[Node, Any]) -> Any:
        self.env = env
        needed = _ancestors(self.wanted, set(env))
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if node in needed:
                env[node] = self.run_node(node)
        return env[self.wanted]


def _ancestors(node: Node, known: set[Node]) -> set[Node]:
    found: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found and current not in known:
            found.add(current)
            pending += current.all_input_nodes
    return found


def _open(body: GraphModule, operands: Sequence[Any]) -> tuple[list[Tensor], list[_Function]]:
    """The main tensors of a call and its user functions, from the body Dynamo traced."""
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    env = dict(zip(placeholders, operands, strict=True))
    (end,) = (n for n in body.graph.nodes if n.target in _op("results"))
    starts = [n for n in body.graph.nodes if n.target in _op("arguments")]
    tensors, outputs, counts = (cast(list[Any], argument) for argument in end.args[:3])
    main = [_Slice(body, node).evaluate(dict(env)) for node in tensors]
    functions, pending = [], iter(outputs)
    for start, count in zip(starts, counts, strict=True):
        own = [next(pending) for _ in range(count or 1)]
        functions.append(_Function(body, operands, list(start.users), own, "tuple" if count else "single"))
    return main, functions


def _op(name: str) -> tuple[Any, ...]:
    packet = getattr(torch.ops.torchhal, name)
    return packet, packet.default


def _as_captured(operand: Any) -> Any:
    """A number that Dynamo keeps symbolic, as that of the 0-dim tensor a function captures; tensors as they are.

    To the capture that is under way, item() is no read of data: its result promotes as weakly as a number does.
    """
    dtypes = {torch.SymInt: torch.int64, torch.SymFloat: torch.float64}
    dtype = dtypes.get(type(operand))
    return operand if dtype is None else torch.full((), operand, dtype=dtype).item()
