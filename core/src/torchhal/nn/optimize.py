"""Swaps the linear layers of a model for fused ones, quantised if wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import Tensor, nn

from torchhal.errors import InvalidProblem
from torchhal.matmul import pack_weight
from torchhal.nn.linear import FusedLinear
from torchhal.nn.reasons import scheme_of, why_left, why_not_served
from torchhal.nn.report import Left, LinearReport, bytes_of, storage_of
from torchhal.nn.storage import PackedStorage
from torchhal.nn.surgery import Surgery, on_parameters_of
from torchhal.operands import Packed

BITS: Final = {"int8": 8, "int4": 4, None: None}


def optimize_linear(
    model: nn.Module,
    weight: str | None = None,
    *,
    group: int | None = 64,
    symmetric: bool = True,
    backend: str | None = None,
    keep_original: bool = False,
    frozen: bool = False,
) -> LinearReport:
    """Swap every ``nn.Linear`` of a model for a :class:`FusedLinear`, and gated MLPs for :class:`FusedMLP`, in place.

    A gated MLP is any module whose ``forward`` is ``down(activation(gate(x)) * up(x))``, whatever it is called. Layers
    are swapped one by one, and a quantised one gives its old weight up at once: the model never exists twice.

    Left as they are, each with its reason in the report: subclasses of ``nn.Linear``, layers with hooks, parametrizations
    or a replaced ``forward``, those whose parent reads their weight (adapters, ``nn.MultiheadAttention``), weights that
    are tensor subclasses, sparse, no floating-point numbers, on meta, hold infinities, or that no backend but the
    reference serves on their device. A weight that is tied to anything but another layer swapped here stays tied, and is
    not quantised.

    Args:
        model: changed in place.
        weight: ``"int8"`` or ``"int4"`` as :func:`torchhal.pack_weight` quantises, or None: the same parameters, which
            can be trained on.
        group: of quantised weights, rows of (K, N) that share a scale: 32, 64, 128, or None for the whole column.
        symmetric: of quantised weights: no zero point.
        backend: who serves, by name, the reference included; by default the policy chooses at each call.
        keep_original: keep what was quantised, so that ``restore()`` can bring it back; this needs the memory of both.
        frozen: quantised layers may run in training mode, so that other parts of the model train through them.

    Returns:
        What was swapped and left, bytes before and after, and ``restore()``.

    Raises:
        InvalidProblem: unknown ``weight`` or ``group``, or the model is a linear layer itself.
        Unsupported: ``backend`` was named and can not serve a layer; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise InvalidProblem(f"optimize_linear() expects a torch.nn.Module and got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise InvalidProblem(
            "the model is a linear layer itself; use torchhal.nn.FusedLinear.from_linear(model)"
        )
    if weight not in BITS:
        raise InvalidProblem(f'weight expects "int8", "int4" or None and got {weight!r}')
    swap = _Swap(model, BITS[weight], group, symmetric, backend, keep_original, frozen)
    return swap.run()


class _Swap:
    def __init__(
        self,
        model: nn.Module,
        bits: int | None,
        group: int | None,
        symmetric: bool,
        backend: str | None,
        keep_original: bool,
        frozen: bool,
    ) -> None:
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.backend, self.keep_original, self.frozen = backend, keep_original, frozen
        self.surgery = Surgery(model)
        self.model = model
        self.storages: dict[int, PackedStorage] = {}
        """Packed weights by the id of the parameter they come from, for layers that are tied together."""
        self.left: list[Left] = []

    def run(self) -> LinearReport:
        before = bytes_of(self.model)
        layers = list(self._swappable())
        notes, faults = self._notes_and_faults(layers)
        names = [self.surgery.names[id(layer)] for layer in layers]
        packs = [self.bits is not None and id(layer) not in notes for layer in layers]
        while layers:  # gives each layer up as it goes, so that its memory is free for the next
            layer, name, packed, why = layers.pop(), names.pop(), packs.pop(), faults.pop()
            why = why or self._swap(layer, packed, notes.get(id(layer), ""))
            if why:
                self.left.append(Left(name, why))
        self.surgery.swapped.reverse()
        self.surgery.fuse_mlps()
        after = bytes_of(self.model)
        return LinearReport(
            tuple(self.surgery.swapped), tuple(reversed(self.left)), before, after, self.surgery.steps
        )

    def _swappable(self) -> Iterator[nn.Linear]:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                why = why_left(module, self.surgery.parents(module))
                if why:
                    self.left.append(Left(name, why))
                else:
                    yield module

    def _notes_and_faults(self, layers: list[nn.Linear]) -> tuple[dict[int, str], list[str]]:
        """Why layers are not packed, by their ids, and why each is left."""
        if not self.bits:
            return {}, [self._fault(layer, False) for layer in layers]
        names = self.surgery.names
        first = _ties(self.model, layers, names)
        faults = [self._fault(layer, id(layer) not in first) for layer in layers]
        sound = [layer for layer, why in zip(layers, faults, strict=True) if not why]
        notes = _ties(
            self.model, sound, names
        )  # a layer that is left keeps its weight, and ties others to it
        for i, layer in enumerate(layers):
            if id(layer) in notes and id(layer) not in first:
                faults[i] = self._fault(layer, False)
        return notes, faults

    def _fault(self, layer: nn.Linear, packed: bool) -> str:
        scheme = None
        if packed and layer.weight.device.type != "meta":
            assert self.bits is not None
            scheme = scheme_of(layer.weight, self.bits, self.group, self.symmetric)
        return why_not_served(layer.weight, layer.bias, scheme, self.backend, layer.training and not packed)

    def _swap(self, layer: nn.Linear, packed: bool, note: str) -> str:
        """Swap one layer, or say why its weight can not be packed."""
        if not packed:
            new = FusedLinear.from_linear(layer, backend=self.backend)
            self.surgery.replace(layer, new, on_parameters_of(layer, new, kept=False), "dense", note)
            return ""
        try:
            storage = self._storage(layer)
        except InvalidProblem as error:
            return str(error)
        new = FusedLinear(storage, layer.bias, backend=self.backend, frozen=self.frozen).train(layer.training)
        undo = on_parameters_of(layer, new, kept=True) if self.keep_original else None
        self.surgery.replace(layer, new, undo, storage.weight.scheme, note)
        return ""

    def _storage(self, layer: nn.Linear) -> PackedStorage:
        key = id(layer.weight)
        if key not in self.storages:
            self.storages[key] = PackedStorage(self._packed(layer.weight))
        return self.storages[key]

    def _packed(self, weight: Tensor) -> Packed:
        assert self.bits is not None
        return pack_weight(
            weight, bits=self.bits, group=self.group, symmetric=self.symmetric, transposed=True
        )


def _ties(model: nn.Module, layers: list[nn.Linear], names: dict[int, str]) -> dict[int, str]:
    """By the id of a layer, why its weight can not be packed without holding it twice: its memory is also another's."""
    users: dict[int, list[tuple[nn.Module, Tensor]]] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            memory = None if tensor is None else storage_of(tensor)
            if tensor is not None and memory is not None:
                users.setdefault(memory._cdata, []).append((module, tensor))
    swapped = {id(layer) for layer in layers}
    notes = {}
    for layer in layers:
        memory = storage_of(layer.weight)
        for module, tensor in users[memory._cdata] if memory is not None else ():
            if id(module) not in swapped or tensor is not layer.weight:
                notes[id(layer)] = (
                    f"not packed, because it shares its memory with {names[id(module)] or 'the model'}"
                )
    return notes
