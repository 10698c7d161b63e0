"""Runs a user function once on recording scalars and keeps what it did."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from torchhal.errors import CaptureError
from torchhal.pointwise import composites as _composites  # noqa: F401  (registers the functions)
from torchhal.pointwise.dtypes import is_float
from torchhal.pointwise.graph import Graph
from torchhal.pointwise.names import RANDOM, READS, advice_for, is_in_place, name_of
from torchhal.pointwise.promotion import Kind
from torchhal.pointwise.tracer import Tracer
from torchhal.pointwise.values import Value, search_recorded

Structure = Literal["single", "tuple"]

# What a captured tensor may be asked without the capture depending on more than dtype, shape and device.
_METADATA = frozenset(
    ("shape", "dtype", "ndim", "device", "size", "dim", "numel", "nelement", "is_floating_point", "layout",
     "is_cuda", "len")
)  # fmt: skip
_READS_DATA = frozenset(("tolist", "numpy", "equal", "allclose", "is_nonzero", *READS))
LITERALS = frozenset(("tensor", "scalar_tensor", "as_tensor", "asarray", "full", "zeros", "ones"))


@dataclass(frozen=True, slots=True)
class Captured:
    """A user function as a graph together with the tensors it closed over.

    Attributes:
        graph: what the function computes.
        tensors: the captured tensors, in the order of ``graph.captured``; no object twice.
        structure: "tuple" if the function returned a tuple or list, else "single".
        pure: whether the function touched plain tensors only by indexing them; what it computed from
            them outside the graph (``bias.exp()``) belongs to this one capture.
    """

    graph: Graph
    tensors: tuple[torch.Tensor, ...]
    structure: Structure
    pure: bool = True


class _CaptureMode(TorchFunctionMode):
    """Sends every torch call with a value in it to the tracer, and watches the rest."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if search_recorded(args) is not None or (
            kwargs and search_recorded(tuple(kwargs.values())) is not None
        ):
            return self._recorded(func, args, kwargs)
        name = name_of(func)
        return func(*args, **kwargs) if name in _METADATA else self._plain(name, func, args, kwargs)

    def _recorded(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        if is_in_place(name):
            self.tracer.refuse(f"in-place {name} on a captured tensor", advice_for(name))
        return self.tracer.call(name, args, kwargs)

    def _plain(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A torch call on plain tensors: the user's own business, if it neither reads data nor changes any."""
        first = args[0] if args else None
        if isinstance(first, torch.Tensor):
            if name == "item" and first.numel() == 1:
                return self._item(first)
            if name in _READS_DATA or name == "item":
                self._refuse_read(name)
        if name in RANDOM:
            self.tracer.refuse(f"random function {name}", f"it {_random_advice()}")
        if is_in_place(name):
            self.tracer.refuse(f"in-place {name} on a tensor", advice_for(name))
        result = func(*args, **kwargs)
        if name in LITERALS and self._literal(name, args, kwargs, result):
            return result
        self.tracer.pure = False
        return result

    def _item(self, tensor: torch.Tensor) -> Value:
        value = self.tracer.index(tensor, (0,) * tensor.dim()) if tensor.dim() else self.tracer.lift(tensor)
        wide = {True: torch.float64, False: torch.int64}[value.dtype.is_floating_point]
        kept = value if value.dtype is torch.bool else self.tracer.convert(value, wide)
        return Value(self.tracer, kept.node, kept.dtype, Kind.NUMBER)

    def _refuse_read(self, name: str) -> None:
        asked = f"{READS[name]}() of a captured tensor" if name in READS else f"{name} of a captured tensor"
        self.tracer.refuse(
            asked,
            "the graph must not depend on data: use the 0-dim tensor itself, torch.where in place of a branch, "
            "or read the number outside the function",
        )

    def _literal(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> bool:
        """Whether ``result`` is a 0-dim tensor made of a Python number; if so its number is remembered."""
        if not isinstance(result, torch.Tensor) or result.dim() or kwargs.get("requires_grad"):
            return False
        if name in ("zeros", "ones"):
            number: Any = int(name == "ones")
        else:
            given = args[1:] if name == "full" else args
            number = given[0] if given else kwargs.get("fill_value" if name == "full" else "data")
        if type(number) not in (bool, int, float):
            return False
        self.tracer.remember_literal(result, number)
        return True


def _random_advice() -> str:
    return advice_for("randn").removeprefix("it ")


def capture(
    fn: Callable[..., Any],
    inputs: Sequence[tuple[str, torch.dtype]],
    *,
    what: str = "score_mod",
    device: torch.device | None = None,
) -> Captured:
    """Capture ``fn`` as a pointwise graph.

    Args:
        fn: called once, positionally, with one recording scalar per input.
        inputs: name and dtype of each parameter.
        what: the kind of function, for messages: "score_mod", "mask_mod", "epilogue", ...
        device: what ``value.device`` says inside ``fn``; the CPU by default.

    Returns:
        The graph, the captured tensors and whether ``fn`` returned one result or a tuple.

    Raises:
        CaptureError: ``fn`` does something that has no pointwise meaning; the message names the
            operation, the line of ``fn``, and what to write in its place.

    Anything ``fn`` itself raises propagates untouched. No data of a captured tensor is read.
    """
    tracer = Tracer(inputs, what, device)
    try:
        with _CaptureMode(tracer):
            result = _call(fn, tracer)
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        nodes = [_output(tracer, fn, item).node for item in outputs]
        return _finish(tracer, nodes, "tuple" if isinstance(result, (tuple, list)) else "single")
    finally:
        tracer.open = False


def _call(fn: Callable[..., Any], tracer: Tracer) -> Any:
    arguments = tracer.arguments()
    try:
        return fn(*arguments)
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is None:
            _refuse_signature(fn, tracer, arguments)
        raise


def _refuse_signature(fn: Callable[..., Any], tracer: Tracer, arguments: Sequence[Value]) -> None:
    expected = ", ".join(name for name, _ in tracer.inputs)
    try:
        inspect.signature(fn).bind(*arguments)
    except TypeError as error:
        raise CaptureError(
            f"cannot capture this {tracer.what}: it must take {len(arguments)} positional parameters ({expected}), "
            f"but {_describe(fn)} does not: {error}"
        ) from None
    except ValueError:
        return


def _describe(fn: Callable[..., Any]) -> str:
    code = getattr(fn, "__code__", None)
    name = getattr(fn, "__qualname__", type(fn).__name__)
    return name if code is None else f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _output(tracer: Tracer, fn: Callable[..., Any], item: Any) -> Value:
    if isinstance(item, (Value, bool, int, float)):
        value = tracer.lift(item, "the result")
        weak = value.kind is Kind.NUMBER and is_float(value.dtype)
        return tracer.convert(value, torch.get_default_dtype()) if weak else value
    if isinstance(item, torch.Tensor) and item.dim() == 0:
        return tracer.lift(item, "the result")
    shown = (
        f"a tensor of shape {tuple(item.shape)}"
        if hasattr(item, "shape")
        else f"{type(item).__name__} {item!r}"
    )
    raise CaptureError(
        f"cannot capture this {tracer.what}: {_describe(fn)} returned {shown}; "
        "return a value, a Python number, a captured 0-dim tensor, or a tuple of them"
    )


def _finish(tracer: Tracer, outputs: list[int], structure: Structure) -> Captured:
    """The canonical graph, with captured tensors in the order the graph first reads them."""
    graph = tracer.finish(outputs)
    order = list(dict.fromkeys(node.position for node in graph.nodes if node.primitive == "gather"))
    if order != list(range(len(tracer.tensors))):
        number = {old: new for new, old in enumerate(order)}
        nodes = [
            n._replace(attribute=number[n.position]) if n.primitive == "gather" else n for n in graph.nodes
        ]
        graph = Graph(graph.inputs, tuple(graph.captured[i] for i in order), tuple(nodes), graph.outputs)
    return Captured(graph, tuple(tracer.tensors[i] for i in order), structure, tracer.pure)
