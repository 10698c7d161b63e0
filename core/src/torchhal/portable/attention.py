"""Attention by the portable Triton kernels: which problems they serve, and how a call is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from torchhal._caches import Bounded
from torchhal.operands import AttentionOperands, empty_output
from torchhal.portable import gradients, unavailable
from torchhal.portable.backward import Backward
from torchhal.portable.engine import Engine
from torchhal.portable.fitting import fitting, on_device
from torchhal.portable.launch import Launcher
from torchhal.portable.replay import MOST, Recording, keep, kind_of, tensors_of
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
        attend = forward(replace(problem, return_lse=True), tuning, engine)
        return gradients.differentiable(gradients.Passes(attend, Backward(problem, tuning, engine)), problem)
    return forward(problem, tuning, engine)


def forward(problem: AttentionProblem, tuning: Tuning, engine: Engine | None = None) -> Run:
    """:func:`runner` on tensors whose gradients nobody wants."""
    known = {False: tuning.prefill(problem), True: tuning.decode(problem)}
    launcher = Launcher(problem, tuning.precision)
    recordings: dict[Any, Recording] = Bounded(MOST)

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
        keep(recordings, kind, recording)

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
