"""Gradients of attention by the portable Triton kernels: what autograd is told, and how the kernels are launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchhal.derivatives import first_derivatives, is_transformed
from torchhal.operands import AttentionOperands
from torchhal.pointwise import Graph, Node, differentiate
from torchhal.portable import printer
from torchhal.portable.arguments import (
    block_list,
    dropout_argument,
    kept_factor,
    mask_argument,
    ordered_lists,
    row_strides,
    strides_of,
)
from torchhal.portable.launch import Launcher, Start, start
from torchhal.portable.shapes import Shape
from torchhal.portable.tiles import Tiles, padded
from torchhal.problems import AttentionProblem
from torchhal.reference import attention as reference
from torchhal.reference.visibility import block_table

DELTA_ROWS = 32
"""Rows of a program that sums ``out * dO``: few instructions for each byte, so the number hardly matters."""


def are_wanted(problem: AttentionProblem) -> bool:
    """Whether gradients are to reach query, key or value."""
    return "backward" in problem.features


# ---------------------------------------------------------------------------- autograd


class Passes(NamedTuple):
    """The two directions of a problem, on tensors without gradients."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    """``(query, key, value, attn_mask, scale, operands)`` to output and LSE."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """``(query, key, value, attn_mask, scale, operands, out, lse, out's gradient, lse's or None)`` to the gradients of query,
    key and value."""


def differentiable(passes: Passes, problem: AttentionProblem) -> Callable[..., Any]:
    """The ``run`` of a Plan whose results autograd can follow.

    Inside the transforms of torch.func and in forward-mode differentiation, plain torch takes the place of the kernels.
    """
    plain = reference.plan(problem).run

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        operands: AttentionOperands | None,
    ) -> Any:
        if is_transformed():
            return plain(query, key, value, attn_mask, scale, operands)
        given = operands or AttentionOperands()
        out, lse = _Attention.apply(passes, query, key, value, attn_mask, scale, given)  # type: ignore[no-untyped-call]
        return (out, lse) if problem.return_lse else out

    return run


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any,
        scale: float,
        operands: Any,
    ) -> tuple[Tensor, Tensor]:
        out, lse = passes.forward(query, key, value, attn_mask, scale, operands)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rest = passes, attn_mask, scale, operands
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, above: Tensor | None, lse_above: Tensor | None) -> tuple[Any, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        passes, attn_mask, scale, operands = ctx.rest
        if above is None and lse_above is None:
            return (None,) * 7
        above = torch.zeros_like(out) if above is None else above
        with torch.no_grad():
            found = passes.backward(query, key, value, attn_mask, scale, operands, out, lse, above, lse_above)
        if torch.is_grad_enabled():  # with create_graph
            reached = [x for x in (query, key, value, above, lse_above) if x is not None]
            found = first_derivatives("these kernels", "attention", found, reached)
        return None, *found, None, None, None


# ---------------------------------------------------------------------------- launches


class Arguments(NamedTuple):
    """What both kernels read."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    scale: float
    operands: AttentionOperands
    above: Tensor
    lse: Tensor
    delta: Tensor
    shape: Shape
    lengths: Tensor | None
    """(B,) int32, of keys that were in pages."""


