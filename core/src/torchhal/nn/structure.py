"""Finds gated MLPs by what their ``forward`` does, whatever their class and their parts are called."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from torchhal.matmul import capture_functions
from torchhal.nn.linear import FusedLinear

_PRODUCTS = (operator.mul, torch.mul)


@dataclass(frozen=True)
class GatedMLP:
    """``down(activation(gate(x)) * up(x))``, by the names of its parts."""

    gate: str
    up: str
    down: str
    activation: Callable[..., Any] = field(compare=False)
    called: tuple[object, ...]
    """The activation as the trace saw it, to compare."""


def gated_mlp(module: nn.Module) -> GatedMLP | None:
    """The parts of a module that computes a gated MLP and nothing else, in training and in evaluation; else None."""
    linears = [name for name, child in module.named_children() if _is_linear(child)]
    if len(linears) != 3:
        return None
    training = module.training
    try:
        found = [_match(module, _traced(module, mode)) for mode in (training, not training)]
    finally:
        module.training = training
    first, second = found
    return first if first == second and first is not None and _is_pointwise(first.activation) else None


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, FusedLinear)


class _OneLevel(fx.Tracer):
    """Looks into the module itself and into none of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced(module: nn.Module, training: bool) -> fx.Graph | None:
    module.training = training
    try:
        return _OneLevel().trace(module)
    except Exception:  # a forward that depends on data or takes what a trace can not give is no plain MLP
        return None


def _match(module: nn.Module, graph: fx.Graph | None) -> GatedMLP | None:
    if graph is None or len(graph.nodes) != 7:  # x, gate, activation, up, product, down, output
        return None
    start, end = next(iter(graph.nodes)), graph.output_node()
    down: Any = end.args[0]
    product = _input_of_linear(module, down)
    if start.op != "placeholder" or product is None or not _is_product(product):
        return None
    operands: tuple[Any, ...] = product.args
    for activated, up in (operands, operands[::-1]):
        gate = _only_input(activated)
        inputs = {_input_of_linear(module, gate), _input_of_linear(module, up)}
        activation = _function(module, activated) if gate is not None and inputs == {start} else None
        if activation is not None:
            called = (activated.op, activated.target, *activated.kwargs.items())
            return GatedMLP(str(gate.target), str(up.target), str(down.target), activation, called)
    return None


def _input_of_linear(module: nn.Module, node: Any) -> fx.Node | None:
    """What a node that calls one of the linear layers is given."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return _only_input(node) if _is_linear(module.get_submodule(str(node.target))) else None


def _only_input(node: Any) -> Any:
    if not isinstance(node, fx.Node) or len(node.all_input_nodes) != 1 or len(node.args) != 1:
        return None
    return node.all_input_nodes[0]


def _is_product(node: fx.Node) -> bool:
    named = node.target in _PRODUCTS or (node.op == "call_method" and node.target == "mul")
    return named and len(node.args) == 2 and not node.kwargs


def _function(module: nn.Module, node: fx.Node) -> Callable[..., Any] | None:
    """What a node calls, as a function of its input."""
    if node.op == "call_function" and callable(node.target):
        return functools.partial(node.target, **node.kwargs) if node.kwargs else node.target
    if node.op == "call_method" and not node.kwargs:
        return _Method(str(node.target))
    if node.op != "call_module" or node.kwargs:
        return None
    called = module.get_submodule(str(node.target))
    stateful = any(True for _ in called.parameters()) or any(True for _ in called.buffers())
    hooked = called._forward_hooks or called._forward_pre_hooks or "forward" in vars(called)
    return None if stateful or hooked or _is_linear(called) else called


class _Method(nn.Module):
    """Calls a method of its input: what ``operator.methodcaller`` is to Python, in a form that Dynamo traces."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, value: Any) -> Any:
        return getattr(value, self.name)()


def _is_pointwise(activation: Callable[..., Any]) -> bool:
    try:
        captured = capture_functions(torch.float32, None, None, activation).epilogue
    except Exception:  # whatever it does to a value that stands for one element, it is no epilogue
        return False
    return captured is not None and captured.structure == "single" and captured.pure and not captured.tensors
