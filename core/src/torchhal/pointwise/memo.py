"""Makes capturing cheap where the same function comes again: a fresh lambda from the same line, new tensors.

A function may be recognised only if everything it can depend on is in its key; what can not be
seen through (attributes of objects, mutable globals, side effects) is captured anew every time.
"""

from __future__ import annotations

import builtins
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Final

import torch

from torchhal.pointwise.capture import LITERALS, Captured, Structure, capture
from torchhal.pointwise.codescan import only_tensor_attributes, scan
from torchhal.pointwise.functions import FUNCTIONS
from torchhal.pointwise.graph import Graph
from torchhal.pointwise.names import name_of

_EXACT = (int, bool, str, type(None), torch.dtype, torch.device, bytes)
_BUILTINS: Final = {
    id(getattr(builtins, name)): name
    for name in ("abs", "min", "max", "pow", "range", "len", "isinstance", "float", "int", "bool", "tuple", "list",
                 "zip", "enumerate", "sum", "round", "reversed", "map", "divmod", "any", "all", "sorted")
}  # fmt: skip
_MODULES: Final = frozenset(("torch", "math", "operator"))
_trusted: dict[int, Any] = {}


class _Uncertain(Exception):
    """The function depends on something that a key can not hold."""


class _Key:
    """Collects the key of one function: its code, and everything its code can reach."""

    def __init__(self) -> None:
        self.parts: list[Hashable] = []
        self.tensors: list[torch.Tensor] = []
        self._seen: dict[int, int] = {}

    def add(self, item: Any) -> None:
        kind = type(item)
        if kind is float:
            self.parts.append(item.hex())
        elif kind in _EXACT:
            self.parts.append((kind, item))
        elif kind is torch.Tensor or kind is torch.nn.Parameter:
            self._add_tensor(item)
        elif kind is FunctionType:
            self._add_function(item)
        elif kind is tuple or kind is torch.Size:
            self.parts.append((kind, len(item)))
            for member in item:
                self.add(member)
        elif id(item) in _BUILTINS or _is_trusted(item):
            self.parts.append(item)
        else:
            raise _Uncertain(item)

    def _again(self, item: Any) -> bool:
        known = self._seen.get(id(item))
        if known is None:
            self._seen[id(item)] = len(self._seen)
            return False
        self.parts.append(("again", known))
        return True

    def _add_tensor(self, tensor: torch.Tensor) -> None:
        if self._again(tensor):
            return
        if tensor.__dict__:
            raise _Uncertain(tensor)
        self.tensors.append(tensor)
        self.parts.append((tensor.dtype, tensor.shape, tensor.device, tensor.layout))

    def _add_function(self, function: FunctionType) -> None:
        if self._again(function):
            return
        if _is_trusted(function):
            self.parts.append(function)
            return
        found = scan(function.__code__)
        if found is None or function.__dict__:
            raise _Uncertain(function)
        self.parts.append(function.__code__)
        for default in function.__defaults__ or ():
            self.add(default)
        for name, default in sorted((function.__kwdefaults__ or {}).items()):
            self.add(name)
            self.add(default)
        self._add_closure(function, found.captured)
        for name, chain in found.globals:
            self._add_global(function, name, chain)

    def _add_closure(self, function: FunctionType, captured: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        if function.__closure__ is None:
            return
        cells = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
        for cell in cells.values():
            self.add(_content(cell))
        for name, chain in captured:
            _check_chain(cells[name].cell_contents, chain)

    def _add_global(self, function: FunctionType, name: str, chain: tuple[str, ...]) -> None:
        namespace = function.__globals__
        item = namespace[name] if name in namespace else getattr(builtins, name, _Uncertain)
        depth = 0
        while isinstance(item, ModuleType):
            if item.__name__.partition(".")[0] not in _MODULES or depth == len(chain):
                raise _Uncertain(item)
            item = getattr(item, chain[depth], _Uncertain)
            depth += 1
        _check_chain(item, chain[depth:])
        self.add(item)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable not assigned yet
        raise _Uncertain(cell) from None


def _check_chain(item: Any, chain: tuple[str, ...]) -> None:
    """Attributes are followed by nobody here: only those that a tensor's or constant's key fixes will do."""
    if chain and (callable(item) or not only_tensor_attributes(chain)):
        raise _Uncertain(chain)


def _is_trusted(item: Any) -> bool:
    """Whether ``item`` is a function whose outcome its arguments alone decide, known by identity."""
    if id(item) in _trusted:
        return True
    if not _is_pure_function(item):
        return False
    _trusted[id(item)] = item  # kept alive, so that the id stays its own
    return True


def _is_pure_function(item: Any) -> bool:
    """A function of math or operator, or one of torch's that the capture records: never torch's global state."""
    if item is torch.finfo or item is torch.iinfo:
        return True
    if not isinstance(item, (BuiltinFunctionType, FunctionType)):
        return False
    home = getattr(item, "__module__", None) or type(getattr(item, "__self__", None)).__module__
    if home in ("math", "_operator"):
        return True
    ours = isinstance(home, str) and home.partition(".")[0] == "torch"
    if not ours or (isinstance(item, FunctionType) and item.__globals__.get("__name__") != home):
        return False
    name = name_of(item)
    return name in FUNCTIONS or name in LITERALS


def function_key(fn: Callable[..., Any]) -> tuple[Hashable, tuple[torch.Tensor, ...]] | None:
    """A key equal for functions that capture to the same graph, and the tensors ``fn`` can reach.

    Returns:
        The key and the tensors in the order met (no object twice), or None where ``fn`` is no plain
        Python function or can depend on anything but its code, constants, tensors and torch. Equal
        keys mean equal graphs, provided the capture is ``pure``: tensors count by dtype, shape and
        device and by which of them are the same object, never by their data.
    """
    if type(fn) is not FunctionType:
        return None
    key = _Key()
    try:
        with torch._C.DisableTorchFunction():
            key._add_function(fn)
    except _Uncertain:
        return None
    return (tuple(key.parts), torch.get_default_dtype()), tuple(key.tensors)


@dataclass(frozen=True, slots=True)
class _Entry:
    graph: Graph
    positions: tuple[int, ...]
    structure: Structure


class _Cache:
    """A bounded, thread-safe, least-recently-used dictionary."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> _Entry | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def put(self, key: Hashable, entry: _Entry) -> None:
        with self._lock:
            self._entries[key] = entry
            while len(self._entries) > self.size:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


_cache: Final = _Cache(1024)


def capture_cached(
    fn: Callable[..., Any],
    inputs: Sequence[tuple[str, torch.dtype]],
    *,
    what: str = "score_mod",
    device: torch.device | None = None,
) -> Captured:
    """:func:`~torchhal.pointwise.capture`, remembering functions that :func:`function_key` recognises.

    The tensors of the result are always those ``fn`` holds now. A function that computes on captured
    tensors before indexing them (``bias.exp()[q_idx]``) is captured anew every time.
    """
    found = function_key(fn)
    if found is None:
        return capture(fn, inputs, what=what, device=device)
    key, tensors = (found[0], tuple(inputs), device), found[1]
    entry = _cache.get(key)
    if entry is not None:
        return Captured(entry.graph, tuple([tensors[i] for i in entry.positions]), entry.structure)
    captured = capture(fn, inputs, what=what, device=device)
    places = {id(tensor): i for i, tensor in enumerate(tensors)}
    positions = [places.get(id(tensor)) for tensor in captured.tensors]
    known = tuple(place for place in positions if place is not None)
    if captured.pure and len(known) == len(positions):
        _cache.put(key, _Entry(captured.graph, known, captured.structure))
    return captured


def clear_cache() -> None:
    """Forget every remembered function."""
    _cache.clear()


__all__ = ["capture_cached", "clear_cache", "function_key"]