class GradientLauncher(Launcher):
    """The backward kernels of one problem. Keys and values of pages are given as (B, Hkv, S, E)."""

    def __init__(self, problem: AttentionProblem, precision: str, start: Start = start) -> None:
        super().__init__(problem, precision, start)
        self.rooms: list[Tensor] | None = None
        """The workspace of the launches of one call, in the order in which it was made; None where they are not recorded."""
        self.slope = None if problem.score_mod is None else slope_of(problem.score_mod)

    def sum_rows(self, out: Tensor, above: Tensor, lse: Tensor, lse_above: Tensor | None) -> Tensor:
        """delta: for each row the sum of ``out * above``, less the gradient of its LSE; float32, laid out as the LSE."""
        from torchhal.portable.backward_kernels import delta_kernel

        delta = self._room(torch.empty_like(lse))
        batch = out.shape[0] if out.dim() == 4 else 1
        rows, heads = (out.shape[2], out.shape[1]) if out.dim() == 4 else (out.shape[0], out.shape[1])
        if delta.numel():
            nothing = (0, 0, 0) if lse_above is None else row_strides(lse_above)
            grid = (-(-rows // DELTA_ROWS), heads, batch)
            arguments = (
                out, above, lse_above, lse, delta, strides_of(out), strides_of(above), nothing, row_strides(lse), rows,
            )  # fmt: skip
            self.start(delta_kernel, grid, arguments, self._summed(lse_above is not None))
        return delta

    def query_gradient(self, tiles: Tiles, given: Arguments, gradient: Tensor, written: bool = False) -> None:
        """Compute the gradient of the query into ``gradient``; where it is written, what is not finite of it again."""
        from torchhal.portable.backward_kernels import query_gradient_kernel

        shape, operands = given.shape, given.operands
        count = self.count_tiles(tiles, shape, operands, False)
        programs = count * shape.heads * (1 if self.problem.layout == "varlen" else shape.batch)
        lists = self.blocks(tiles, shape, operands)
        strange = self._strange(given, programs)
        arguments = (
            *self._tensors(given), strange, gradient, *self._strides(given), strides_of(gradient), *self._rules(given, lists),
            shape.batch, shape.heads, shape.group, shape.rows, shape.keys, count, given.scale, kept_factor(operands),
        )  # fmt: skip
        if written:
            self._find_strange(strange, programs, tiles.rows, gradient)
        constants = self._gradient_constants(tiles, given)
        self._start_both(query_gradient_kernel, programs, arguments, constants, written)

    def key_gradients(
        self, tiles: Tiles, given: Arguments, of_key: Tensor, of_value: Tensor, written: bool = False
    ) -> None:
        """Compute the gradients of keys and values into ``of_key`` and ``of_value``; where written, what is not finite again."""
        from torchhal.portable.backward_kernels import key_gradient_kernel

        shape, problem = given.shape, self.problem
        lists = self._turned_blocks(tiles, given)
        if problem.layout == "varlen":
            count = shape.keys // tiles.keys + shape.batch
        elif lists[2] is not None:
            count = lists[2][2] * lists[2][5]
        else:
            count = -(-shape.keys // tiles.keys)
        programs = count * shape.key_heads * (1 if problem.layout == "varlen" else shape.batch)
        strange = self._strange(given, programs)
        arguments = (
            *self._tensors(given), strange, of_key, of_value, *self._strides(given), strides_of(of_key), strides_of(of_value),
            *self._rules(given, lists),
            shape.batch, shape.key_heads, shape.group, shape.rows, shape.keys, count, given.scale,
            kept_factor(given.operands),
        )  # fmt: skip
        if written:
            self._find_strange(strange, programs, tiles.keys, of_key, of_value)
        constants = self._gradient_constants(tiles, given)
        self._start_both(key_gradient_kernel, programs, arguments, constants, written)

    def _strange(self, given: Arguments, programs: int) -> Tensor | None:
        """Room for each program to say that its result is not finite; None where no pair is hidden from another."""
        if not self.may_hide and given.operands.kv_num_blocks is None:
            return None
        return self._room(torch.empty(programs, dtype=torch.int32, device=given.query.device))

    def _room(self, made: Tensor) -> Tensor:
        """Workspace of one call, remembered where its launches are recorded."""
        if self.rooms is not None:
            self.rooms.append(made)
        return made

    def _find_strange(self, strange: Tensor | None, programs: int, block: int, *gradients: Tensor) -> None:
        """Say for each program's tile of some (B, H, L, E) whether one of them holds what is not finite."""
        from torchhal.portable.backward_kernels import strange_kernel

        for number, gradient in enumerate(gradients):
            _, heads, rows, size = gradient.shape
            arguments = (gradient, strides_of(gradient), strange, heads, rows, -(-rows // block))
            constants = {"BLOCK": block, "E": size, "E_PAD": padded(size), "FIRST": number == 0}
            self.start(strange_kernel, (programs,), arguments, constants)

    def _start_both(
        self,
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        written: bool,
    ) -> None:
        """The fast walks, unless their result is there, and where needed those that take out what is not finite."""
        if not written:
            self.start(kernel, (programs,), arguments, constants)
        if constants["EXACT"]:
            self.start(kernel, (programs,), arguments, {**constants, "CLEAN": True})

    def _summed(self, from_lse: bool) -> dict[str, Any]:
        size, width = self.problem.value_head_size, self.widths[1]
        return {"BLOCK": DELTA_ROWS, "EV": size, "EV_PAD": width, "FROM_LSE": from_lse}

    def _tensors(self, given: Arguments) -> tuple[Tensor, ...]:
        return given.query, given.key, given.value, given.above, given.lse, given.delta

    def _strides(self, given: Arguments) -> tuple[Any, ...]:
        tensors = (given.query, given.key, given.value, given.above)
        return (*map(strides_of, tensors), row_strides(given.lse))

    def _rules(self, given: Arguments, lists: tuple[Any, Any, Any]) -> tuple[Any, ...]:
        """Mask, captured tensors, lists of blocks, where sequences lie, and dropout."""
        operands = given.operands
        sequences = given.lengths
        if self.problem.layout == "varlen":
            sequences = self.sequences(given.query, given.key, operands)
        captured = (printer.flatten(operands.captured), printer.flatten(operands.mask_captured))
        return (
            mask_argument(given.attn_mask, self.natural),
            *captured,
            *lists,
            sequences,
            dropout_argument(operands),
        )

    def _turned_blocks(self, tiles: Tiles, given: Arguments) -> tuple[Any, Any, Any]:
        """The BlockMask's lists turned around: for each block of keys those of the rows that may see it."""
        operands, shape = given.operands, given.shape
        if operands.kv_num_blocks is None or operands.kv_indices is None:
            return None, None, None
        rows, keys = self.block_size()
        columns = -(-shape.keys // keys)
        partial = block_list(
            *ordered_lists(block_table(operands.kv_num_blocks, operands.kv_indices, columns).mT)
        )
        full = None
        if operands.full_kv_num_blocks is not None and operands.full_kv_indices is not None:
            table = block_table(operands.full_kv_num_blocks, operands.full_kv_indices, columns)
            full = block_list(*ordered_lists(table.mT))
        key_tiles = -(-min(keys, max(shape.keys, 1)) // tiles.keys)
        row_tiles = -(-min(rows, max(shape.rows, 1)) // tiles.rows)
        return partial, full, (rows, keys, key_tiles, row_tiles, operands.kv_indices.shape[2], columns)

    def _gradient_constants(self, tiles: Tiles, given: Arguments) -> dict[str, Any]:
        operands = given.operands
        wide = printer.is_wide(operands.captured), printer.is_wide(operands.mask_captured)
        blocks = operands.kv_num_blocks is not None, operands.full_kv_num_blocks is not None
        even = self.problem.layout != "varlen" and given.shape.rows % tiles.rows == 0
        if blocks[0]:
            even = even and self.block_size()[0] % tiles.rows == 0
        variant = (tiles, blocks, even, given.scale > 0, wide)
        found = self.constants.get(variant)
        if found is None:
            found = self.constants[variant] = self._make_gradient_constants(*variant)
        return found

    def _make_gradient_constants(
        self, tiles: Tiles, blocks: tuple[bool, bool], even: bool, positive: bool, wide: tuple[bool, bool]
    ) -> dict[str, Any]:
        problem = self.problem
        exact = self.may_hide or blocks[0]
        score_mod, mask_mod, slope = (
            None if graph is None else printer.function(graph, is_wide)
            for graph, is_wide in zip(
                (problem.score_mod, problem.mask_mod, self.slope), (*wide, wide[0]), strict=True
            )
        )
        return {
            "BLOCK_M": tiles.rows, "BLOCK_N": tiles.keys, "E_PAD": self.widths[0], "EV_PAD": self.widths[1],
            "LAYOUT": problem.layout, "BLOCKS": blocks[0], "FULL": blocks[1], "CAUSAL": problem.is_causal,
            "MASK": self.mask_kind, "score_mod": score_mod, "mask_mod": mask_mod, "slope": slope,
            "FOLD": score_mod is None and self.mask_kind != "additive" and positive and not self.natural,
            "PRECISION": self.precision, "E": problem.head_size, "EV": problem.value_head_size,
            "DROPOUT": problem.dropout, "NATURAL": self.natural, "EXACT": exact, "CLEAN": False, "EVEN": even, **tiles.options(),
        }  # fmt: skip


def slope_of(score_mod: Graph) -> Graph:
    """The gradient of the score, from the ``score_mod``'s inputs and the gradient of its result, a float32 number."""
    (output,), score = score_mod.outputs, score_mod.inputs[0].dtype
    if score_mod.nodes[output].dtype is not score:  # the cast that the kernels apply to the result
        nodes = (*score_mod.nodes, Node("cast", (output,), score))
        score_mod = replace(score_mod, nodes=nodes, outputs=(len(score_mod.nodes),))
    found = differentiate(score_mod).graph
    return replace(found, outputs=found.outputs[:1])


# ---------------------------------------------------------------------------- pages


def dense_shape(query: Tensor, key: Tensor) -> Shape:
    """The lengths of a call whose keys are (B, Hkv, S, E)."""
    batch, heads, rows, _ = query.shape
    return Shape(batch, heads, key.shape[1], rows, key.shape[2])


def out_of_pages(pages: Tensor, table: Tensor) -> Tensor:
    """(P, Hkv, size, E) as (B, Hkv, S, E) in the order of a page table (B, max_pages); what lies past a sequence is anything."""
    found = pages[table.clamp(0, pages.shape[0] - 1)]
    batch, count, heads, size, width = found.shape
    return found.transpose(1, 2).reshape(batch, heads, count * size, width)


def into_pages(gradient: Tensor, pages: Tensor, table: Tensor) -> Tensor:
    """The sum, for each page, of what its tokens got wherever they are read; in the order of the table."""
    batch, heads, _, width = gradient.shape
    parts = gradient.view(batch, heads, table.shape[1], pages.shape[2], width).transpose(1, 2)
    found = torch.zeros(pages.shape, dtype=gradient.dtype, device=pages.device)
    found.index_put_((table.clamp(0, pages.shape[0] - 1),), parts, accumulate=True)
    return found.to(pages.dtype)
