"""Foreach by one portable Triton kernel for any number of tensors: how a call becomes launches."""

from __future__ import annotations

import functools
import operator
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal._caches import Bounded
from torchhal.foreach_columns import NUMBER, NUMBERS, Column, lists_of, shapes_agree
from torchhal.foreach_plans import Lists, Passes, Results, Run, runner
from torchhal.pointwise import Graph
from torchhal.pointwise.dtypes import DTYPES
from torchhal.portable import unavailable
from torchhal.portable.fitting import on_device
from torchhal.portable.foreach_kernels import (
    ADDRESSES,
    ALIGNMENT,
    ELEMENTS,
    FIRST,
    OPTIONS,
    PLACE,
    Form,
    kernel,
    partial_type,
)
from torchhal.portable.foreach_tables import MOST, Layout, chunks_of, layout, upload
from torchhal.portable.launch import Again, Start, start
from torchhal.portable.printer import TYPES
from torchhal.problems import Decline, ForeachClaims, ForeachProblem
from torchhal.reference.foreach import reduced_dtype, smallest
from torchhal.streams import is_capturing, stream_of

CLAIMS: Final = ForeachClaims(
    dtypes=frozenset(DTYPES),
    in_place=True,
    scalars=True,
    mixed_dtypes=True,
    several_outputs=True,
    captured_tensors=True,
    backward=True,
    captured_gradient=True,
    reduction=True,
)
"""What the kernels do; a backend claims of it what it has tested on its hardware."""
MOST_OPERANDS: Final = 64


@dataclass(frozen=True)
class Blocks:
    """How the work is cut, which depends on the hardware."""

    elements: int = 1024
    """Of one program: a power of two."""
    warps: int = 4
    reduced: int = 4096
    """Of one program of a reduction, which writes one number."""
    settled: int = 256
    """Chunks whose sums are added at once, in the second pass of a reduction."""

    def of(self, form: Form) -> int:
        """Elements of one program of a form's kernel."""
        return self.elements if form.reduction is None else self.reduced


PLAIN: Final = Blocks()


def decline(problem: ForeachProblem) -> Decline | None:
    """Why the kernels do not serve a problem that :data:`CLAIMS` cover, or None."""
    missing = unavailable()
    if missing is not None:
        return missing
    if len(problem.operands) > MOST_OPERANDS:
        return Decline("too_many_operands", f"functions of up to {MOST_OPERANDS} operands are served")
    return None


def mapping(problem: ForeachProblem, mapper: Mapper) -> Run:
    """The ``run`` of a Plan, as :func:`torchhal.hookspecs.torchhal_foreach` has it. Needs Triton.

    Args:
        problem: what :func:`decline` lets pass.
        mapper: what serves it.
    """
    return runner(problem, Passes(mapper.map, mapper.reduce))


class Part(NamedTuple):
    """Positions of the lists that one launch serves."""

    form: Form
    positions: Sequence[int]
    sizes: Sequence[int]
    """Elements of each."""
    layouts: Sequence[Layout] | None
    """None where all tensors of a position lie in memory alike."""
    fields: Sequence[Sequence[int]]
    """Addresses, or bits of numbers, of each operand, captured tensor and output: one for each position, or one for all."""


class Ready(NamedTuple):
    """A launch whose table is on the device."""

    table: Tensor
    chunks: Tensor
    programs: int
    again: list[Again]
    """What starts the kernel again; empty before the first time."""


