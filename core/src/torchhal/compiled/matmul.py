"""The fused matrix product under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchhal import scope
from torchhal._text import dtype_from_name
from torchhal.compiled.call import FAMILIES, Family, Numbers, describe, record
from torchhal.matmul import INDICES, Call, Functions, element_dtype, is_required, returns_tuple, run
from torchhal.operands import Packed
from torchhal.ops import Description
from torchhal.ops_families import matmul_shape, pack_tensors, unpack_tensors
from torchhal.pointwise import capture

_NAMES = ("a_prologue", "b_prologue", "epilogue")


def matmul(
    a: Tensor,
    b: Tensor | Packed,
    bias: Tensor | None,
    a_prologue: Any,
    b_prologue: Any,
    epilogue: Any,
    out_dtype: Any,
    backend: str | None,
    fusion: str,
) -> Any:
    """The traced form of :func:`torchhal.matmul`."""
    value = torch.float64 if a.dtype is torch.float64 or b.dtype is torch.float64 else torch.float32
    arguments = [(value, False), *[(torch.int32, False)] * 3]
    functions, named = [], {}
    for name, function in zip(_NAMES, (a_prologue, b_prologue, epilogue), strict=True):
        if function is not None:
            count = _parameters(function)
            functions.append((function, arguments[:count]))
            named[name] = count
    weight, packing = unpack_tensors(b)
    state = scope.current.state  # read here so that Dynamo guards on it
    call = describe(
        family="matmul", functions=named, packing=packing, bias=bias is not None, backend=backend, out_dtype=out_dtype,
        fusion=fusion, scoped=None if state is scope.current else state.backend,
    )  # fmt: skip
    results = record(call, (), [a, *weight] if bias is None else [a, *weight, bias], functions)
    # A tuple is told from a lone result by one empty tensor at its end.
    return results[0] if len(results) == 1 else tuple(results[:-1])


def _parameters(function: Any) -> int:
    """As :func:`torchhal.matmul` counts them, in the part of Python that Dynamo traces."""
    code = getattr(function, "__code__", None)
    if code is None:
        return 1
    return code.co_argcount - len(function.__defaults__ or ())  # type: ignore[no-any-return]


def _operands(call: Description, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | Packed, Tensor | None]:
    rest = iter(tensors)
    return next(rest), pack_tensors(rest, call["packing"]), next(rest) if call["bias"] else None


def _shapes(
    call: Description, tensors: Sequence[Tensor], outputs: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    a, b, _ = _operands(call, tensors)
    several = counts[-1] if "epilogue" in call["functions"] else 0
    found = (
        [t.dtype for t in outputs[len(outputs) - (several or 1) :]]
        if "epilogue" in call["functions"]
        else [a.dtype]
    )
    main = torch.promote_types(a.dtype, b.dtype)
    given = call["out_dtype"]
    dtypes = [main if dtype.is_floating_point else dtype for dtype in found]
    if given is not None:
        dtypes = [
            dtype_from_name(name) for name in (given if isinstance(given, list) else [given] * len(found))
        ]
    shape = _squeezed(matmul_shape(_matrix(a, 0), _matrix(b, -1)), a.dim() == 1, len(b.shape) == 1)
    results = [a.new_empty(shape, dtype=dtype) for dtype in dtypes]
    return [*results, a.new_empty(0)] if several else results


def _matrix(operand: Tensor | Packed, position: int) -> Tensor | Packed:
    return operand.unsqueeze(position) if isinstance(operand, Tensor) and operand.dim() == 1 else operand


def _squeezed(shape: list[Any], row: bool, column: bool) -> list[Any]:
    shape = shape[:-1] if column else shape
    return shape[: -1 if column else -2] + shape[len(shape) - (0 if column else 1) :] if row else shape


def _run(
    call: Description, numbers: Numbers, tensors: Sequence[Tensor], functions: Sequence[Callable[..., Any]]
) -> Sequence[Tensor]:
    a, b, bias = _operands(call, tensors)
    inputs = (("value", element_dtype(a, b)), *INDICES)
    named = zip(call["functions"].items(), functions, strict=True)
    captured = Functions(
        **{name: capture(function, inputs[:count], what=name) for (name, count), function in named}
    )
    given = call["out_dtype"]
    dtypes = (
        tuple(map(dtype_from_name, given))
        if isinstance(given, list)
        else None
        if given is None
        else dtype_from_name(given)
    )
    result = run(Call(a, b, bias, captured, dtypes, call["backend"], is_required(call["fusion"])))
    if returns_tuple(captured):
        return [*result, a.new_empty(0)]
    return [result]  # type: ignore[list-item]


FAMILIES["matmul"] = Family(_shapes, _run)
