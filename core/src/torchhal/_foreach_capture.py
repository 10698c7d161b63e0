"""User functions of foreach_map as graphs: one for each combination of element types, numbers included.

torch promotes by how an operand arrives: a tensor with dimensions counts more than a 0-dim one, which counts more
than a number. A list of the former and the latter may hold the same element types, so an operand's
:class:`~torchhal.pointwise.Kind` is part of what a graph is captured for.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchhal._caches import fast_cache
from torchhal.errors import CaptureError, InvalidProblem
from torchhal.pointwise import Captured, Graph, Kind, Value, capture, function_key

WHAT = "function of foreach_map"
BUILTINS = (BuiltinFunctionType, MethodDescriptorType)
"""Types of the functions written in C, which have no signature to look at."""


class Slot(NamedTuple):
    """One operand at one position, as a graph is captured for it."""

    dtype: torch.dtype
    kind: Kind
    number: bool | int | float | None = None
    """The number itself where it is part of the graph, None where it is an input."""


class Function(NamedTuple):
    """The user's function of one call."""

    call: Callable[..., Any]
    kwargs: Mapping[str, Any]
    key: object = None
    """Equal for functions that capture alike; None where that can not be told, and the function is captured anew."""
    tensors: tuple[Tensor, ...] = ()
    """The tensors the function can reach, in an order that the key fixes."""


class _Recipe(NamedTuple):
    """A remembered capture, and where its tensors are among :attr:`Function.tensors`."""

    captured: Captured
    places: tuple[int, ...]


_recipes: dict[object, _Recipe | None] = fast_cache()
"""None for a function that needs to know the numbers it is called with."""
_LIMIT = 4096
_IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name)
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and_",
        "or_",
        "xor",
        "lshift",
        "rshift",
    )
}


def _copy(destination: Any, source: Any) -> Any:
    return source.to(destination.dtype)


def _zero(destination: Any) -> Any:
    return torch.zeros_like(destination)


def _fill(destination: Any, value: Any) -> Any:
    return torch.full_like(destination, value)


_WITHOUT_TWIN: dict[str, Callable[..., Any]] = {"copy_": _copy, "zero_": _zero, "fill_": _fill}


def out_of_place(fn: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that computes what torch's in-place ``fn`` writes; None where ``fn`` is not one of those."""
    return _twin(fn) if isinstance(fn, BUILTINS) else None


@cache
def _twin(fn: Callable[..., Any]) -> Callable[..., Any] | None:
    name = fn.__name__
    if fn in _IN_PLACE_OPERATORS:
        return _IN_PLACE_OPERATORS[fn]
    if name in _WITHOUT_TWIN:
        return _WITHOUT_TWIN[name]
    if not name.endswith("_") or name.endswith("__") or getattr(fn, "__module__", None) == "_operator":
        return None
    homes = (torch.Tensor, torch, torch.nn.functional)
    return next((getattr(home, name[:-1]) for home in homes if hasattr(home, name[:-1])), None)


def function(fn: Callable[..., Any], kwargs: Mapping[str, Any]) -> Function:
    """``fn`` and its keyword arguments, with the key under which captures of it are remembered."""
    named = (
        tuple(sorted((name, type(value), repr(value)) for name, value in kwargs.items())) if kwargs else ()
    )
    if any(kind not in _PLAIN for _, kind, _ in named):
        return Function(fn, kwargs)
    if isinstance(fn, BUILTINS):
        return Function(fn, kwargs, (fn, named, torch.get_default_dtype()))
    found = function_key(fn)
    return Function(fn, kwargs) if found is None else Function(fn, kwargs, (found[0], named), found[1])


_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype))


def captured_for(fn: Function, slots: tuple[Slot, ...]) -> tuple[Captured, tuple[Slot, ...]]:
    """The graph of ``fn`` for operands like ``slots``, and the slots as the graph takes them.

    Numbers become inputs, so that their values may change from call to call, unless ``fn`` needs to know them
    (it branches on one, or torch treats particular ones in a way of their own, as ``pow`` does exponents).

    Raises:
        CaptureError: ``fn`` is not pointwise.
    """
    slots = _strongest(fn, slots)
    if all(slot.number is None for slot in slots):
        return _remembered(fn, slots) or _capture(fn, slots), slots
    freed = tuple([slot._replace(number=None) for slot in slots])
    if not _recalls_refusal(fn, freed):
        captured = _remembered(fn, freed) or _capture_freed(fn, slots, freed)
        if captured is not None:
            return captured, freed
    return _remembered(fn, slots) or _capture(fn, slots), slots


