"""What a user function sees while it is captured: scalars that record instead of computing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from torchhal.pointwise.blame import source_line
from torchhal.pointwise.promotion import Kind

if TYPE_CHECKING:
    from torchhal.pointwise.tracer import Tracer

_BRANCH = (
    "a captured function runs once for all positions, so Python can not branch on a value: "
    "use torch.where(condition, a, b); instead of and/or/not use &, |, ~; instead of min()/max() use "
    "torch.minimum/torch.maximum"
)


def _binary(name: str) -> Callable[[Value, Any], Any]:
    def method(self: Value, other: Any) -> Any:
        return self.tracer.operator(name, self, other)

    return method


def _reflected(name: str) -> Callable[[Value, Any], Any]:
    def method(self: Value, other: Any) -> Any:
        return self.tracer.operator(name, other, self)

    return method


def _unary(name: str) -> Callable[[Value], Any]:
    def method(self: Value) -> Any:
        return self.tracer.operator(name, self)

    return method


def _refused(operation: str, advice: str) -> Callable[..., Any]:
    def method(self: Value, *_: Any, **__: Any) -> NoReturn:
        self.tracer.refuse(operation, advice)

    return method


class Recorded:
    """Base of the stand-ins: routes torch functions to the tracer and refuses to become data."""

    __slots__ = ("tracer",)
    tracer: Tracer

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return find_recorded(args, kwargs or {}).tracer.dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        """Where the capture was told that values live."""
        return self.tracer.device

    __hash__ = object.__hash__
    __bool__ = _refused("the truth of a value is needed (if, while, and, or, not, in, min, max)", _BRANCH)
    __len__ = _refused(
        "len() of a value", "a value is a scalar; its position is given by the function's arguments"
    )
    __iter__ = _refused("iteration over a value", "a value is a scalar and has no elements")
    __array__ = _refused(
        "conversion to numpy", "use torch functions, which can be captured, in place of numpy"
    )
    __setitem__ = _refused(
        "assignment into a value", "values are immutable: use torch.where(condition, new, old)"
    )

    def __index__(self) -> int:
        self.tracer.refuse(
            "a value is used as a Python int (range, list index, slice)",
            "only captured tensors can be indexed by values: put the table in a tensor and write table[value]",
        )

    def __float__(self) -> float:
        self._refuse_number("float")

    def __int__(self) -> int:
        self._refuse_number("int")

    def __complex__(self) -> complex:
        self._refuse_number("complex")

    def _refuse_number(self, kind: str) -> NoReturn:
        used = re.search(r"\bmath\.(\w+)\(", source_line())
        if used:
            self.tracer.refuse(f"math.{used[1]} of a value", f"use torch.{used[1]}, which can be captured")
        self.tracer.refuse(
            f"{kind}() of a value, or a function of the math module",
            f"its data does not exist yet: convert with value.{kind}() or value.to(dtype), "
            "and use torch.exp, torch.sin, ... in place of math.exp, math.sin, ...",
        )


def find_recorded(args: Sequence[Any], kwargs: dict[str, Any]) -> Recorded:
    """The first stand-in among the arguments of a torch call, also inside lists and tuples."""
    found = search_recorded((args, tuple(kwargs.values())))
    if found is None:
        raise TypeError("a torch function reached torchhal's capture without any captured value")
    return found


def search_recorded(items: Sequence[Any]) -> Recorded | None:
    """Depth-first search of lists and tuples for a stand-in."""
    for item in items:
        if isinstance(item, Recorded):
            return item
        if isinstance(item, (list, tuple)):
            inner = search_recorded(item)
            if inner is not None:
                return inner
    return None


class Value(Recorded):
    """A scalar of the function being captured, with the operators and methods of a 0-dim tensor.

    Attributes:
        node: its node in the tracer's graph.
        dtype: its dtype.
        kind: how strongly its dtype counts in promotion.
    """

    __slots__ = ("dtype", "kind", "node")

    def __init__(self, tracer: Tracer, node: int, dtype: torch.dtype, kind: Kind) -> None:
        self.tracer = tracer
        self.node = node
        self.dtype = dtype
        self.kind = kind

    @property
    def shape(self) -> torch.Size:
        """Always empty: a value is one scalar."""
        return torch.Size(())

    ndim = property(lambda self: 0)
    requires_grad = property(lambda self: False)
    is_sparse = property(lambda self: False)

    def __repr__(self) -> str:
        return f"Value(%{self.node}: {self.dtype}, {self.kind.name.lower()})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.tracer.method(self, name)

    def __getitem__(self, index: Any) -> NoReturn:
        self.tracer.refuse("indexing of a value", "a value is a scalar; only captured tensors can be indexed")

    def __round__(self, ndigits: int | None = None) -> NoReturn:
        self.tracer.refuse("round() of a value", "use torch.round")

    __add__, __radd__ = _binary("add"), _reflected("add")
    __sub__, __rsub__ = _binary("sub"), _reflected("sub")
    __mul__, __rmul__ = _binary("operator_mul"), _reflected("operator_mul")
    __truediv__, __rtruediv__ = _binary("operator_div"), _reflected("operator_rdiv")
    __floordiv__, __rfloordiv__ = _binary("floor_divide"), _reflected("floor_divide")
    __mod__, __rmod__ = _binary("remainder"), _reflected("remainder")
    __pow__, __rpow__ = _binary("pow"), _reflected("pow")
    __and__, __rand__ = _binary("bitwise_and"), _reflected("bitwise_and")
    __or__, __ror__ = _binary("bitwise_or"), _reflected("bitwise_or")
    __xor__, __rxor__ = _binary("bitwise_xor"), _reflected("bitwise_xor")
    __lshift__, __rlshift__ = _binary("bitwise_left_shift"), _reflected("bitwise_left_shift")
    __rshift__, __rrshift__ = _binary("bitwise_right_shift"), _reflected("bitwise_right_shift")
    __lt__, __le__, __gt__, __ge__ = _binary("lt"), _binary("le"), _binary("gt"), _binary("ge")
    __eq__, __ne__ = _binary("eq"), _binary("ne")
    __neg__, __pos__, __abs__, __invert__ = (
        _unary("neg"),
        _unary("positive"),
        _unary("abs"),
        _unary("bitwise_not"),
    )
    __hash__ = object.__hash__
    __floor__ = _refused("math.floor of a value", "use torch.floor")
    __ceil__ = _refused("math.ceil of a value", "use torch.ceil")
    __trunc__ = _refused("math.trunc of a value", "use torch.trunc")
    __divmod__ = _refused("divmod() of a value", "use a // b and a % b")
    __matmul__ = __rmatmul__ = _refused("a matrix product", "a pointwise function sees one scalar at a time")


class CapturedView(Recorded):
    """A captured tensor indexed by fewer values than it has dimensions; waits for the rest."""

    __slots__ = ("indices", "tensor")

    def __init__(self, tracer: Tracer, tensor: torch.Tensor, indices: tuple[Any, ...]) -> None:
        self.tracer = tracer
        self.tensor = tensor
        self.indices = indices

    @property
    def shape(self) -> torch.Size:
        """The sizes that are still to be indexed."""
        return self.tensor.shape[len(self.indices) :]

    ndim = property(lambda self: len(self.shape))
    dtype = property(lambda self: self.tensor.dtype)

    def dim(self) -> int:
        """Number of dimensions still to be indexed."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The sizes still to be indexed, or one of them."""
        return self.shape if dim is None else self.shape[dim]

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.index(
            self.tensor, (*self.indices, *(index if isinstance(index, tuple) else (index,)))
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        self.refuse(f".{name}")

    def refuse(self, operation: str) -> NoReturn:
        """Say that the view is not a scalar yet."""
        left = len(self.shape)
        self.tracer.refuse(
            f"{operation} on a captured tensor with {left} of its {left + len(self.indices)} dimensions not indexed",
            "index it down to a scalar first, e.g. bias[h, q_idx, kv_idx]",
        )


def _refuse_view(operation: str) -> Callable[..., Any]:
    def method(self: CapturedView, *_: Any) -> NoReturn:
        self.refuse(operation)

    return method


for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    for _prefix in ("", "r"):
        setattr(CapturedView, f"__{_prefix}{_operator}__", _refuse_view(_operator))
for _operator in ("lt", "le", "gt", "ge", "neg", "abs", "invert"):
    setattr(CapturedView, f"__{_operator}__", _refuse_view(_operator))
