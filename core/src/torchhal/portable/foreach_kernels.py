"""Kernels for foreach, printed: one function over any number of tensors, which a table of addresses names.

A row of the table (int64) is all that a program needs to know of one position of the lists::

    elements | place | first chunk | address or number of each operand | address of each output | sizes | strides ...

and a list of chunks says for each program which row it works at, and at which block of its elements. So neither the
source nor the number of launches depends on how many tensors there are. Floating-point operations are never contracted:
results have the bits of the functions of torch that the graph is made of.
"""

from __future__ import annotations

import functools
import itertools
import linecache
from dataclasses import dataclass
from typing import Any, Final

import torch

from torchhal.foreach_columns import LIST, NUMBER, NUMBERS
from torchhal.pointwise import Graph
from torchhal.portable import printer
from torchhal.portable.printer import TYPES

OPTIONS: Final = {"enable_fp_fusion": False}
"""What kernels are compiled with: a product and a sum are rounded one after the other."""
ALIGNMENT: Final = 16
"""Bytes that one thread loads at once, where addresses are multiples of it."""
ELEMENTS, PLACE, FIRST, ADDRESSES = range(4)
"""Columns of the table; addresses of operands begin at the last."""


@dataclass(frozen=True)
class Form:
    """What is compiled into a kernel."""

    graph: Graph
    kinds: tuple[int, ...]
    """How each operand is given, as :mod:`torchhal.foreach_columns` has it."""
    rank: int = 0
    """Dimensions that strides are given for; 0 where all tensors of a position lie in memory alike, without gaps."""
    aligned: bool = False
    """Whether all addresses are multiples of :data:`ALIGNMENT`."""
    wide: bool = False
    """Whether elements are counted in 64 bits."""
    reduction: str | None = None

    @property
    def outputs(self) -> int:
        """How many results there are."""
        return len(self.graph.outputs)

    @property
    def written(self) -> int:
        """How many of them are written as they are; none where they are reduced."""
        return self.outputs if self.reduction is None else 0

    @property
    def listed(self) -> list[int]:
        """Operands that are lists of tensors."""
        return [i for i, kind in enumerate(self.kinds) if kind == LIST]

    @property
    def strided(self) -> int:
        """Tensors of a position that have strides: those of lists, and destinations."""
        return len(self.listed) + self.written

    @property
    def captured(self) -> int:
        """Where addresses of captured tensors begin."""
        return ADDRESSES + len(self.kinds)

    @property
    def destinations(self) -> int:
        """Where addresses of outputs begin."""
        return self.captured + len(self.graph.captured)

    @property
    def sizes(self) -> int:
        """Where sizes, and behind them strides, begin."""
        return self.destinations + self.written

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.sizes + self.rank * (1 + self.strided)

    @property
    def numbers(self) -> list[int]:
        """Operands that are arguments of the kernel."""
        return [i for i, kind in enumerate(self.kinds) if kind == NUMBER]


_number: Final = itertools.count()


@functools.lru_cache(maxsize=1024)
def kernel(form: Form) -> Any:
    """The kernel ``(table, chunks, [partial], numbers..., BLOCK)`` of a form. Needs Triton.

    A number is an int64: the bits of a float64, or what an int or a bool is equal to. ``partial`` is what reductions write
    to: for each output and chunk one float64, or int64.
    """
    import triton
    import triton.language as tl

    from torchhal.portable import foreach_steps

    pointwise = printer.function(form.graph, exact=True)
    text = source(form)
    name = f"<foreach {next(_number)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {
        "triton": triton, "tl": tl, "steps": foreach_steps, "pointwise": pointwise, "__name__": __name__,
    }  # fmt: skip
    exec(compile(text, name, "exec"), space)
    return space["foreach"]


def source(form: Form) -> str:
    """The source of a kernel."""
    numbers = [f"n{i}" for i in form.numbers]
    parameters = ["table", "chunks", *["partial"] * (form.reduction is not None)]
    parameters += [*(f"{name}: tl.int64" for name in numbers), "BLOCK: tl.constexpr"]
    lines = [
        f"@triton.jit(do_not_specialize={numbers})",
        f"def foreach({', '.join(parameters)}):",
        f"    row, start, full = steps.chunk(table, chunks, {form.width}, BLOCK)",
        "    lanes = tl.arange(0, BLOCK)",
        "    inside = lanes < tl.load(row) - start",
        *_places(form),
        *_loads(form),
        *(f"    {line}" for line in _scalars(form)),
        _call(form),
        *(_partials(form) if form.reduction else _stores(form)),
    ]
    return "\n".join([*lines, ""])


