"""How a call of attention becomes a launch of the portable kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands
from torchhal.portable import printer
from torchhal.portable.arguments import (
    block_list,
    check_cover,
    describable,
    dropout_argument,
    kept_factor,
    mask_argument,
    mask_kind,
    row_strides,
    strides_of,
)
from torchhal.portable.replay import Recording, tensors_of
from torchhal.portable.shapes import Shape
from torchhal.portable.tiles import Tiles, padded
from torchhal.problems import AttentionProblem

WIDEST_DESCRIPTOR: Final = 256
"""Elements of a row of a tile that a tensor descriptor can fetch."""

# ---------------------------------------------------------------------------- launches


Again = Callable[..., object]
Start = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], Again]


def start(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> Again:
    """Start a kernel of Triton: its programs, what it is given and what is compiled in.

    Returns:
        What starts it again on other arguments, tensors of the same alignment and equal numbers, without asking which
        compiled kernel that needs: of the 170 us that a decode call cost a host, the asking was most (H100, Triton 3.6).
    """
    compiled = kernel[grid](*arguments, **constants)
    if compiled is None:  # by Triton's interpreter
        return lambda *others: kernel[grid](*others, **constants)
    compiled_in = [constants.get(parameter.name) for parameter in kernel.params[len(arguments) :]]
    return functools.partial(_launch, compiled, (*grid, 1, 1)[:3], compiled_in)


def _launch(compiled: Any, grid: tuple[int, ...], compiled_in: list[Any], *arguments: Any) -> None:
    """Launch a compiled kernel on the current stream: what ``compiled[grid]`` does, or less where no profiler listens."""
    if _runtime().launch_enter_hook is not None or _runtime().launch_exit_hook is not None:
        compiled[grid](*arguments, *compiled_in)
        return
    device = _driver().get_current_device()
    stream = _driver().get_current_stream(device)
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *compiled_in
    )


@functools.cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


@functools.cache
def _driver() -> Any:
    from triton.runtime import driver

    return driver.active


class Launcher:
    """The kernels of one problem: what is compiled into them, and what a call gives them."""

    def __init__(self, problem: AttentionProblem, precision: str, start: Start = start) -> None:
        self.start = start
        self.problem = problem
        self.precision = precision
        self.mask_kind = mask_kind(problem)
        self.may_hide = bool(problem.is_causal or self.mask_kind or problem.mask_mod or problem.score_mod)
        """Whether a row may be kept from a key that another row of its tile sees, by more than a BlockMask."""
        self.natural = problem.query_dtype is torch.float32
        self.widths = (padded(problem.head_size), padded(problem.value_head_size))
        self.describes = problem.layout == "dense" and max(self.widths) <= WIDEST_DESCRIPTOR
        self.constants: dict[tuple[Any, ...], dict[str, Any]] = {}

    def __call__(
        self,
        tiles: Tiles,
        shape: Shape,
        split: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        operands: AttentionOperands,
        out: Tensor,
        lse: Tensor,
        recording: Recording | None = None,
        written: bool = False,
    ) -> None:
        """Compute into ``out`` and ``lse``.

        Args:
            tiles: how the work is cut.
            shape: the lengths of the call.
            split: parts of the keys in decoding; 0 for a tile of rows of one head.
            query, key, value, attn_mask, scale, operands: as ``Plan.run`` has them.
            out: (..., Ev) in the query's dtype.
            lse: float32, without elements where it is not asked for.
            recording: where the kernels are recorded.
            written: ``out`` has a result already, of which only tiles that are not finite are computed again.
        """
        from torchhal.portable import attention_kernels as kernels

        problem, parts = self.problem, None
        count = self.count_tiles(tiles, shape, operands, split > 0)
        heads = shape.key_heads if split else shape.heads
        programs = count * heads * (1 if problem.layout == "varlen" else shape.batch) * max(split, 1)
        rows = shape.batch * shape.heads * shape.rows
        if split > 1:
            # Sums of values of each part of the keys, (parts, rows, Ev); behind them peaks and totals, (parts, rows, 2).
            parts = query.new_empty(split * rows * (out.shape[-1] + 2), dtype=torch.float32)
        extra = kept_factor(operands)
        o_strides, lse_strides = strides_of(out), row_strides(lse)
        arguments: tuple[Any, ...] = (
            query, key, value, *self._descriptors(tiles, key, value), out, lse, parts, rows,
            strides_of(query), strides_of(key), strides_of(value), o_strides, lse_strides,
            mask_argument(attn_mask, self.natural), printer.flatten(operands.captured), printer.flatten(operands.mask_captured),
            *self.blocks(tiles, shape, operands), self.sequences(query, key, operands), dropout_argument(operands),
            shape.batch, heads, shape.group, shape.rows, shape.keys, count, max(split, 1), scale, extra,
        )  # fmt: skip
        constants = self._compiled_in(tiles, shape, operands, split, scale > 0, written)
        tensors = (query, key, value, out, lse, parts, *tensors_of(operands)) if recording is not None else ()
        again = self.start(kernels.attention_kernel, (programs,), arguments, constants)
        if recording is not None:
            recording.add(again, arguments, tensors)
        if parts is not None:
            arguments = (
                parts, out, lse, o_strides, lse_strides, shape.heads, shape.rows, split, rows, extra,
            )  # fmt: skip
            again = self.start(kernels.merge_kernel, (rows,), arguments, self._merged(split))
            if recording is not None:
                recording.workspace = parts.numel()
                recording.add(again, arguments, tensors)

    def _merged(self, split: int) -> dict[str, Any]:
        return {
            "EV": self.problem.value_head_size, "EV_PAD": self.widths[1], "SPLITS": padded(split),
            "LSE": self.problem.return_lse, "NATURAL": self.natural,
        }  # fmt: skip

    def _compiled_in(
        self,
        tiles: Tiles,
        shape: Shape,
        operands: AttentionOperands,
        split: int,
        positive: bool,
        written: bool,
    ) -> dict[str, Any]:
        """What distinguishes one compiled kernel of the problem from another; looked up, for it takes time to make."""
        wide = printer.is_wide(operands.captured), printer.is_wide(operands.mask_captured)
        blocks = operands.kv_num_blocks is not None, operands.full_kv_num_blocks is not None
        even = blocks[0] and self._is_even(tiles, shape)
        variant = (tiles, split > 0, split > 1, blocks, even, positive, wide, written)
        found = self.constants.get(variant)
        if found is None:
            found = self.constants[variant] = self._make_constants(*variant)
        return found

    def _make_constants(
        self,
        tiles: Tiles,
        packed: bool,
        split: bool,
        blocks: tuple[bool, bool],
        even: bool,
        positive: bool,
        wide: tuple[bool, bool],
        written: bool,
    ) -> dict[str, Any]:
        problem = self.problem
        score_mod, mask_mod = (
            None if graph is None else printer.function(graph, is_wide)
            for graph, is_wide in zip((problem.score_mod, problem.mask_mod), wide, strict=True)
        )
        return {
            "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys, "E_PAD": self.widths[0], "EV_PAD": self.widths[1],
            "LAYOUT": problem.layout, "PAGE": problem.page_size or 0, "PACKED": packed, "SPLIT": split,
            "BLOCKS": blocks[0], "FULL": blocks[1], "EVEN": even, "LSE": problem.return_lse, "EXACT": self.may_hide or blocks[0],
            "CAUSAL": problem.is_causal, "MASK": self.mask_kind, "score_mod": score_mod, "mask_mod": mask_mod,
            "FOLD": score_mod is None and self.mask_kind != "additive" and positive and not self.natural,
            "NATURAL": self.natural, "PRECISION": self.precision,
            "E": problem.head_size, "EV": problem.value_head_size, "DROPOUT": problem.dropout, "WRITTEN": written,
            **tiles.options(),
        }  # fmt: skip

    def _descriptors(self, tiles: Tiles, key: Tensor, value: Tensor) -> tuple[Any, Any]:
        """Descriptors by which tiles of keys and values are fetched, or None for both."""
        if not (tiles.descriptors and self.describes and describable(key, value)):
            return None, None
        from triton.tools.tensor_descriptor import TensorDescriptor

        described = [
            TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, tiles.keys, width])
            for tensor, width in zip((key, value), self.widths, strict=True)
        ]
        return described[0], described[1]

    def count_tiles(self, tiles: Tiles, shape: Shape, operands: AttentionOperands, packed: bool) -> int:
        """Tiles of the rows of one head, enough for any data."""
        if self.problem.layout == "varlen":
            return shape.rows // tiles.rows + shape.batch
        if operands.kv_num_blocks is not None:
            block, _ = self.block_size()
            # Positions of the paged layout start anywhere in a block.
            blocks = -(-shape.rows // block) + (self.problem.layout == "paged")
            return blocks * -(-min(block, self._positions(shape)) // tiles.rows)
        return -(-shape.rows * (shape.group if packed else 1) // tiles.rows)

    def _positions(self, shape: Shape) -> int:
        """Positions that query rows may have."""
        return max(shape.rows, shape.keys if self.problem.layout == "paged" else 0, 1)

    def block_size(self) -> tuple[int, int]:
        if self.problem.block_size is None:
            raise InvalidProblem(
                "a BlockMask needs problem.block_size, (query rows, keys) of a block; it is None"
            )
        return self.problem.block_size

    def blocks(self, tiles: Tiles, shape: Shape, operands: AttentionOperands) -> tuple[Any, Any, Any]:
        """The lists of the partial and of the full blocks, and the numbers that say where a block lies."""
        if operands.kv_num_blocks is None or operands.kv_indices is None:
            return None, None, None
        rows, keys = self.block_size()
        covered = shape.rows if self.problem.layout == "dense" else 0  # of pages only the device knows
        check_cover(operands.kv_indices, rows, shape, covered)
        partial = block_list(operands.kv_num_blocks, operands.kv_indices)
        full = None
        if operands.full_kv_num_blocks is not None and operands.full_kv_indices is not None:
            full = block_list(operands.full_kv_num_blocks, operands.full_kv_indices)
        row_tiles = -(-min(rows, self._positions(shape)) // tiles.rows)
        key_tiles = -(-min(keys, max(shape.keys, 1)) // tiles.keys)
        columns = min(-(-shape.keys // keys), operands.kv_indices.shape[-1])
        return partial, full, (rows, keys, row_tiles, key_tiles, operands.kv_indices.shape[2], columns)

    def _is_even(self, tiles: Tiles, shape: Shape) -> bool:
        """Whether tiles of a BlockMask's blocks hold no key beyond the block or the sequence."""
        width = self.block_size()[1]
        return self.problem.layout == "dense" and width % tiles.keys == 0 and shape.keys % width == 0

    def sequences(self, query: Tensor, key: Tensor, operands: AttentionOperands) -> Any:
        """What says where sequences lie: cumulative lengths and tokens, or the table of pages and what it may name."""
        if self.problem.layout == "varlen":
            assert operands.cu_seqlens_q is not None and operands.cu_seqlens_k is not None
            starts = (operands.cu_seqlens_q.contiguous(), operands.cu_seqlens_k.contiguous())
            return (*starts, query.shape[0], key.shape[0])
        if self.problem.layout == "paged":
            assert operands.page_table is not None and operands.seq_lens is not None
            table, pages, size = operands.page_table, key.shape[0], key.shape[2]
            return (table, *table.stride(), operands.seq_lens.contiguous(), pages, table.shape[1] * size)
        return None
