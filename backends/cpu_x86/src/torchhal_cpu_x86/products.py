"""The native fused matrix product: its C structure, filled in from tensors and graphs."""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torchhal.pointwise import Graph
from torchhal.products.graphs import Function
from torchhal.products.packed import Operand
from torchhal.products.product import NO_FUNCTIONS
from torchhal_cpu_x86 import native, packed, programs


def multiply(
    a: Tensor,
    b: Tensor | Operand,
    bias: Tensor | None,
    functions: tuple[Function | None, Function | None, Function | None],
    out_dtypes: tuple[torch.dtype, ...],
) -> tuple[Tensor, ...]:
    """``epilogue(a_prologue(a) @ b_prologue(b) + bias)``, one contiguous tensor (..., M, N) for each output.

    Args:
        a: (..., M, K), any strides.
        b: (..., K, N), batch dimensions broadcast, or a packed weight (K, N).
        bias: (N,) or None.
        functions: ``a_prologue``, ``b_prologue`` and ``epilogue``, each of ``(value)`` or ``(value, batch, row, col)``. The
            results of an epilogue have ``out_dtypes``; without one there is one result, of a type in
            :data:`torchhal.products.graphs.STORED`.
        out_dtypes: element types of the results.
    """
    library = _library()
    (*_, rows, inner), columns = a.shape, b.shape[-1]
    shape: tuple[int, ...] = (rows, columns)
    keep: list[object] = []
    batch, batch_dims = _ONE, 0
    if a.dim() != 2 or b.dim() != 2:
        sizes = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
        shape, batch_dims, batch = (*sizes, *shape), len(sizes), _batch(sizes, a, b, keep)
    outputs = tuple([torch.empty(shape, dtype=dtype, device="cpu") for dtype in out_dtypes])
    pointers = array("Q", [out.data_ptr() for out in outputs])
    added = _NO_BIAS if bias is None else (native.DTYPES[bias.dtype], bias.data_ptr(), bias.stride(0))
    addresses = (0, 0, 0) if functions == NO_FUNCTIONS else tuple([_function(f, keep) for f in functions])
    weight = None if isinstance(b, Tensor) else packed.description(b)
    library.matmul(
        _MATMUL.pack(
            _MATMUL.size, 0, native.DTYPES[a.dtype], native.DTYPES[b.dtype], added[0], torch.get_num_threads(), batch_dims, len(outputs),
            rows, columns, inner, *batch, a.data_ptr(), b.data_ptr(), added[1], *a.stride()[-2:], *b.stride()[-2:], added[2],
            *addresses, _address(_types(out_dtypes)), _address(pointers), library.parallel, 0, 0 if weight is None else _address(weight),
        )
    )  # fmt: skip
    return outputs


@functools.cache
def _library() -> native.Native:
    """The library, without asking for its path in every call."""
    return native.load()


_MATMUL: Final = struct.Struct("=I7i4q3Q3Q5q3Q2Q2QQ")
"""``thal_matmul`` of torchhal_cpu_x86.h, field by field: packing it takes a fifth of the time that ctypes would."""
_ONE: Final = (1, 0, 0, 0)
"""A batch of one: how many entries, and the addresses of sizes and strides."""
_NO_BIAS: Final = (0, 0, 0)


@functools.cache
def _types(dtypes: tuple[torch.dtype, ...]) -> array[int]:
    return array("i", [programs.TYPES[dtype] for dtype in dtypes])


def _batch(
    sizes: Sequence[int], a: Tensor, b: Tensor | Operand, keep: list[object]
) -> tuple[int, int, int, int]:
    arrays = [
        array("q", sizes),
        *(array("q", t.expand(*sizes, *t.shape[-2:]).stride()[:-2]) for t in (a, b)),
    ]
    keep += arrays
    entries = torch.Size(sizes).numel()
    return (entries, *map(_address, arrays)) if sizes else _ONE  # type: ignore[return-value]


def _function(function: Function | None, keep: list[object]) -> int:
    if function is None:
        return 0
    words = _words(function.graph)
    captured = (programs.Captured * len(function.tensors))()
    for item, tensor in zip(captured, function.tensors, strict=True):
        item.data, item.type, item.dims = tensor.data_ptr(), programs.TYPES[tensor.dtype], tensor.dim()
        if item.dims:
            layout = array("q", (*tensor.shape, *tensor.stride()))
            item.sizes = _address(layout)
            item.strides = item.sizes + 8 * item.dims
            keep.append(layout)
    made = programs.Function(_address(words), len(words), ctypes.addressof(captured), len(captured))
    keep += [words, captured, made]
    return ctypes.addressof(made)


@functools.lru_cache(maxsize=1024)
def _words(graph: Graph) -> array[int]:
    return array("q", programs.encode(graph))


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]
