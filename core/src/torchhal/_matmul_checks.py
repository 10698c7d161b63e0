"""What is wrong with a matmul call, in words: expected, arrived, what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchhal.operands import Packed


def operand_fault(a: object, b: object, bias: object) -> str:
    """The first operand that is no dense tensor of a usable rank, or an empty string."""
    if not isinstance(a, Tensor):
        hint = "; only b may be a packed weight" if isinstance(a, Packed) else ""
        return f"a expects a tensor and got {type(a).__name__}{hint}"
    if not isinstance(b, (Tensor, Packed)):
        return f"b expects a tensor or a packed weight (torchhal.pack_weight, torchhal.gguf_weight) and got {type(b).__name__}"
    if bias is not None and not isinstance(bias, Tensor):
        return f"bias expects a tensor of shape (N,) and got {type(bias).__name__}"
    return _layout_fault(a, b) or _rank_fault(a, b)


def _layout_fault(a: Tensor, b: Tensor | Packed) -> str:
    for name, tensor in (("a", a), ("b", b)):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_nested:
            return f"{name} is a nested tensor; multiply its {name}.values() and rebuild the nest from {name}.offsets()"
        if tensor.layout is not torch.strided:
            return f"{name} expects a dense tensor and has the layout {tensor.layout}; convert it with .to_dense()"
    return ""


def _rank_fault(a: Tensor, b: Tensor | Packed) -> str:
    for name, shape in (("a", a.shape), ("b", b.shape)):
        if len(shape) == 0:
            return f"{name} expects at least one dimension and is 0-dim; multiply by a number with the * operator"
    return ""


def shape_fault(a: Sequence[int], b: Sequence[int], bias: Sequence[int] | None, packed: bool) -> str:
    """Why these shapes do not multiply, or an empty string."""
    inner = b[-2] if len(b) > 1 else b[0]
    if a[-1] != inner:
        return _inner_fault(a, b, packed)
    if (len(a) > 2 or len(b) > 2) and not _broadcast(a[:-2], b[:-2]):
        return f"the batch dimensions of a and b must broadcast, and are {tuple(a[:-2])} of {tuple(a)} and {tuple(b[:-2])} of {tuple(b)}"
    columns = b[-1] if len(b) > 1 else 1
    if bias is not None and tuple(bias) != (columns,):
        hint = (
            "; add other shapes in an epilogue that captures them, such as lambda v, b, m, n: v + bias[m, n]"
        )
        return f"bias expects the shape (N,) = ({columns},), the columns of b, and has {tuple(bias)}{hint}"
    return ""


def _inner_fault(a: Sequence[int], b: Sequence[int], packed: bool) -> str:
    inner = b[-2] if len(b) > 1 else b[0]
    hint = ""
    if len(b) > 1 and a[-1] == b[-1]:
        hint = (
            "; pack it with transposed=True" if packed else "; pass b.mT if its rows are the output's columns"
        )
    kind = "packed weight b" if packed else "b"
    return f"a {tuple(a)} has rows of {a[-1]} elements and {kind} {tuple(b)} columns of {inner}; both are K and must be equal{hint}"


def _broadcast(left: Sequence[int], right: Sequence[int]) -> bool:
    pairs = zip(reversed(left), reversed(right), strict=False)
    return all(m == n or m == 1 or n == 1 for m, n in pairs)


def type_fault(a: Tensor, b: Tensor | Packed, bias: Tensor | None) -> str:
    """What is wrong with element types and devices, or an empty string."""
    for name, dtype in (("a", a.dtype), ("b", b.dtype)):
        if not dtype.is_floating_point:
            return f"{name} expects a floating type and has {dtype}; convert it with .to(...), or use torch.matmul"
    if b.device != a.device:
        return f"a is on {a.device} and b on {b.device}; move them to one device"
    if bias is None:
        return ""
    if bias.device != a.device:
        return f"a is on {a.device} and bias on {bias.device}; move them to one device"
    allowed = {a.dtype, b.dtype, torch.float32}
    if bias.dtype not in allowed:
        names = ", ".join(sorted(str(d) for d in allowed))
        return f"bias expects the type of a or b, or float32 ({names}), and has {bias.dtype}; convert it with .to(...)"
    return ""


def captured_fault(name: str, tensors: Sequence[Tensor], device: torch.device) -> str:
    """Why tensors that a function captured can not be read on ``device``, or an empty string."""
    for tensor in tensors:
        if tensor.device != device:
            got = f"a tensor of shape {tuple(tensor.shape)} on {tensor.device}"
            return f"{name} captures {got}, and a is on {device}; move it there"
    return ""


def out_dtype_fault(out_dtype: object, outputs: int) -> str:
    """What is wrong with ``out_dtype``, or an empty string."""
    wanted = out_dtype if isinstance(out_dtype, tuple) else (out_dtype,)
    for dtype in wanted:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            return f"out_dtype expects a floating type, or a tuple with one for each output, and got {out_dtype!r}"
    if isinstance(out_dtype, tuple) and len(out_dtype) != outputs:
        return f"out_dtype names {len(out_dtype)} types and the call has {outputs} outputs"
    return ""