class Mapper:
    """Serves the calls of one problem.

    Args:
        device: where tensors are.
        blocks: how the work is cut.
        start: how kernels are started.
    """

    def __init__(self, device: torch.device, blocks: Blocks = PLAIN, start: Start = start) -> None:
        self.device = device
        self.blocks = blocks
        self.start = start
        self.kept: dict[Any, Any] = Bounded(MOST)
        """What was uploaded, by device, stream and content."""

    # ------------------------------------------------------------------------ the two passes

    def map(
        self, graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], out: Lists | None = None
    ) -> Results:
        """:class:`torchhal.foreach_plans.Passes` has what these are and give."""
        shapes = _shapes(columns)
        dtypes = [graph.nodes[node].dtype for node in graph.outputs]
        like = lists_of(columns)[0]
        if out is None:
            results = tuple([_new(like, shapes, dtype) for dtype in dtypes])
        else:
            results = tuple(
                [_writable(items, like, shapes, dtype) for items, dtype in zip(out, dtypes, strict=True)]
            )
        captured = [t.resolve_neg() for t in captured]
        with on_device(like[0]):
            for part in self.parts(graph, columns, captured, shapes, results):
                self.launch(part.form, self.ready(part), (), _numbers(columns))
        if out is None:
            return results
        torch.autograd.graph.increment_version([t for items in results for t in items])
        for items, values in zip(out, results, strict=True):
            for destination, value in zip(items, values, strict=True):
                if destination is not value:
                    destination.copy_(value)
        return tuple([list(items) for items in out])

    def reduce(
        self, graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], reduction: str
    ) -> Results:
        """Two launches: one number for each chunk, then one for each position, in an order that sizes alone decide."""
        shapes = _shapes(columns)
        like = lists_of(columns)[0]
        dtypes = [reduced_dtype(graph.nodes[node].dtype, reduction) for node in graph.outputs]
        results = tuple([[like[0].new_empty((), dtype=dtype) for _ in like] for dtype in dtypes])
        captured = [t.resolve_neg() for t in captured]
        with on_device(like[0]):
            places = array("q", [t.data_ptr() for items in zip(*results, strict=True) for t in items])
            written = upload(torch.frombuffer(places, dtype=torch.int64), self.device)
            for part in self.parts(graph, columns, captured, shapes, (), reduction):
                ready = self.ready(part)
                partial = written.new_empty(max(ready.programs, 1) * len(dtypes))
                self.launch(part.form, ready, (partial,), _numbers(columns))
                for output in range(len(dtypes)):
                    self._settle(part, ready, partial, written, output)
        return results

    def _settle(self, part: Part, ready: Ready, partial: Tensor, written: Tensor, output: int) -> None:
        from torchhal.portable.foreach_steps import settle

        form = part.form
        assert form.reduction is not None
        dtype = form.graph.nodes[form.graph.outputs[output]].dtype
        result = reduced_dtype(dtype, form.reduction)
        constants = {
            "WIDTH": form.width, "BLOCK": self.blocks.settled, "OUTPUT": output, "OUTPUTS": form.outputs,
            "CHUNK": self.blocks.reduced, "KIND": _type(partial_type(dtype, form.reduction)),
            "TYPE": _type(torch.int8 if result is torch.bool else result),
            "LEAST": 0 if result.is_floating_point else int(smallest(result)), "REDUCTION": form.reduction, **OPTIONS,
        }  # fmt: skip
        grid = (len(part.positions),)
        self.start(settle, grid, (ready.table, partial, written, ready.programs), constants)

    # ------------------------------------------------------------------------ positions

    def parts(
        self,
        graph: Graph,
        columns: Sequence[Column],
        captured: Sequence[Tensor],
        shapes: Sequence[torch.Size] | None,
        results: Lists,
        reduction: str | None = None,
    ) -> list[Part]:
        """Positions by the form of kernel that they need.

        Args:
            graph: the function.
            columns: its operands.
            captured: its captured tensors.
            shapes: of the results; None where all lists have those.
            results: where they are written; nothing for a reduction.
            reduction: what becomes of them.
        """
        form = Form(graph, tuple([column.kind for column in columns]), reduction=reduction)
        fields = [_field(column) for column in columns]
        fields += [[t.data_ptr()] for t in captured]
        fields += [[t.data_ptr() for t in items] for items in results]
        addresses = [fields[i] for i in form.listed] + fields[len(fields) - len(results) :]
        tensors = [*lists_of(columns), *results]
        sizes = [shape.numel() for shape in shapes] if shapes else [t.numel() for t in tensors[0]]
        if shapes is None and all([t.is_contiguous() for items in tensors for t in items]):  # noqa: C419 (a list is quicker)
            if all(is_aligned(items) for items in addresses):
                return [Part(replace(form, aligned=True), range(len(sizes)), sizes, None, fields)]
            layouts: list[Layout] = [((), ())] * len(sizes)
        else:
            layouts = _layouts(tensors, shapes or [t.shape for t in tensors[0]])
        aligned = [is_aligned(items) for items in zip(*addresses, strict=True)]
        forms = [
            replace(form, rank=rank, aligned=rank == 0 and even, wide=rank > 0 and size >= 2**31)
            for rank, even, size in zip(map(_rank, layouts), aligned, sizes, strict=True)
        ]
        return [_part(one, forms, sizes, layouts, fields) for one in dict.fromkeys(forms)]

    def ready(self, part: Part) -> Ready:
        """The launch with its table on the device: as it was kept, or uploaded."""
        if is_capturing(self.device):
            return self.uploaded(part)
        key = (
            part.form, stream_of(self.device), tuple(part.positions), tuple(part.sizes),
            None if part.layouts is None else tuple(part.layouts), tuple(map(tuple, part.fields)),
        )  # fmt: skip
        found = self.kept.get(key)
        if found is None:
            found = self.uploaded(part)
            self.kept[key] = found
        return found

    def uploaded(self, part: Part) -> Ready:
        """The launch with its table on the device, uploaded just now."""
        sizes = torch.tensor(part.sizes, dtype=torch.int64)
        block = self.blocks.of(part.form)
        counts = (sizes + (block - 1)) // block
        rows = torch.zeros(len(part.sizes), part.form.width, dtype=torch.int64)
        rows[:, ELEMENTS] = sizes
        rows[:, PLACE] = torch.tensor(part.positions)
        rows[:, FIRST] = counts.cumsum(0) - counts
        for at, values in enumerate(part.fields, ADDRESSES):
            rows[:, at] = torch.frombuffer(array("q", values), dtype=torch.int64)
        if part.layouts is not None:
            rank = part.form.rank
            rows[:, part.form.sizes :] = torch.tensor([_padded(found, rank) for found in part.layouts])
        return Ready(upload(rows, self.device), self._chunks(sizes, block), int(counts.sum()), [])

    def _chunks(self, sizes: Tensor, block: int) -> Tensor:
        """The list of chunks, which calls on other tensors of the same sizes share."""
        key = (stream_of(self.device), block, tuple(sizes.tolist()))
        capturing = is_capturing(self.device)
        found = None if capturing else self.kept.get(key)
        if found is None:
            found = upload(chunks_of(sizes, block), self.device).view(torch.int32)
            if not capturing:
                self.kept[key] = found
        return found

    def launch(self, form: Form, ready: Ready, partial: tuple[Tensor, ...], numbers: Sequence[int]) -> None:
        """Start the kernel of a form on the current device."""
        if not ready.programs:
            return
        arguments = (ready.table, ready.chunks, *partial, *numbers)
        if ready.again:
            ready.again[0](*arguments)
        else:
            options = {"BLOCK": self.blocks.of(form), "num_warps": self.blocks.warps, **OPTIONS}
            ready.again.append(self.start(kernel(form), (ready.programs,), arguments, options))


