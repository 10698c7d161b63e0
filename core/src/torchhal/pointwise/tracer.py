"""The graph builder a capture runs on: lifts what the user's code mixes in, and resolves torch calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from torchhal.pointwise.blame import capture_error
from torchhal.pointwise.builder import GraphBuilder
from torchhal.pointwise.dtypes import NAME_OF, Number
from torchhal.pointwise.names import advice_for, name_of
from torchhal.pointwise.promotion import Kind
from torchhal.pointwise.values import CapturedView, Value

_PYTHON_DTYPES = {float: torch.float64, int: torch.int64, bool: torch.bool}


class Tracer(GraphBuilder):
    """One capture in progress.

    Attributes:
        what: the kind of function, for messages.
        tensors: captured tensors in the order first met; positions match ``captured``.
        pure: False once the function ran torch operations on plain tensors.
    """

    def __init__(
        self, inputs: Sequence[tuple[str, torch.dtype]], what: str, device: torch.device | None = None
    ) -> None:
        super().__init__(inputs)
        self.what = what
        self.device = torch.device("cpu") if device is None else device
        self.tensors: list[torch.Tensor] = []
        self.pure = True
        self.open = True
        self._positions: dict[int, int] = {}
        self._literals: dict[int, tuple[torch.Tensor, Number, torch.dtype]] = {}

    def arguments(self) -> list[Value]:
        """The values to call the user's function with."""
        return [Value(self, self.input(i), dtype, Kind.LANE) for i, (_, dtype) in enumerate(self.inputs)]

    def refuse(self, operation: str, advice: str) -> NoReturn:
        """Raise the CaptureError for ``operation`` at the user's current line."""
        raise capture_error(self.what, operation, advice)

    def emit(self, primitive: str, kind: Kind, *operands: Value) -> Value:
        """Apply ``primitive`` to values whose dtypes already agree."""
        node = self.apply(primitive, *[value.node for value in operands])
        return Value(self, node, self.nodes[node].dtype, kind)

    def convert(self, value: Value, dtype: torch.dtype) -> Value:
        """``value`` cast to ``dtype``, of the same kind."""
        if value.dtype is dtype:
            return value
        if dtype not in NAME_OF:
            self.refuse(f"conversion to {dtype}", f"known dtypes are {', '.join(NAME_OF.values())}")
        return Value(self, self.cast(value.node, dtype), dtype, value.kind)

    def literal(self, number: Number, dtype: torch.dtype, kind: Kind = Kind.NUMBER) -> Value:
        """A constant."""
        return Value(self, self.constant(number, dtype), dtype, kind)

    def remember_literal(self, tensor: torch.Tensor, number: Number) -> None:
        """Note that ``tensor`` was just made from ``number``, so that lifting it gives a constant."""
        if tensor.dtype in NAME_OF:
            self._literals[id(tensor)] = (tensor, number, tensor.dtype)

    def lift(self, item: Any, operation: str = "an operation") -> Value:
        """``item`` as a value: a value, a Python number, or a captured 0-dim tensor."""
        if isinstance(item, Value):
            if item.tracer is not self:
                self.refuse(
                    "a value from another capture is used",
                    "values live only while their function is captured",
                )
            return item
        dtype = _PYTHON_DTYPES.get(type(item))
        if dtype is not None:
            return self.literal(self._checked(item), dtype)
        if isinstance(item, torch.Tensor):
            return self._lift_tensor(item, operation)
        if isinstance(item, CapturedView):
            item.refuse(operation)
        self.refuse(
            f"{operation} with an operand of type {type(item).__name__}",
            "operands can be values, Python bool/int/float, and captured tensors indexed down to a scalar",
        )
        return None

    def index(self, tensor: torch.Tensor, indices: tuple[Any, ...]) -> Any:
        """``tensor[indices]``: a value at full rank, a waiting view below it."""
        if indices and indices[-1] is Ellipsis:
            indices = indices[:-1]
        with torch._C.DisableTorchFunction():
            ndim = tensor.dim()
        if len(indices) > ndim:
            self.refuse(
                f"{len(indices)} indices for a captured tensor of {ndim} dimensions", "index each one once"
            )
        lifted = tuple([self._lift_index(item) for item in indices])
        if len(lifted) < ndim:
            return CapturedView(self, tensor, lifted)
        kind = max([value.kind for value in lifted], default=Kind.SCALAR)
        node = self.gather(self.position(tensor), [value.node for value in lifted])
        return Value(self, node, self.nodes[node].dtype, max(kind, Kind.SCALAR))

    def position(self, tensor: torch.Tensor) -> int:
        """Where ``tensor`` stands among the captured ones; equal positions mean the same object."""
        known = self._positions.get(id(tensor))
        if known is not None:
            return known
        with torch._C.DisableTorchFunction():
            dtype, ndim = tensor.dtype, tensor.dim()
        if dtype not in NAME_OF:
            self.refuse(
                f"a captured tensor of dtype {dtype}", f"known dtypes are {', '.join(NAME_OF.values())}"
            )
        self._positions[id(tensor)] = position = self.add_captured(dtype, ndim)
        self.tensors.append(tensor)
        return position

    def operator(self, name: str, *args: Any) -> Any:
        """A Python operator of a value."""
        from torchhal.pointwise.functions import FUNCTIONS

        self._check_open()
        return FUNCTIONS[name](self, *args)

    def dispatch(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """A torch function or method with a value somewhere among its arguments."""
        return self.call(name_of(func), args, kwargs)

    def method(self, value: Value, name: str) -> Callable[..., Any]:
        """The method ``name`` of a value; AttributeError where tensors have none either."""
        if not hasattr(torch.Tensor, name):
            raise AttributeError(f"neither a captured value nor a torch.Tensor has an attribute {name!r}")
        from torchhal.pointwise.functions import FUNCTIONS

        if name not in FUNCTIONS:
            self.refuse(f"Tensor.{name}", advice_for(name))
        return lambda *args, **kwargs: self.call(name, (value, *args), kwargs)

    def call(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The torch function ``name`` on ``args``, recorded."""
        from torchhal.pointwise.functions import FUNCTIONS

        self._check_open()
        handler = FUNCTIONS.get(name)
        if handler is None:
            view = next((arg for arg in args if isinstance(arg, CapturedView)), None)
            if view is not None:
                view.refuse(f"torch {name}")
            self.refuse(f"torch function {name!r}", advice_for(name))
        try:
            return handler(self, *args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise
            self.refuse(
                f"{name} with these arguments ({error})", "only its pointwise arguments can be captured"
            )

    def _check_open(self) -> None:
        if not self.open:
            self.refuse(
                "a value is used after its capture ended",
                "do not keep values in globals, lists or attributes; compute what you need inside the function",
            )

    def _checked(self, item: Number) -> Number:
        if type(item) is int and not -(2**63) <= item < 2**63:
            self.refuse(f"the Python int {item}", "integers must fit in int64; write a float instead")
        return item

    def _lift_tensor(self, tensor: torch.Tensor, operation: str) -> Value:
        known = self._literals.get(id(tensor))
        if known is not None:
            return self.literal(known[1], known[2], Kind.SCALAR)
        with torch._C.DisableTorchFunction():
            shape = tuple(tensor.shape)
        if shape:
            self.refuse(
                f"{operation} on a whole captured tensor of shape {shape}",
                "index it down to a scalar with the function's arguments, e.g. bias[h, q_idx, kv_idx], or table[0]",
            )
        value: Value = self.index(tensor, ())
        return value

    def _lift_index(self, item: Any) -> Value:
        if item is None or item is Ellipsis or isinstance(item, (slice, bool, list)):
            self.refuse(
                f"indexing a captured tensor with {item if item is Ellipsis else type(item).__name__}",
                "every dimension takes one integer: a value, an int, or a 0-dim integer tensor",
            )
        value = self.lift(item, "indexing")
        if value.dtype not in (torch.int32, torch.int64):
            self.refuse(
                f"indexing a captured tensor with a {NAME_OF[value.dtype]} value",
                "indices are int32 or int64: write index.to(torch.int32), or torch.where for a mask",
            )
        return value
