"""Attention by the portable Triton kernels: which problems they serve, and how a call is launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.operands import AttentionOperands, empty_output
from torchhal.portable import gradients, unavailable
from torchhal.portable.engine import Engine
from torchhal.portable.launch import Launcher
from torchhal.portable.replay import MOST, Recording, kind_of, tensors_of
from torchhal.portable.shapes import Shape, shape_of
from torchhal.portable.tiles import PLAIN, Tiles, Tuning
from torchhal.problems import AttentionClaims, AttentionProblem, Decline

Run = Callable[..., Any]

CLAIMS: Final = AttentionClaims(
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    layouts=frozenset({"dense", "varlen", "paged"}),
    causal=True,
    boolean_mask=True,
    additive_mask=True,
    gqa=True,
    value_head_size=True,
    lse=True,
    score_mod=True,
    mask_mod=True,
    captured_tensors=True,
    dropout=True,
    backward=True,
)
"""What the kernels do; a backend claims of it what it has tested on its hardware."""

LARGEST_HEAD: Final = 576
"""Of queries and keys, or of values."""
DECODE_ROWS: Final = 64
"""Up to so many rows of a key head, over all query heads that share it, are decoding."""
SHORTEST_SPLIT: Final = 256
"""Keys below which another program costs more than it saves."""
MOST_SPLITS: Final = 128


def decline(problem: AttentionProblem) -> Decline | None:
    """Why the kernels do not serve a problem that :data:`CLAIMS` cover, or None."""
    missing = unavailable()
    if missing is not None:
        return missing
    widest = max(problem.head_size, problem.value_head_size)
    if widest > LARGEST_HEAD:
        return Decline(
            "head_size", f"a head size of {widest} is not served; the kernels go up to {LARGEST_HEAD}"
        )
    if problem.value_head_size == 0:
        return Decline("head_size", "values without elements are not served")
    if problem.layout == "varlen" and problem.block_size is not None:
        return Decline("varlen_block_mask", "a BlockMask over packed sequences is not served")
    if problem.layout == "paged" and problem.block_size is not None and gradients.are_wanted(problem):
        return Decline("paged_block_mask_gradient", "gradients through a BlockMask over pages are not served")
    return None


def runner(problem: AttentionProblem, tuning: Tuning = PLAIN, engine: Engine | None = None) -> Run:
    """The ``run`` of a Plan, as :func:`torchhal.hookspecs.torchhal_attention` has it. Needs Triton.

    Args:
        problem: what :func:`decline` lets pass.
        tuning: what depends on the hardware.
        engine: who computes the calls that it serves.
    """
    if gradients.are_wanted(problem):
        return gradients.differentiable(passes(problem, tuning, engine), problem)
    return forward(problem, tuning, engine)


def forward(problem: AttentionProblem, tuning: Tuning, engine: Engine | None = None) -> Run:
    """:func:`runner` on tensors whose gradients nobody wants."""
    known = {False: tuning.prefill(problem), True: tuning.decode(problem)}
    launcher = Launcher(problem, tuning.precision)
    recordings: dict[Any, Recording] = {}

    def first(
        kind: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        operands: AttentionOperands,
        out: Tensor,
        lse: Tensor,
        written: bool,
    ) -> None:
        """Serve a call of a kind that was not seen before, and record it; or mend a result that an engine has written."""
        shape = shape_of(problem, query, key, operands)
        decode = not written and is_decode(shape, problem, operands)
        parts = splits(shape, known[decode], tuning) if decode else 0
        tensors = (query, key, value, attn_mask, scale, operands, out, lse)
        recording = None if kind is None else Recording()
        known[decode] = fitting(launcher, known[decode], shape, parts, *tensors, recording, written)
        if recording is not None and recording.usable:
            recording.release()
            if len(recordings) >= MOST:
                recordings.clear()
            recordings[kind] = recording

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        operands: AttentionOperands | None,
    ) -> Any:
        written = engine is not None and bool(query.numel()) and engine.serves(query, key, scale)
        if written:
            assert engine is not None
            out, lse = engine.forward(query, key, value, scale)
        else:
            out = empty_output(query, value)
            lse = query.new_empty(query.shape[:-1] if problem.return_lse else (0,), dtype=torch.float32)
        if query.numel() and (launcher.may_hide or not written):
            kind = kind_of(query, key, value, attn_mask, scale, operands)
            kind = None if kind is None else (written, *kind)
            with on_device(query):
                found = recordings.get(kind)
                if found is None:
                    first(kind, query, key, value, attn_mask, scale, operands or _NOTHING, out, lse, written)
                else:
                    parts = query.new_empty(found.workspace, dtype=torch.float32) if found.workspace else None
                    others = () if operands is None else tensors_of(operands)
                    found.replay((query, key, value, out, lse, parts, *others))
        return (out, lse) if problem.return_lse else out

    return run


_NOTHING: Final = AttentionOperands()


def passes(problem: AttentionProblem, tuning: Tuning, engine: Engine | None = None) -> gradients.Passes:
    """Both directions of a problem."""
    attend = forward(replace(problem, return_lse=True), tuning, engine)
    launcher = gradients.GradientLauncher(problem, tuning.precision)
    known = [tuning.query_gradient(problem), tuning.key_gradient(problem)]

    def backward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        operands: AttentionOperands,
        out: Tensor,
        lse: Tensor,
        above: Tensor,
        lse_above: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pages, lengths = (key, value), None
        if problem.layout == "paged":
            assert operands.page_table is not None and operands.seq_lens is not None
            lengths = operands.seq_lens.contiguous()
            key, value = (gradients.out_of_pages(tensor, operands.page_table) for tensor in pages)
        pull = None if engine is None or not engine.serves(query, key, scale) else engine.backward
        if pull is not None and query.numel():
            found = pull(query, key, value, scale, out, lse, above, lse_above)
            if not launcher.may_hide:
                return found
        else:
            pull = None
            kind = torch.float32 if problem.layout == "paged" else None
            found = (
                torch.empty_like(query),
                torch.empty_like(key, dtype=kind),
                torch.empty_like(value, dtype=kind),
            )
        with on_device(query):
            delta = launcher.sum_rows(out, above, lse, lse_above)
            shape = (
                gradients.dense_shape(query, key)
                if lengths is not None
                else shape_of(problem, query, key, operands)
            )
            given = gradients.Arguments(
                query, key, value, attn_mask, scale, operands, above, lse, delta, shape, lengths
            )
            if query.numel():
                known[0] = fitting(launcher.query_gradient, known[0], given, found[0], pull is not None)
            if found[1].numel() or found[2].numel():
                known[1] = fitting(launcher.key_gradients, known[1], given, *found[1:], pull is not None)
        if lengths is not None:
            assert operands.page_table is not None
            key, value = (
                gradients.into_pages(x, like, operands.page_table)
                for x, like in zip(found[1:], pages, strict=True)
            )
            return found[0], key, value
        return found

    return gradients.Passes(attend, backward)


def fitting(launcher: Callable[..., None], tiles: Tiles, *arguments: Any) -> Tiles:
    """Launch with these tiles or, where the device has too little memory for them, with the largest that fit.

    How much a kernel needs is known once its user's functions are compiled into it; so the tiles are tried.
    """
    while True:
        try:
            launcher(tiles, *arguments)
        except Exception as error:
            found = tiles.smaller() if is_out_of_resources(error) else None
            if found is None:
                raise
            tiles = found
        else:
            return tiles


def is_out_of_resources(error: Exception) -> bool:
    """Whether a kernel was refused for the memory or the registers that it asks for."""
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the current one, on which Triton launches."""
    if tensor.device.type == "cpu":
        return _NOWHERE
    module = _module_of(tensor.device.type)
    if module.current_device() == tensor.device.index:
        return _NOWHERE
    return module.device(tensor.device)  # type: ignore[no-any-return]


_NOWHERE: Final = nullcontext()
_module_of = functools.cache(torch.get_device_module)


def is_decode(shape: Shape, problem: AttentionProblem, operands: AttentionOperands) -> bool:
    """Whether the query heads of a key head go into the rows of one tile.

    Not with a BlockMask, whose lists each have rows of one block and may have heads of their own.
    """
    few = shape.rows * shape.group <= DECODE_ROWS
    return few and problem.layout != "varlen" and operands.kv_num_blocks is None


def splits(shape: Shape, tiles: Tiles, tuning: Tuning) -> int:
    """Into how many parts the keys are split in decoding, so that the device is busy; 1 for none."""
    programs = shape.batch * shape.key_heads * -(-shape.rows * shape.group // tiles.rows)
    wanted = -(-tuning.programs // programs)
    return max(1, min(wanted, shape.keys // SHORTEST_SPLIT, MOST_SPLITS))