# ---------------------------------------------------------------------------- columns


def _shapes(columns: Sequence[Column]) -> Sequence[torch.Size] | None:
    """The shape of the result at each position; None where it is that of the tensors of every list."""
    if shapes_agree(columns):
        return None
    return [
        torch.Size(torch.broadcast_shapes(*[t.shape for t in tensors]))  # type: ignore[no-untyped-call]
        for tensors in zip(*lists_of(columns), strict=True)
    ]


def _numbers(columns: Sequence[Column]) -> list[int]:
    """The numbers that are arguments of a kernel."""
    return [bits_of(column.items[0].item()) for column in columns if column.kind == NUMBER]


def bits_of(number: float) -> int:
    """A number as the kernels take it: the bits of a float64 as int64, an int or a bool as it is."""
    return int(struct.unpack("q", struct.pack("d", number))[0]) if type(number) is float else int(number)


def _field(column: Column) -> Sequence[int]:
    if column.kind == NUMBER:
        return [0]
    return [bits_of(t.item()) if column.kind == NUMBERS else t.data_ptr() for t in column.items]


def _part(
    form: Form, forms: Sequence[Form], sizes: Sequence[int], layouts: Sequence[Layout], fields: Sequence[Sequence[int]]
) -> Part:  # fmt: skip
    """The positions whose form is ``form``."""
    where = [position for position, found in enumerate(forms) if found is form or found == form]
    return Part(
        form, where, [sizes[p] for p in where], [layouts[p] for p in where] if form.rank else None,
        [field if len(field) == 1 else [field[p] for p in where] for field in fields],
    )  # fmt: skip


def _type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, TYPES[dtype].removeprefix("tl."))


# ---------------------------------------------------------------------------- memory


def _new(like: Sequence[Tensor], shapes: Sequence[torch.Size] | None, dtype: torch.dtype) -> list[Tensor]:
    """New tensors, in memory as those of a list where they have its shape."""
    if shapes is None:
        return [torch.empty_like(t, dtype=dtype, requires_grad=False) for t in like]
    return [
        torch.empty_like(t, dtype=dtype, requires_grad=False)
        if t.shape == shape
        else t.new_empty(shape, dtype=dtype)
        for t, shape in zip(like, shapes, strict=True)
    ]


def _writable(
    items: Sequence[Tensor], like: Sequence[Tensor], shapes: Sequence[torch.Size] | None, dtype: torch.dtype
) -> list[Tensor]:
    """The destinations themselves where results can be written there, new tensors elsewhere."""
    return [
        d if d.dtype is dtype and d.shape == shape and not d.is_neg() else t.new_empty(shape, dtype=dtype)
        for d, t, shape in zip(items, like, shapes or [t.shape for t in like], strict=True)
    ]


def _layouts(tensors: Lists, shapes: Sequence[torch.Size]) -> list[Layout]:
    return [
        layout(shape, tuple([t.shape for t in items]), tuple([t.stride() for t in items]))
        for shape, items in zip(shapes, zip(*tensors, strict=True), strict=True)
    ]


def _rank(found: Layout) -> int:
    """Dimensions that a kernel is compiled for: few kinds of them, so that few are compiled."""
    return 0 if not found[0] else 1 << (len(found[0]) - 1).bit_length()


def _padded(found: Layout, rank: int) -> list[int]:
    """Sizes and strides of a position along ``rank`` dimensions, as a row has them."""
    sizes, strides = found
    more = rank - len(sizes)
    return [*[1] * more, *sizes, *[step for own in strides for step in (*[0] * more, *own)]]


def is_aligned(addresses: Iterable[int]) -> bool:
    """Whether all addresses are multiples of :data:`ALIGNMENT`."""
    return functools.reduce(operator.or_, addresses, 0) % ALIGNMENT == 0
