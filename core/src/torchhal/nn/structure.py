"""Finds gated MLPs by what their ``forward`` does, whatever their class and their parts are called."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from torchhal.matmul import capture_functions
from torchhal.nn.linear import FusedLinear
from torchhal.nn.reasons import hooked

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
    argument: str
    """What the input is called."""


def gated_mlp(module: nn.Module) -> GatedMLP | None:
    """The parts of a module that computes a gated MLP and nothing else, in training and in evaluation, with gradients and
    autocast and without; else None.
    """
    linears = [name for name, child in module.named_children() if _is_linear(child)]
    if len(linears) != 3 or _holds_more(module, linears):
        return None
    training = module.training
    try:
        found = [
            _match(module, _traced(module, mode, on))
            for mode, on in itertools.product((training, not training), (True, False))
        ]
    finally:
        module.training = training
    first = found[0]
    if first is None or any(other != first for other in found):
        return None
    return first if _is_pointwise(first.activation) else None


def _holds_more(module: nn.Module, linears: list[str]) -> bool:
    """Whether a module has parameters or buffers beyond those of its layers, or layers under a second name."""
    own = (*module._parameters.values(), *module._buffers.values())
    others = [child for name, child in module._modules.items() if child is not None and name not in linears]
    return any(value is not None for value in own) or any(_stateful(child) for child in others)


def _stateful(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, FusedLinear)


class _OneLevel(fx.Tracer):
    """Looks into the module itself and into none of its children, and sees where torch's state was another."""

    def __init__(self, devices: set[str]) -> None:
        super().__init__()
        self.devices = devices
        self.before = _state(devices)
        self.changed = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_node(self, *args: Any, **options: Any) -> fx.Node:
        self.changed = self.changed or _state(self.devices) != self.before
        return super().create_node(*args, **options)


def _traced(module: nn.Module, training: bool, on: bool) -> fx.Graph | None:
    module.training = training
    devices = _autocast_devices(module)
    held = _Held(module)
    with _switched(devices, on):
        tracer = _OneLevel(devices)
        try:
            graph = tracer.trace(module)
        except Exception:  # a forward that depends on data or takes what a trace can not give is no plain MLP
            graph = None
    return None if held.put_back() or tracer.changed else graph


def _autocast_devices(module: nn.Module) -> set[str]:
    accelerator = torch.accelerator.current_accelerator()
    types = {"cpu", *(value.device.type for value in (*module.parameters(), *module.buffers()))}
    types |= {accelerator.type} if accelerator is not None else set()
    return {name for name in types if torch.amp.is_autocast_available(name)}


def _state(devices: set[str]) -> tuple[object, ...]:
    autocast = [(torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in sorted(devices)]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextmanager
def _switched(devices: set[str], on: bool) -> Iterator[None]:
    """Gradients and autocast on or off, and as they were afterwards."""
    before = {name: (torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices}
    with torch.set_grad_enabled(on):
        try:
            for name in devices:
                torch.set_autocast_enabled(name, on)
            yield
        finally:
            for name, (enabled, dtype) in before.items():
                torch.set_autocast_enabled(name, enabled)
                torch.set_autocast_dtype(name, dtype)


class _Held:
    """What a module and its children hold, down to their lists, sets and dictionaries, to undo what a trace did to it."""

    def __init__(self, module: nn.Module) -> None:
        dicts = [vars(part) for part in module.modules()]
        inner = [value for held in dicts for value in held.values() if isinstance(value, (dict, list, set))]
        self._before = [(value, value.copy()) for value in (*dicts, *inner)]

    def put_back(self) -> bool:
        """Restore it, and say whether it had changed."""
        changed = False
        for value, before in self._before:
            if _ids(value) != _ids(before):
                changed = True
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)
        return changed


def _ids(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [(key, id(held)) for key, held in value.items()]
    return [id(held) for held in value]


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
            gate, up, last = (str(layer.target) for layer in (gate, up, down))
            return GatedMLP(gate, up, last, activation, called, str(start.target))
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
    watched = any(hooked(part) for part in called.modules())
    return None if _stateful(called) or watched or _is_linear(called) else called


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
