"""The native fused matrix product: its C structure, filled in from tensors and graphs."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torchhal.pointwise import Graph
from torchhal_cpu_x86 import native, programs


class Function(NamedTuple):
    """A captured function and its tensors."""

    graph: Graph
    tensors: Sequence[Tensor] = ()


STORED: Final = {
    torch.float32: frozenset({torch.float32, torch.bfloat16, torch.float16}),
    torch.float64: frozenset({torch.float64}),
}
"""What sums of a type are rounded to without an epilogue that casts them."""


def multiply(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    a_prologue: Function | None,
    b_prologue: Function | None,
    epilogue: Function | None,
    out_dtypes: Sequence[torch.dtype],
) -> tuple[Tensor, ...]:
    """``epilogue(a_prologue(a) @ b_prologue(b) + bias)``, one contiguous tensor (..., M, N) for each output.

    Args:
        a: (..., M, K), any strides.
        b: (..., K, N); batch dimensions broadcast.
        bias: (N,) or None.
        a_prologue: of ``(value)`` or ``(value, batch, row, col)``, and so are the others.
        b_prologue: see above.
        epilogue: its results have ``out_dtypes``; without it there is one, among :data:`STORED`.
        out_dtypes: element types of the results.
    """
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    call = _Matmul(ctypes.sizeof(_Matmul))
    keep: list[object] = []
    if a.dim() == 2 and b.dim() == 2:
        shape: tuple[int, ...] = (rows, columns)
        call.batches = 1
    else:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
        shape = (*batch, rows, columns)
        _set_batch(call, batch, a, b, keep)
    outputs = [torch.empty(shape, dtype=dtype) for dtype in out_dtypes]
    types = array("i", [programs.TYPES[dtype] for dtype in out_dtypes])
    pointers = array("Q", [tensor.data_ptr() for tensor in outputs])
    call.a_type, call.b_type = native.DTYPES[a.dtype], native.DTYPES[b.dtype]
    call.num_threads, call.outputs = torch.get_num_threads(), len(outputs)
    call.M, call.N, call.K = rows, columns, inner
    call.a, call.b = a.data_ptr(), b.data_ptr()
    call.a_stride, call.b_stride = a.stride()[-2:], b.stride()[-2:]
    if bias is not None and columns:
        call.bias, call.bias_type, call.bias_stride = (
            bias.data_ptr(),
            native.DTYPES[bias.dtype],
            bias.stride(0),
        )
    if a_prologue is not None:
        call.a_prologue = _function(a_prologue, keep)
    if b_prologue is not None:
        call.b_prologue = _function(b_prologue, keep)
    if epilogue is not None:
        call.epilogue = _function(epilogue, keep)
    call.out_types, call.out = types.buffer_info()[0], pointers.buffer_info()[0]
    library = native.load()
    call.parallel = library.parallel
    library.matmul(call)
    return tuple(outputs)


def _set_batch(call: _Matmul, batch: Sequence[int], a: Tensor, b: Tensor, keep: list[object]) -> None:
    sizes = array("q", batch)
    left, right = (array("q", t.expand(*batch, *t.shape[-2:]).stride()[:-2]) for t in (a, b))
    keep += [sizes, left, right]
    call.batch_dims, call.batches = len(batch), torch.Size(batch).numel()
    if batch:
        call.batch_sizes, call.a_batch_stride, call.b_batch_stride = map(_address, (sizes, left, right))


def _function(function: Function, keep: list[object]) -> int:
    words = _words(function.graph)
    captured = (programs.Captured * len(function.tensors))()
    for item, tensor in zip(captured, function.tensors, strict=True):
        item.data, item.type, item.dims = tensor.data_ptr(), programs.TYPES[tensor.dtype], tensor.dim()
        if item.dims:
            sizes = array("q", (*tensor.shape, *tensor.stride()))
            item.sizes = _address(sizes)
            item.strides = item.sizes + 8 * item.dims
            keep.append(sizes)
    made = programs.Function(_address(words), len(words), ctypes.addressof(captured), len(captured))
    keep += [words, captured, made]
    return ctypes.addressof(made)


def _words(graph: Graph) -> array[int]:
    found = _encoded.get(graph)
    if found is None:
        if len(_encoded) >= 1024:
            _encoded.clear()
        found = _encoded[graph] = array("q", programs.encode(graph))
    return found


_encoded: dict[Graph, array[int]] = {}


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]


class _Matmul(ctypes.Structure):
    """``thal_matmul`` of torchhal_cpu_x86.h."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("isa", ctypes.c_int32),
        ("a_type", ctypes.c_int32),
        ("b_type", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("batch_dims", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("M", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("batches", ctypes.c_int64),
        ("batch_sizes", ctypes.c_void_p),
        ("a_batch_stride", ctypes.c_void_p),
        ("b_batch_stride", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("a_stride", ctypes.c_int64 * 2),
        ("b_stride", ctypes.c_int64 * 2),
        ("bias_stride", ctypes.c_int64),
        ("a_prologue", ctypes.c_void_p),
        ("b_prologue", ctypes.c_void_p),
        ("epilogue", ctypes.c_void_p),
        ("out_types", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("parallel", ctypes.c_void_p),
        ("parallel_user", ctypes.c_void_p),
    )
