"""A program of the vector machine over lists of tensors: their memory made flat, and the call of the native library."""

from __future__ import annotations

import ctypes
import functools
import weakref
from array import array
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torchhal.foreach_columns import LIST, SHARED, Column, lists_of, shapes_agree
from torchhal.pointwise import Graph
from torchhal.reference.foreach import reduced_dtype, smallest
from torchhal_cpu_x86 import native, programs

MOST_INPUTS: Final = 64
"""As ``native/src/program.hpp`` has it."""
NEW: Final = -1
GIVEN: Final = -2
"""Where the operator writes an output: to new tensors, or to a list that comes after the operands."""


REDUCTIONS: Final = {None: 0, "sum": 1, "max": 2, "any": 3}
"""As torchhal_cpu_x86.h numbers them."""


def run(
    graph: Graph,
    columns: Sequence[Column],
    captured: Sequence[Tensor],
    out: Sequence[Sequence[Tensor]] | None = None,
) -> tuple[list[Tensor], ...]:
    """The results of ``graph`` at every position, each of the broadcast shape of all columns there.

    Args:
        graph: the function; its inputs have the columns' element types.
        columns: one for each input, at least one of them not shared.
        captured: the function's captured tensors, 0-dim.
        out: for each output a list of destinations of the right shapes, of any strides and element type.
    """
    columns = _flattened(columns)
    like = next(column.items for column in columns if column.kind == LIST)
    dtypes = [graph.nodes[node].dtype for node in graph.outputs]
    if out is None:
        results = [_new(like, dtype) for dtype in dtypes]
        _fill(graph, columns, captured, results)
        return tuple(results)
    written = [_writable(items, like, dtype) for items, dtype in zip(out, dtypes, strict=True)]
    _fill(graph, columns, captured, written)
    torch.autograd.graph.increment_version([t for items in written for t in items])
    for items, values in zip(out, written, strict=True):
        for destination, value in zip(items, values, strict=True):
            if destination is not value:
                destination.copy_(value)
    return tuple(list(items) for items in out)


def reduce(
    graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], reduction: str
) -> tuple[list[Tensor], ...]:
    """What the elements of each result come to, at every position a 0-dim tensor; arguments as for :func:`run`."""
    columns = _flattened(columns)
    counts = [t.numel() for t in next(column.items for column in columns if column.kind == LIST)]
    whole = [reduction == "any" or not graph.nodes[node].dtype.is_floating_point for node in graph.outputs]
    results = [torch.empty(len(counts), dtype=torch.int64 if w else torch.float64) for w in whole]
    out = array("Q", [t.data_ptr() + 8 * position for t in results for position in range(len(counts))])
    _call(graph, columns, captured, counts, out, reduction)
    return settled(graph, results, reduction)


def _fill(
    graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], results: Sequence[Sequence[Tensor]]
) -> None:
    out = array("Q", [tensor.data_ptr() for items in results for tensor in items])
    _call(graph, columns, captured, [tensor.numel() for tensor in results[0]], out)


def settled(graph: Graph, reduced: Sequence[Tensor], reduction: str) -> tuple[list[Tensor], ...]:
    """The library's float64 and int64 results, in one tensor for each output, as the specification has them."""
    dtypes = [reduced_dtype(graph.nodes[node].dtype, reduction) for node in graph.outputs]
    return tuple(
        [
            _apart((_clamped(t, dtype) if reduction == "max" else t).to(dtype))
            for t, dtype in zip(reduced, dtypes, strict=True)
        ]
    )


def _apart(elements: Tensor) -> list[Tensor]:
    """The elements as 0-dim tensors, each in memory of its own."""
    found: tuple[Tensor, ...] = torch.unbind_copy(elements)  # type: ignore[func-returns-value,assignment]
    return list(found)