def _strongest(fn: Function, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """0-dim tensors of one type as tensors with dimensions, which is what they are among themselves and next to numbers."""
    if fn.key is None or fn.tensors or any(slot.kind is Kind.LANE for slot in slots):
        return slots
    # Of two types, the right one may keep a precision that one with dimensions would not.
    if len({slot.dtype for slot in slots if slot.kind is Kind.SCALAR}) > 1:
        return slots
    return tuple([slot._replace(kind=Kind.LANE) if slot.kind is Kind.SCALAR else slot for slot in slots])


def _capture_freed(fn: Function, slots: tuple[Slot, ...], freed: tuple[Slot, ...]) -> Captured | None:
    if not _number_must_be_known(slots):
        try:
            captured = _capture(fn, freed, keep=False)
        except CaptureError:
            captured = None
        if captured is not None and not _exponent_is_input(captured.graph, freed):
            _remember(fn, freed, captured)
            return captured
    if fn.key is not None:
        _recipes[_recipe_key(fn, freed)] = None
    return None


def _number_must_be_known(slots: tuple[Slot, ...]) -> bool:
    # Whether an int fits an integer tensor's type is torch's error to raise, and depends on the int.
    integers = any(s.kind is not Kind.NUMBER and not s.dtype.is_floating_point for s in slots)
    return integers and any(s.kind is Kind.NUMBER and not s.dtype.is_floating_point for s in slots)


def _exponent_is_input(graph: Graph, slots: tuple[Slot, ...]) -> bool:
    """Whether a number among the inputs reaches the exponent of a ``pow``, whose small exponents torch rewrites."""
    tainted: list[bool] = []
    for node in graph.nodes:
        own = node.primitive == "input" and slots[node.position].kind is Kind.NUMBER
        tainted.append(own or any(tainted[i] for i in node.operands))
        if node.primitive == "pow" and tainted[node.operands[1]]:
            return True
    return False


# ---------------------------------------------------------------------------- remembered captures


def _recipe_key(fn: Function, slots: tuple[Slot, ...]) -> object:
    # repr tells 0.0 from -0.0, and makes nan equal to itself.
    return fn.key, tuple([(s.dtype, s.kind, None if s.number is None else repr(s.number)) for s in slots])


def _recalls_refusal(fn: Function, freed: tuple[Slot, ...]) -> bool:
    return fn.key is not None and _recipes.get(_recipe_key(fn, freed), fn) is None


def _remembered(fn: Function, slots: tuple[Slot, ...]) -> Captured | None:
    recipe = None if fn.key is None else _recipes.get(_recipe_key(fn, slots))
    if recipe is None:
        return None
    return (
        replace(recipe.captured, tensors=tuple(fn.tensors[i] for i in recipe.places))
        if recipe.places
        else recipe.captured
    )


def _remember(fn: Function, slots: tuple[Slot, ...], captured: Captured) -> None:
    places = [i for held in captured.tensors for i, tensor in enumerate(fn.tensors) if held is tensor]
    if fn.key is None or not captured.pure or len(places) != len(captured.tensors):
        return
    if len(_recipes) >= _LIMIT:
        _recipes.clear()
    _recipes[_recipe_key(fn, slots)] = _Recipe(captured, tuple(places))


def _capture(fn: Function, slots: tuple[Slot, ...], keep: bool = True) -> Captured:
    def adapted(*values: Value) -> Any:
        given = iter(values)
        return _invoke(fn.call, [_argument(slot, given) for slot in slots], fn.kwargs)

    inputs = [(f"operand_{i}", slot.dtype) for i, slot in enumerate(slots) if slot.number is None]
    captured = capture(adapted, inputs, what=WHAT)
    for tensor in captured.tensors:
        if tensor.dim():
            advice = "pass it as an operand, in a list with one tensor for each position"
            raise CaptureError(
                f"a {WHAT} may capture 0-dim tensors, and this one captures one of shape {tuple(tensor.shape)}; {advice}"
            )
    if keep:
        _remember(fn, slots, captured)
    return captured


def _invoke(fn: Callable[..., Any], arguments: list[Any], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(fn, MethodDescriptorType) and isinstance(
        arguments[0], Value
    ):  # torch.Tensor.add takes tensors alone
        return getattr(arguments[0], fn.__name__)(*arguments[1:], **kwargs)
    return fn(*arguments, **kwargs)


def _argument(slot: Slot, given: Iterator[Value]) -> Any:
    if slot.number is not None:
        return slot.number
    value = next(given)
    return Value(value.tracer, value.node, value.dtype, slot.kind)


# ---------------------------------------------------------------------------- arguments of the user's function


def check_signature(fn: Callable[..., Any], operands: int, kwargs: Mapping[str, Any]) -> None:
    """Refuse operands and keywords that ``fn`` does not take.

    Raises:
        InvalidProblem: names the keywords, or says how many operands ``fn`` takes.
    """
    try:
        signature = inspect.signature(fn.forward if isinstance(fn, torch.nn.Module) else fn)
    except ValueError:  # a torch builtin: the capture knows its arguments
        return
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = sorted(set(kwargs) - set(parameters))
        if unknown:
            raise InvalidProblem(_unknown_keywords(fn, unknown, list(parameters)))
    try:
        signature.bind(*range(operands), **kwargs)
    except TypeError as error:
        raise InvalidProblem(
            f"{name_of(fn)}{signature} can not be called with {operands} operands: {error}"
        ) from None


def _unknown_keywords(fn: Callable[..., Any], unknown: list[str], known: list[str]) -> str:
    took = "foreach_map takes backend= and out=, and passes the rest on"
    return f"neither foreach_map nor {name_of(fn)} takes {', '.join(unknown)}; {took}; {name_of(fn)} takes {', '.join(known) or 'nothing'}"


def name_of(fn: Callable[..., Any]) -> str:
    """How messages call the user's function."""
    return getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None) or type(fn).__name__
