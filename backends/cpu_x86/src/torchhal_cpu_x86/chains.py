"""Products with packed weights that follow each other, as one native call."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from torchhal.chains import Bound, Step
from torchhal.operands import GGUFWeight, Packed
from torchhal_cpu_x86 import native, programs
from torchhal_cpu_x86.packed import SCHEMES
from torchhal_cpu_x86.product_graphs import Functions, fuse
from torchhal_cpu_x86.products import STORED

NONE = -1


def bind(steps: Sequence[Step]) -> Bound | None:
    """What runs a chain natively; None for one that it has no form for."""
    if not all(_is_plain(step) for step in steps):
        return None
    chain = Prepared(steps)
    operator = torch.ops.torchhal_cpu_x86.products.default

    def run(a: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        return operator(a, parts, chain.number)  # type: ignore[no-any-return]

    return run


def _is_plain(step: Step) -> bool:
    problem = step.problem
    types = {problem.a_dtype, problem.b_dtype, *problem.out_dtypes, problem.bias_dtype or torch.float32}
    return (
        problem.a_prologue is problem.b_prologue is None
        and types <= STORED[torch.float32]
        and len(problem.out_dtypes) == 1
    )


class Prepared:
    """A chain that the library keeps as long as this lives."""

    def __init__(self, steps: Sequence[Step]) -> None:
        keep: list[array[int]] = []
        made = (_Step * len(steps))(*(_described(step, keep) for step in steps))
        library = native.load()
        self.number = library.prepare_chain(made, native.DTYPES[steps[0].problem.a_dtype])
        weakref.finalize(self, library.free_chain, self.number).atexit = False


class _Weight(ctypes.Structure):
    """``thal_packed`` of torchhal_cpu_x86.h."""

    _fields_ = (
        ("scheme", ctypes.c_int32),
        ("transposed", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
    )


class _Step(ctypes.Structure):
    """``thal_chain_step`` of torchhal_cpu_x86.h."""

    _fields_ = (
        ("packed", _Weight),
        ("source", ctypes.c_int32),
        ("factor", ctypes.c_int32),
        ("b_type", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
        ("out_type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("words", ctypes.c_void_p),
        ("word_count", ctypes.c_int64),
    )


def _described(step: Step, keep: list[array[int]]) -> _Step:
    problem = step.problem
    functions = Functions(epilogue=problem.epilogue)
    graph = fuse(functions, torch.float32, problem.bias_dtype, problem.out_dtypes).functions.epilogue
    words = array("q", () if graph is None else programs.encode(graph))
    keep.append(words)
    return _Step(
        packed=_weight(step.weight),
        source=NONE if step.source is None else step.source,
        factor=NONE if step.factor is None else step.factor,
        b_type=native.DTYPES[problem.b_dtype],
        bias_type=NONE if problem.bias_dtype is None else native.DTYPES[problem.bias_dtype],
        out_type=native.DTYPES[problem.out_dtypes[0]],
        words=words.buffer_info()[0] if words else None,
        word_count=len(words),
    )


def _weight(weight: Packed) -> _Weight:
    """The weight without its memory; of ``zero`` the library looks at whether there is one."""
    rows, columns = weight.shape
    if isinstance(weight, GGUFWeight):
        return _Weight(scheme=SCHEMES[weight.kind], rows=rows, columns=columns, group=1)
    zero = None if weight.zero is None else weight.zero.data_ptr()
    scheme = SCHEMES[f"int{weight.bits}"]
    return _Weight(scheme=scheme, rows=rows, columns=columns, group=weight.group, zero=zero)
