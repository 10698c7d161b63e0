"""How a call of attention becomes a launch of the portable kernels."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands
from torchhal.portable import printer
from torchhal.portable.tiles import Tiles, padded
from torchhal.problems import AttentionProblem

WIDEST_DESCRIPTOR: Final = 256
"""Elements of a row of a tile that a tensor descriptor can fetch."""

# ---------------------------------------------------------------------------- shapes


class Shape(NamedTuple):
    """The lengths of one call."""

    batch: int
    heads: int
    key_heads: int
    rows: int
    """Of a sequence; of all of them where they are packed."""
    keys: int
    """Of a sequence, at most."""

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.heads // self.key_heads


def shape_of(problem: AttentionProblem, query: Tensor, key: Tensor, operands: AttentionOperands) -> Shape:
    """The lengths of a call in any layout."""
    if problem.layout == "varlen":
        if operands.cu_seqlens_q is None or operands.cu_seqlens_k is None:
            raise InvalidProblem(
                "variable-length attention needs cu_seqlens_q and cu_seqlens_k, and at least one is absent"
            )
        if operands.cu_seqlens_q.shape[0] < 2:
            raise InvalidProblem(
                f"cu_seqlens_q must end at the number of tokens, {query.shape[0]}; it is 0 alone"
            )
        rows, heads, _ = query.shape
        return Shape(operands.cu_seqlens_q.shape[0] - 1, heads, key.shape[1], rows, key.shape[0])
    batch, heads, rows, _ = query.shape
    if problem.layout == "paged":
        if operands.page_table is None or operands.seq_lens is None:
            raise InvalidProblem("paged attention needs page_table and seq_lens, and at least one is absent")
        return Shape(batch, heads, key.shape[1], rows, operands.page_table.shape[1] * key.shape[2])
    return Shape(batch, heads, key.shape[1], rows, key.shape[2])


# ---------------------------------------------------------------------------- launches


class Launcher:
    """The kernels of one problem: what is compiled into them, and what a call gives them."""

    def __init__(self, problem: AttentionProblem, precision: str) -> None:
        self.problem = problem
        self.precision = precision
        self.mask_kind = _mask_kind(problem)
        self.natural = problem.query_dtype is torch.float32
        self.widths = (padded(problem.head_size), padded(problem.value_head_size))
        self.describes = problem.layout == "dense" and max(self.widths) <= WIDEST_DESCRIPTOR
        self._constants: dict[tuple[Any, ...], dict[str, Any]] = {}

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
    ) -> None:
        """Compute into ``out`` and ``lse``.

        Args:
            tiles: how the work is cut.
            shape: the lengths of the call.
            split: parts of the keys in decoding; 0 for a tile of rows of one head.
            query, key, value, attn_mask, scale, operands: as ``Plan.run`` has them.
            out: (..., Ev) in the query's dtype.
            lse: float32, without elements where it is not asked for.
        """
        from torchhal.portable import attention_kernels as kernels

        problem, parts = self.problem, None
        count = self._tiles(tiles, shape, operands, split > 0)
        heads = shape.key_heads if split else shape.heads
        programs = count * heads * (1 if problem.layout == "varlen" else shape.batch) * max(split, 1)
        rows = shape.batch * shape.heads * shape.rows
        if split > 1:
            # Sums of values of each part of the keys, (parts, rows, Ev); behind them peaks and totals, (parts, rows, 2).
            parts = query.new_empty(split * rows * (out.shape[-1] + 2), dtype=torch.float32)
        extra = 1.0 / (1.0 - operands.dropout_p) if operands.dropout_p < 1.0 else 1.0
        o_strides, lse_strides = _strides(out), _row_strides(lse, problem)
        kernels.attention_kernel[(programs,)](
            query, key, value, *self._descriptors(tiles, key, value), out, lse, parts, rows,
            _strides(query), _strides(key), _strides(value), o_strides, lse_strides,
            _mask(attn_mask, self.natural), printer.flatten(operands.captured), printer.flatten(operands.mask_captured),
            *self._blocks(tiles, shape, operands), self._sequences(query, key, operands), _dropout(operands),
            shape.batch, heads, shape.group, shape.rows, shape.keys, count, max(split, 1), scale, extra,
            **self._compiled_in(tiles, shape, operands, split, scale > 0),
        )  # fmt: skip
        if parts is not None:
            kernels.merge_kernel[(rows,)](
                parts, out, lse, o_strides, lse_strides, shape.heads, shape.rows, split, rows, extra,
                EV=problem.value_head_size, EV_PAD=self.widths[1], SPLITS=padded(split), LSE=problem.return_lse, NATURAL=self.natural,
            )  # fmt: skip

    def _compiled_in(
        self, tiles: Tiles, shape: Shape, operands: AttentionOperands, split: int, positive: bool
    ) -> dict[str, Any]:
        """What distinguishes one compiled kernel of the problem from another; looked up, for it takes time to make."""
        wide = printer.is_wide(operands.captured), printer.is_wide(operands.mask_captured)
        blocks = operands.kv_num_blocks is not None, operands.full_kv_num_blocks is not None
        even = blocks[0] and self._is_even(tiles, shape)
        variant = (tiles, split > 0, split > 1, blocks, even, positive, wide)
        found = self._constants.get(variant)
        if found is None:
            found = self._constants[variant] = self._make_constants(*variant)
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
    ) -> dict[str, Any]:
        problem = self.problem
        score_mod, mask_mod = (
            None if graph is None else printer.function(graph, is_wide)
            for graph, is_wide in zip((problem.score_mod, problem.mask_mod), wide, strict=True)
        )
        # Whether a row may be kept from a key that another row of its tile sees.
        may_hide = problem.is_causal or self.mask_kind or mask_mod or score_mod or blocks[0]
        return {
            "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys, "E_PAD": self.widths[0], "EV_PAD": self.widths[1],
            "LAYOUT": problem.layout, "PAGE": problem.page_size or 0, "PACKED": packed, "SPLIT": split,
            "BLOCKS": blocks[0], "FULL": blocks[1], "EVEN": even, "LSE": problem.return_lse, "EXACT": bool(may_hide),
            "CAUSAL": problem.is_causal, "MASK": self.mask_kind, "score_mod": score_mod, "mask_mod": mask_mod,
            "FOLD": score_mod is None and self.mask_kind != "additive" and positive and not self.natural,
            "NATURAL": self.natural, "PRECISION": self.precision,
            "E": problem.head_size, "EV": problem.value_head_size, "DROPOUT": problem.dropout, **tiles.options(),
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

    def _tiles(self, tiles: Tiles, shape: Shape, operands: AttentionOperands, packed: bool) -> int:
        """Tiles of the rows of one head, enough for any data."""
        if self.problem.layout == "varlen":
            return shape.rows // tiles.rows + shape.batch
        if operands.kv_num_blocks is not None:
            block, _ = self._block_size()
            # Positions of the paged layout start anywhere in a block.
            blocks = -(-shape.rows // block) + (self.problem.layout == "paged")
            return blocks * -(-min(block, self._positions(shape)) // tiles.rows)
        return -(-shape.rows * (shape.group if packed else 1) // tiles.rows)

    def _positions(self, shape: Shape) -> int:
        """Positions that query rows may have."""
        return max(shape.rows, shape.keys if self.problem.layout == "paged" else 0, 1)

    def _block_size(self) -> tuple[int, int]:
        if self.problem.block_size is None:
            raise InvalidProblem(
                "a BlockMask needs problem.block_size, (query rows, keys) of a block; it is None"
            )
        return self.problem.block_size

    def _blocks(self, tiles: Tiles, shape: Shape, operands: AttentionOperands) -> tuple[Any, Any, Any]:
        """The lists of the partial and of the full blocks, and the numbers that say where a block lies."""
        if operands.kv_num_blocks is None or operands.kv_indices is None:
            return None, None, None
        rows, keys = self._block_size()
        covered = shape.rows if self.problem.layout == "dense" else 0  # of pages only the device knows
        check_cover(operands.kv_indices, rows, shape, covered)
        partial = _block_list(operands.kv_num_blocks, operands.kv_indices)
        full = None
        if operands.full_kv_num_blocks is not None and operands.full_kv_indices is not None:
            full = _block_list(operands.full_kv_num_blocks, operands.full_kv_indices)
        row_tiles = -(-min(rows, self._positions(shape)) // tiles.rows)
        key_tiles = -(-min(keys, max(shape.keys, 1)) // tiles.keys)
        columns = min(-(-shape.keys // keys), operands.kv_indices.shape[-1])
        return partial, full, (rows, keys, row_tiles, key_tiles, operands.kv_indices.shape[2], columns)

    def _is_even(self, tiles: Tiles, shape: Shape) -> bool:
        """Whether tiles of a BlockMask's blocks hold no key beyond the block or the sequence."""
        width = self._block_size()[1]
        return self.problem.layout == "dense" and width % tiles.keys == 0 and shape.keys % width == 0

    def _sequences(self, query: Tensor, key: Tensor, operands: AttentionOperands) -> Any:
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


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can be made: rows that are contiguous, and everything at multiples of 16 bytes.

    A stride of 0 is no step that a descriptor can take.
    """
    return all(
        tensor.numel() > 0
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(s > 0 and s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:-1])
        for tensor in tensors
    )


def check_cover(indices: Tensor, rows: int, shape: Shape, positions: int) -> None:
    """Refuse a BlockMask that is not for these sequences, heads and query positions.

    Raises:
        InvalidProblem: says for how many it has to be, and is.
    """
    masks, heads, blocks = indices.shape[:3]
    if positions > blocks * rows:
        covers = f"{blocks} blocks of {rows} rows"
        raise InvalidProblem(f"the BlockMask must cover every query position, {positions}; it has {covers}")
    if masks not in (1, shape.batch) or heads not in (1, shape.heads):
        expected = f"1 or {shape.batch} sequences and 1 or {shape.heads} query heads"
        raise InvalidProblem(f"the BlockMask must be for {expected}; it is for {masks} and {heads}")


def _mask(mask: Tensor | None, disguised: bool) -> Any:
    """The pointer of ``attn_mask`` and its strides along (B, Hq, L, S), 0 where it broadcasts.

    Triton compiles one kernel for a stride of 1 or a multiple of 16 and another for the rest, and lays float32 sums out
    over threads as the loads of the mask are: the same mask with other strides would give other last bits. Disguised as
    odd numbers, strides are all alike.
    """
    if mask is None:
        return None
    mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    mask = mask[(None,) * (4 - mask.dim())]
    steps = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return (mask, *(2 * step + 3 if disguised else step for step in steps))


def _block_list(counts: Tensor, indices: Tensor) -> tuple[Any, ...]:
    """Strides and pointers of one list of blocks; those of a dimension of size 1 are 0."""
    lists = []
    for tensor, kept in ((counts, 3), (indices, 4)):
        steps = [s if size > 1 else 0 for size, s in zip(tensor.shape[:2], tensor.stride()[:2], strict=True)]
        lists += [*steps, *tensor.stride()[2:kept], tensor]
    return tuple(lists)


def _mask_kind(problem: AttentionProblem) -> str | None:
    if problem.mask_dtype is None:
        return None
    return "boolean" if problem.mask_dtype is torch.bool else "additive"


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Along (B or page, H, L or slot, E); those of packed tensors (T, H, E) have no batch."""
    if tensor.dim() == 4:
        return tensor.stride()
    token, head, element = tensor.stride()
    return 0, head, token, element


def _row_strides(lse: Tensor, problem: AttentionProblem) -> tuple[int, ...]:
    """Those of the LSE along (B, H, L)."""
    if not problem.return_lse:
        return 0, 0, 0
    if problem.layout != "varlen":
        return lse.stride()
    token, head = lse.stride()
    return 0, head, token


def _dropout(operands: AttentionOperands) -> Any:
    """The seed and the word below which a probability is dropped."""
    if operands.dropout_p == 0.0:
        return None
    if operands.seed is None:
        raise InvalidProblem("attention with dropout needs a seed, a 0-dim int64 tensor, and there is none")
    return operands.seed, round(operands.dropout_p * 2**32)