def _places(form: Form) -> list[str]:
    """Where the elements of each list and output lie."""
    graph = form.graph
    kept = [(f"p{i}", ADDRESSES + i, graph.inputs[i].dtype) for i in form.listed]
    kept += [
        (f"q{k}", form.destinations + k, graph.nodes[graph.outputs[k]].dtype) for k in range(form.written)
    ]
    lines = [f"    {name} = steps.address(row, {at}, {_memory(dtype)})" for name, at, dtype in kept]
    if form.rank == 0:
        hint = form.aligned
        return lines + [f"    {name} = steps.places({name} + start, lanes, {hint})" for name, _, _ in kept]
    lines.append(f"    rest = steps.counted(start, lanes, {form.wide})")
    lines += [f"    {name}_ = tl.zeros((BLOCK,), tl.int64)" for name, _, _ in kept]
    for dim in reversed(range(form.rank)):
        size = f"tl.load(row + {form.sizes + dim})"
        lines.append(f"    index, rest = steps.divided(rest, {size}, {form.wide}, {dim == 0})")
        for number, (name, _, _) in enumerate(kept):
            at = form.sizes + form.rank * (1 + number) + dim
            lines.append(f"    {name}_ += index * tl.load(row + {at})")
    return lines + [f"    {name} = {name} + {name}_" for name, _, _ in kept]


def _memory(dtype: torch.dtype) -> str:
    """A dtype as it lies in memory, where a truth value is a byte."""
    return "tl.int8" if dtype is torch.bool else TYPES[dtype]


def _loads(form: Form) -> list[str]:
    if not form.listed:
        return []
    whole = [f"        x{i} = tl.load(p{i})" for i in form.listed]
    part = [f"        x{i} = tl.load(p{i}, mask=inside, other=0)" for i in form.listed]
    truths = [f"    x{i} = x{i} != 0" for i in form.listed if form.graph.inputs[i].dtype is torch.bool]
    return ["    if full:", *whole, "    else:", *part, *truths]


def _scalars(form: Form) -> list[str]:
    """Operands that are one number, and captured tensors."""
    lines = []
    for i, kind in enumerate(form.kinds):
        dtype = form.graph.inputs[i].dtype
        if kind == NUMBER:
            lines.append(f"x{i} = steps.number(n{i}, {TYPES[dtype]})")
        elif kind == NUMBERS:
            lines.append(f"x{i} = steps.number(tl.load(row + {ADDRESSES + i}), {TYPES[dtype]})")
        elif kind != LIST:
            truth = " != 0" * (dtype is torch.bool)
            lines.append(f"x{i} = tl.load(steps.address(row, {ADDRESSES + i}, {_memory(dtype)})){truth}")
    for k, spec in enumerate(form.graph.captured):
        lines.append(f"c{k} = steps.address(row, {form.captured + k}, {_memory(spec.dtype)})")
    return lines


def _call(form: Form) -> str:
    inputs = [f"x{i}" for i in range(len(form.kinds))]
    captured = "".join(f"c{k}, " for k in range(len(form.graph.captured)))
    results = ", ".join(f"v{k}" for k in range(form.outputs))
    return f"    {results} = pointwise({', '.join([*inputs, f'({captured})'])})"


def _stores(form: Form) -> list[str]:
    lines = []
    for k, node in enumerate(form.graph.outputs):
        memory = ".to(tl.int8)" * (form.graph.nodes[node].dtype is torch.bool)
        lines.append(f"    v{k} = tl.broadcast_to(v{k}{memory}, (BLOCK,))")
    whole = [f"        tl.store(q{k}, v{k})" for k in range(form.outputs)]
    part = [f"        tl.store(q{k}, v{k}, mask=inside)" for k in range(form.outputs)]
    return [*lines, "    if full:", *whole, "    else:", *part]


def _partials(form: Form) -> list[str]:
    """One number for each output and chunk; float64 is as wide as int64."""
    lines = []
    for k, node in enumerate(form.graph.outputs):
        kind = partial_type(form.graph.nodes[node].dtype, form.reduction)
        lines += [
            f"    v{k} = tl.broadcast_to(v{k}{' != 0' * (form.reduction == 'any')}, (BLOCK,))",
            f"    v{k} = steps.{form.reduction}_of(v{k}.to({TYPES[kind]}), inside)",
            f"    steps.keep(partial, {k}, v{k})",
        ]
    return lines


def partial_type(dtype: torch.dtype, reduction: str | None) -> torch.dtype:
    """What elements of ``dtype`` are reduced in: float64 for floats, int64 for all others and for truth."""
    return torch.float64 if dtype.is_floating_point and reduction != "any" else torch.int64
