"""Running programs of the native vector machine on tensors, for its tests."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import pytest
import torch

from torchhal.pointwise import Graph
from torchhal_cpu_x86 import native, programs

Tensor = torch.Tensor

try:
    LIBRARY = native.load()
except native.NativeUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

LANES: Final = 16
SPANS: Final = {"one": (1, 1), "lanes": (1, LANES), "rows": (-1, 1), "block": (-1, LANES)}
"""Shape of an input by what it varies with; -1 stands for the rows."""
SETS: Final = [
    isa for isa in LIBRARY.instruction_sets() if isa not in ("avx512_bf16", "amx_bf16")
]  # which share avx512's machine


class _Input(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("span", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


_run = LIBRARY.library.thal_program_run
_run.argtypes = [
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
    ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p,
]  # fmt: skip


def kept_as(dtype: torch.dtype) -> torch.dtype:
    """The type in which the machine gives results of ``dtype``."""
    if dtype in (torch.float64, torch.int64):
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int32


def run_words(
    words: Sequence[int],
    inputs: Sequence[Tensor],
    spans: Sequence[str],
    captured: Sequence[Tensor],
    rows: int,
    isa: str,
    wanted: torch.dtype,
) -> tuple[int, Tensor]:
    """The library's return code, and (rows, 16) results."""
    array = (ctypes.c_int64 * max(len(words), 1))(*words)
    given = (_Input * max(len(inputs), 1))()
    for i, (tensor, span) in enumerate(zip(inputs, spans, strict=True)):
        given[i] = _Input(tensor.data_ptr(), LANES, list(SPANS).index(span), 0)
    lists, tensors = [], (programs.Captured * max(len(captured), 1))()
    for i, tensor in enumerate(captured):
        shape = [
            (ctypes.c_int64 * max(tensor.dim(), 1))(*numbers) for numbers in (tensor.shape, tensor.stride())
        ]
        lists += shape
        addresses = [ctypes.addressof(numbers) for numbers in shape]
        tensors[i] = programs.Captured(
            tensor.data_ptr(), programs.TYPES[tensor.dtype], tensor.dim(), *addresses
        )
    out = torch.full((rows, LANES), -77, dtype=kept_as(wanted))
    code: int = _run(
        array, len(words), native.ISAS[isa], rows, given, len(inputs), tensors, len(captured),
        programs.TYPES[wanted], out.data_ptr(),
    )  # fmt: skip
    return code, out


def run(
    graph: Graph,
    inputs: Sequence[Tensor],
    spans: Sequence[str],
    captured: Sequence[Tensor] = (),
    rows: int = 5,
    isa: str = "avx2",
    wanted: torch.dtype | None = None,
) -> Tensor:
    """(rows, 16) results of the graph's first output."""
    dtype = wanted or graph.output_dtypes[0]
    code, out = run_words(programs.encode(graph), inputs, spans, captured, rows, isa, dtype)
    assert code == 0, LIBRARY.library.thal_error_text(code)
    return out