def _clamped(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest of no integers is the smallest of int64, which other types do not hold."""
    return largest if dtype.is_floating_point else largest.clamp_min(int(smallest(dtype)))


def _flattened(columns: Sequence[Column]) -> Sequence[Column]:
    """Columns whose tensors at each position have one shape and one order in memory, and no gaps."""
    lists = lists_of(columns)
    if shapes_agree(columns) and all([t.is_contiguous() for items in lists for t in items]):  # noqa: C419 (a list is quicker)
        return columns
    positions = [_aligned(tensors) for tensors in zip(*lists, strict=True)]
    rest = iter([list(items) for items in zip(*positions, strict=True)])
    return [Column(next(rest)) if column.kind == LIST else column for column in columns]


def _aligned(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    first = tensors[0]
    stride = first.stride()
    if all(t.shape == first.shape and t.stride() == stride for t in tensors) and _is_dense(first):
        return tensors
    shape = torch.broadcast_shapes(*[t.shape for t in tensors])  # type: ignore[no-untyped-call]
    return [t.expand(shape).contiguous() for t in tensors]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, each place once."""
    step = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if stride != step:
            return False
        step *= size
    return True


def _new(like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(tensor, dtype=dtype, requires_grad=False) for tensor in like]


def _writable(items: Sequence[Tensor], like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The destinations themselves where results can be written there flat, new tensors elsewhere."""
    return [
        d
        if d.dtype is dtype and d.stride() == t.stride() and d.shape == t.shape and not d.is_neg()
        else torch.empty_like(t, dtype=dtype)
        for d, t in zip(items, like, strict=True)
    ]


# ---------------------------------------------------------------------------- the native call


class _Program(ctypes.Structure):
    """``thal_map_program`` of torchhal_cpu_x86.h."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("reduction", ctypes.c_int32),
        ("words", ctypes.c_void_p),
        ("word_count", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("output_types", ctypes.c_void_p),
        ("kinds", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
    )


class Prepared:
    """A function that the library has decoded and, where it can, compiled.

    Args:
        graph: the function.
        kinds: how each of its inputs is given.
        targets: where the operator ``foreach`` writes each output: ``NEW``, ``GIVEN`` or the number of an input.
        reduction: what becomes of results, one of ``REDUCTIONS``.
    """

    def __init__(
        self, graph: Graph, kinds: Sequence[int], targets: Sequence[int], reduction: str | None = None
    ) -> None:
        words = array("q", programs.encode(graph))
        types = array("i", [programs.TYPES[graph.nodes[node].dtype] for node in graph.outputs])
        how, where = array("i", kinds), array("i", targets)
        description = _Program(
            ctypes.sizeof(_Program), REDUCTIONS[reduction], _address(words), len(words), len(kinds), len(types),
            _address(types), _address(how), _address(where),
        )  # fmt: skip
        library = native.load()
        self.number = library.prepare_map(description)
        weakref.finalize(self, library.free_map, self.number).atexit = False


@functools.lru_cache(maxsize=1024)
def prepared(
    graph: Graph, kinds: tuple[int, ...], targets: tuple[int, ...], reduction: str | None = None
) -> Prepared:
    """The prepared function, once for all calls of it."""
    return Prepared(graph, kinds, targets, reduction)


class _Map(ctypes.Structure):
    """``thal_map`` of torchhal_cpu_x86.h."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("isa", ctypes.c_int32),
        ("program", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("captured", ctypes.c_void_p),
        ("captured_count", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
        ("parallel_user", ctypes.c_void_p),
    )


def _call(
    graph: Graph,
    columns: Sequence[Column],
    captured: Sequence[Tensor],
    counts: Sequence[int],
    out: array[int],
    reduction: str | None = None,
) -> None:
    # Numbers are given as tensors here; by value the operator alone takes them.
    kinds = tuple([SHARED if column.shared else column.kind for column in columns])
    program = prepared(graph, kinds, (NEW,) * len(graph.outputs), reduction)
    sizes, data = array("q", counts), array("Q")
    for column in columns:
        data.extend([t.data_ptr() for t in column.items] * (len(counts) if column.shared else 1))
    captured = [t.resolve_neg() for t in captured]
    tensors = (programs.Captured * len(captured))(
        *[programs.Captured(t.data_ptr(), programs.TYPES[t.dtype], 0, None, None) for t in captured]
    )
    library = native.load()
    call = _Map(
        ctypes.sizeof(_Map), 0, program.number, len(counts), _address(sizes), _address(data), _address(out),
        ctypes.addressof(tensors), len(captured), torch.get_num_threads(), 0, library.parallel, None,
    )  # fmt: skip
    library.map(call)


def _address(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]
