"""How a call of the fused matrix product becomes a launch of the portable kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal.operands import GGUFWeight
from torchhal.pointwise import Graph, GraphBuilder
from torchhal.portable import printer
from torchhal.portable.arguments import describable
from torchhal.portable.launch import Start
from torchhal.portable.matmul_tiles import Tiles, Tuning, Work
from torchhal.portable.replay import Recording
from torchhal.products.graphs import Function
from torchhal.products.packed import Operand

HALVES: Final = frozenset({torch.bfloat16, torch.float16})
GGUF_GROUP: Final = 32
FEW_ROWS: Final = 16
"""Rows of a tile up to which reading every other element of ``a`` costs less than reading each byte of ``b`` twice."""


class Operands(NamedTuple):
    """What one product is given, and its results."""

    a: Tensor
    b: Tensor | Operand
    bias: Tensor | None
    functions: tuple[Function | None, Function | None, Function | None]
    outs: tuple[Tensor, ...]

    def tensors(self) -> list[Tensor]:
        """Every tensor of it."""
        found = [self.a]
        found += [self.b] if isinstance(self.b, Tensor) else self.b.weight.tensors
        if self.bias is not None:
            found.append(self.bias)
        for function in self.functions:
            if function is not None:
                found += function.tensors
        return found + list(self.outs)


class Launcher:
    """Starts the kernels, and keeps what was printed for them."""

    def __init__(self, tuning: Tuning, start: Start) -> None:
        self.tuning = tuning
        self.start = start

    def work_of(self, call: Operands) -> Work:
        """What there is to do."""
        rows, columns = call.outs[0].shape[-2:]
        kind, per = _packing(call.b, call.functions[1] is not None)
        mode, *_ = _mode(call, per)
        if kind == "q4_1" and not _are_narrow(call.outs):
            mode, per = "full", "element"  # sums of minima and of the rest can be large, and nearly cancel
        entries = math.prod(call.outs[0].shape[:-2])
        return Work(entries, rows, columns, call.a.shape[-1], mode, kind, per, call.functions[2] is not None)

    def __call__(self, tiles: Tiles, call: Operands, work: Work, recording: Recording | None = None) -> None:
        """Compute into ``call.outs`` with these tiles."""
        from torchhal.portable import matmul_kernels as kernels

        a, b, bias, functions, outs = call
        group = _group(b)
        inner = tiles.inner
        if work.per == "group":
            inner = min(inner, group)
            work = work if group % inner == 0 else work._replace(per="element")
        mode, a_wide, b_wide = _mode(call, work.per)
        tiles_m, tiles_n = -(-work.rows // tiles.rows), -(-work.columns // tiles.columns)
        count = tiles_m * tiles_n * work.entries
        splits = self._splits(tiles, count, -(-work.inner // inner))
        programs = count * splits
        if tiles.persistent:
            programs = min(programs, tiles.persistent * self.tuning.multiprocessors)
        parts = None
        if splits > 1:
            parts = a.new_empty(splits * outs[0].numel(), dtype=torch.float32)
        sizes, a_steps, b_steps = _batches(a, b, outs[0].shape[:-2])
        a_tiles, a_way = _descriptor(a, tiles.rows, inner, tiles.descriptors)
        b_tiles, b_way = None, ""
        if isinstance(b, Tensor):
            b_tiles, b_way = _descriptor(b, inner, tiles.columns, tiles.descriptors)
        extents = ((work.rows, work.inner), (work.inner, work.columns), (work.rows, work.columns))
        printed = [_printed(f, work.entries, e) for f, e in zip(functions, extents, strict=True)]
        captured = [() if f is None else printer.flatten(f.tensors) for f in functions]
        results = tuple(out.view(torch.uint8) if out.dtype is torch.bool else out for out in outs)
        b_strides = b.stride()[-2:] if isinstance(b, Tensor) else (0, 0)
        bias_step = 0 if bias is None else bias.stride(0)
        arguments = (
            a, b if isinstance(b, Tensor) else None, a_tiles, b_tiles, _weight(b), bias, results, parts, *captured,
            *a.stride()[-2:], *b_strides, bias_step, sizes, a_steps, b_steps,
            work.entries, work.rows, work.columns, work.inner, tiles_m, tiles_n, splits, programs,
        )  # fmt: skip
        finish = {"epilogue": printed[2], "BIAS": bias is not None, "OUTPUTS": len(outs)}
        constants = {
            "BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_K": inner, "GROUP": tiles.band,
            "KIND": work.kind, "TURNED": isinstance(b, Operand) and b.transposed, "PER": work.per,
            "ASYMMETRIC": _is_asymmetric(b), "MODE": mode, "A_WIDE": a_wide, "B_WIDE": b_wide,
            "PRECISION": float32_precision(a.device.type),
            "a_prologue": printed[0], "b_prologue": printed[1], **finish, "SPLIT": splits > 1,
            "A_TILES": a_way, "B_TILES": b_way, "EVEN_M": work.rows % tiles.rows == 0,
            "EVEN_N": work.columns % tiles.columns == 0, "EVEN_K": work.inner % inner == 0,
            "A_FAR": printer.is_wide((a,)), "B_FAR": isinstance(b, Tensor) and printer.is_wide((b,)),
            "FLATTEN": tiles.persistent > 0, "PARTS": tiles.parts,
            "PAIRS": work.kind == "int4" and work.per != "element" and tiles.rows <= FEW_ROWS <= inner // 2, **tiles.options(),
        }  # fmt: skip
        again = self.start(kernels.product_kernel, (programs,), arguments, constants)
        tensors = (*call.tensors(), parts)
        if recording is not None:
            recording.add(again, arguments, tensors)
        if parts is not None:
            rows, columns = _finish_tile(work)
            tiles_m, tiles_n = -(-work.rows // rows), -(-work.columns // columns)
            arguments = (
                parts, bias, results, captured[2], bias_step, work.entries, work.rows, work.columns, tiles_m, tiles_n, splits,
            )  # fmt: skip
            constants = {"ROWS": rows, "COLUMNS": columns, **finish}
            again = self.start(
                kernels.finish_kernel, (tiles_m * tiles_n * work.entries,), arguments, constants
            )
            if recording is not None:
                recording.workspace = parts.numel()
                recording.add(again, arguments, tensors)

    def _splits(self, tiles: Tiles, count: int, steps: int) -> int:
        """Parts of the sum, so that the device is busy."""
        wanted = -(-self.tuning.multiprocessors // count)
        return max(1, min(wanted, tiles.splits, steps // self.tuning.shortest))


# ---------------------------------------------------------------------------- how elements are multiplied


def float32_precision(device: str) -> str:
    """``ieee``, or ``tf32`` where the caller's setting of torch lets products of float32 on a type of device be rounded to that.

    ``torch.get_float32_matmul_precision`` raises once a program has used the settings that are to take its place.
    """
    settings = getattr(getattr(torch.backends, device, None), "matmul", None)
    return "tf32" if getattr(settings, "fp32_precision", "ieee") == "tf32" else "ieee"


def _packing(b: Tensor | Operand, transformed: bool) -> tuple[str, str]:
    """KIND and PER of the kernel."""
    if isinstance(b, Tensor):
        return "tensor", ""
    weight = b.weight
    kind = weight.kind if isinstance(weight, GGUFWeight) else f"int{weight.bits}"
    if transformed or b.transposed or not weight.shape[0]:
        return kind, "element"
    group = _group(b)
    if not isinstance(weight, GGUFWeight) and group >= weight.shape[0]:
        return kind, "channel"
    return kind, "group" if group % 16 == 0 else "element"


def _group(b: Tensor | Operand) -> int:
    if isinstance(b, Tensor):
        return 1
    return GGUF_GROUP if isinstance(b.weight, GGUFWeight) else b.weight.group


def _mode(call: Operands, per: str) -> tuple[str, bool, bool]:
    """MODE, A_WIDE and B_WIDE: which elements are given to the matrix units, and how.

    Of results that are wider than 16 bits every bit counts, so wide elements are multiplied in float32.
    """
    a, b, (a_prologue, b_prologue, _) = call.a, call.b, call.functions
    exact = isinstance(b, Operand) and per in ("channel", "group")
    b_dtype = a.dtype if exact else b.dtype
    a_wide = a.dtype not in HALVES or a_prologue is not None
    b_wide = (not exact and (isinstance(b, Operand) or b.dtype not in HALVES)) or b_prologue is not None
    if (not a_wide and exact) or (not (a_wide or b_wide) and a.dtype is b_dtype):
        return "half", False, False
    narrow = _are_narrow(call.outs) and not HALVES.isdisjoint((a.dtype, b.dtype))
    if not narrow:
        return "full", True, True
    # Halves are bfloat16: a float16 number is the sum of two of those.
    return "split", a_wide or a.dtype is torch.float16, b_wide or (not exact and b_dtype is torch.float16)


def _are_narrow(outs: Sequence[Tensor]) -> bool:
    return all(out.dtype in HALVES for out in outs)


def _is_asymmetric(b: Tensor | Operand) -> bool:
    return isinstance(b, Operand) and not isinstance(b.weight, GGUFWeight) and b.weight.zero is not None


# ---------------------------------------------------------------------------- arguments


def _weight(b: Tensor | Operand) -> tuple[Any, ...] | None:
    """A packed weight as :mod:`torchhal.portable.matmul_weights` has it."""
    if isinstance(b, Tensor):
        return None
    weight = b.weight
    if isinstance(weight, GGUFWeight):
        return weight.data, None, None, GGUF_GROUP, weight.shape[1], weight.data.shape[1]
    return weight.data, weight.scale, weight.zero, weight.group, weight.shape[1], 0


def _batches(a: Tensor, b: Tensor | Operand, batch: Sequence[int]) -> tuple[Any, Any, Any]:
    """Sizes of the batch, and the strides of each operand along it; dimensions that lie one after the other are joined."""
    if not batch:
        return (1,), (0,), (0,)
    strides = [a.expand(*batch, *a.shape[-2:]).stride()[:-2]]
    strides.append(
        b.expand(*batch, *b.shape[-2:]).stride()[:-2] if isinstance(b, Tensor) else (0,) * len(batch)
    )
    joined: list[tuple[int, int, int]] = []
    for size, of_a, of_b in zip(batch, *strides, strict=True):
        if joined and joined[-1][1:] == (of_a * size, of_b * size):
            joined[-1] = (joined[-1][0] * size, of_a, of_b)
        else:
            joined.append((size, of_a, of_b))
    sizes, a_steps, b_steps = zip(*joined, strict=True)
    return sizes, a_steps, b_steps


def _descriptor(tensor: Tensor, rows: int, columns: int, wanted: bool) -> tuple[Any, str]:
    """What fetches tiles of a matrix, and which way: ``rows`` as it is, ``columns`` of its transpose; ``""`` for nothing."""
    if not wanted or tensor.dim() != 2:
        return None, ""
    for matrix, block, way in ((tensor, (rows, columns), "rows"), (tensor.mT, (columns, rows), "columns")):
        if describable(matrix):
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(tensor, list(matrix.shape), list(matrix.stride()), list(block)), way
    return None, ""


def _printed(function: Function | None, entries: int, extents: tuple[int, int]) -> Any:
    """A function as the kernels call it: of (value, batch, row, col), compiled in."""
    if function is None:
        return None
    graph = _of_places(function.graph)
    direct = printer.direct_gathers(graph, (0, entries, *extents), function.tensors)
    return printer.function(graph, printer.is_wide(function.tensors), direct)


_PLACES: Final = tuple((name, torch.int32) for name in ("batch", "row", "col"))


def _of_places(graph: Graph) -> Graph:
    if len(graph.inputs) > 1:
        return graph
    builder = GraphBuilder(((graph.inputs[0].name, graph.inputs[0].dtype), *_PLACES), graph.captured)
    ids = builder.import_nodes(graph, [builder.input(0)])
    return builder.finish([ids[i] for i in graph.outputs])


def _finish_tile(work: Work) -> tuple[int, int]:
    """Rows and columns of a tile that adds parts of the sum: about 1024 elements."""
    rows = min(16, 1 << (work.rows - 1).bit_length())
    return rows, 1024 // rows
