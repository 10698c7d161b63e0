"""Replaces modules in a model everywhere they are used, and remembers how to put them back."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from torchhal.errors import InvalidProblem
from torchhal.nn.linear import FusedLinear
from torchhal.nn.mlp import FusedMLP
from torchhal.nn.reasons import hooked
from torchhal.nn.report import Step, Swapped
from torchhal.nn.structure import gated_mlp
from torchhal.operands import Packed

Undo = Callable[[], nn.Module]


class Surgery:
    """One round of replacements in one model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.swapped: list[Swapped] = []
        self.steps: list[Step] = []
        self._parents: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._parents.setdefault(id(child), []).append((parent, name))

    def parents(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """Where a module of the model is used: its parents, and its name in each."""
        return self._parents.get(id(module), [])

    def replace(self, old: nn.Module, new: nn.Module, undo: Undo | None, weight: str, note: str = "") -> None:
        """Put ``new`` wherever ``old`` is."""
        places = self._parents.pop(id(old))
        for parent, child in places:
            parent._modules[child] = new
            self.steps.append(Step(parent, child, new, undo))
        self._parents[id(new)] = places
        self.names[id(new)] = self.names[id(old)]
        self.swapped.append(Swapped(self.names[id(old)], type(new).__name__, weight, note))

    def fuse_mlps(self) -> None:
        """Replace every gated MLP whose three layers have been swapped."""
        for module in list(self.model.modules()):
            if not self.parents(module) or isinstance(module, FusedMLP) or hooked(module):
                continue
            found = gated_mlp(module)
            if found is None:
                continue
            layers = {
                name: layer
                for name, layer in module.named_children()
                if isinstance(layer, FusedLinear) and not hooked(layer)
            }
            if len(layers) == 3:
                fused = FusedMLP(
                    layers,
                    gate=found.gate,
                    up=found.up,
                    down=found.down,
                    activation=found.activation,
                    argument=found.argument,
                )
                fused.train(module.training)
                kinds = {layer.packed.weight.scheme if layer.packed else "dense" for layer in layers.values()}
                self.replace(module, fused, _same(module, fused), ", ".join(sorted(kinds)))


def _same(module: nn.Module, fused: nn.Module) -> Undo:
    def undo() -> nn.Module:
        return module.train(fused.training)

    return undo


def on_parameters_of(original: nn.Module, new: nn.Module, kept: bool) -> Undo:
    """Gives ``original``, with the bias and, unless that is ``kept`` as it was, the weight that ``new`` has by then.
    A weight that is kept follows the packed one, which may have moved or been converted since.
    """

    def undo() -> nn.Module:
        for name in ("bias",) if kept else ("weight", "bias"):
            if name in original._parameters:
                if name not in new._parameters:
                    raise InvalidProblem(
                        f"the {name} of a swapped layer was pruned or parametrized since; remove that before restore()"
                    )
                original._parameters[name] = new._parameters[name]
        if kept:
            holder = nn.Module()  # has torch convert the weight alone, in place where it can: ties stay
            holder.register_parameter("weight", original._parameters["weight"])
            packed, weight = new.get_submodule("packed").weight, holder.weight
            assert isinstance(packed, Packed)
            device = weight.device if weight.is_meta else packed.device
            original._parameters["weight"] = holder.to(device, packed.dtype).get_parameter("weight")
        return original.train(new.training)

    return undo
