"""The backward pass of attention as a call: who computes it, its workspace, and its launches as they are recorded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from torchhal._caches import Bounded
from torchhal.operands import AttentionOperands
from torchhal.portable.engine import Engine
from torchhal.portable.fitting import fitting, on_device
from torchhal.portable.gradients import (
    Arguments,
    GradientLauncher,
    dense_shape,
    into_pages,
    out_of_pages,
)
from torchhal.portable.replay import ALIGNMENT, MOST, Recording, kind_of, tensors_of
from torchhal.portable.shapes import shape_of
from torchhal.portable.tiles import Tuning
from torchhal.problems import AttentionProblem

Gradients = tuple[Tensor, Tensor, Tensor]


class Backward:
    """Gradients of query, key and value of one problem; what :class:`~torchhal.portable.gradients.Passes` calls."""

    def __init__(self, problem: AttentionProblem, tuning: Tuning, engine: Engine | None) -> None:
        self.problem = problem
        self.engine = engine
        self.launcher = GradientLauncher(problem, tuning.precision)
        self.tiles = [tuning.query_gradient(problem), tuning.key_gradient(problem)]
        self.recordings: dict[Any, _Recorded] = Bounded(MOST)

    def __call__(
        self,
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
    ) -> Gradients:
        """The gradients, laid out like their tensors; see :class:`~torchhal.portable.gradients.Passes`."""
        if self.problem.layout == "paged":
            return self._paged(query, key, value, attn_mask, scale, operands, out, lse, above, lse_above)
        pull = self._engine(query, key, scale)
        found: Gradients
        if pull is None:
            found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        else:
            found = pull(query, key, value, scale, out, lse, above, lse_above)
            if not self.launcher.may_hide:
                return found
        written = pull is not None
        kind = kind_of(query, key, value, attn_mask, scale, operands)
        if kind is not None:
            kind = _with_results(kind, written, (out, lse, above, lse_above))
        tensors = (query, key, value, out, lse, above, lse_above, *found, *tensors_of(operands))
        with on_device(query):
            recorded = self.recordings.get(kind)
            if recorded is not None:
                recorded.replay(tensors)
                return found
            making = _Making(self.launcher, tensors)
            tiles = list(self.tiles)
            given = (query, key, value, attn_mask, scale, operands, above, lse)
            self._launch(making.launcher, given, out, lse_above, found, None, written)
            if kind is not None and making.usable and tiles == self.tiles:
                self.recordings[kind] = making.recorded()
        return found

    def _engine(self, query: Tensor, key: Tensor, scale: float) -> Any:
        """The engine's backward pass, where it serves the call."""
        engine = self.engine
        served = engine is not None and query.numel() and engine.serves(query, key, scale)
        return engine.backward if served and engine is not None else None

    def _launch(
        self,
        launcher: GradientLauncher,
        given: tuple[Any, ...],
        out: Tensor,
        lse_above: Tensor | None,
        found: Gradients,
        lengths: Tensor | None,
        written: bool = False,
    ) -> None:
        """Compute into ``found``, or where an engine has ``written`` there, mend it."""
        query, key, value, attn_mask, scale, operands, above, lse = given
        delta = launcher.sum_rows(out, above, lse, lse_above)
        shape = shape_of(self.problem, query, key, operands) if lengths is None else dense_shape(query, key)
        arguments = Arguments(
            query, key, value, attn_mask, scale, operands, above, lse, delta, shape, lengths
        )
        if query.numel():
            self.tiles[0] = fitting(launcher.query_gradient, self.tiles[0], arguments, found[0], written)
        if found[1].numel() or found[2].numel():
            self.tiles[1] = fitting(launcher.key_gradients, self.tiles[1], arguments, *found[1:], written)

    def _paged(
        self,
        query: Tensor,
        key_pages: Tensor,
        value_pages: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        operands: AttentionOperands,
        out: Tensor,
        lse: Tensor,
        above: Tensor,
        lse_above: Tensor | None,
    ) -> Gradients:
        """Keys and values out of their pages, and their gradients, in float32, into them."""
        table, lengths = operands.page_table, operands.seq_lens
        assert table is not None and lengths is not None
        pages = key_pages, value_pages
        key, value = (out_of_pages(tensor, table) for tensor in pages)
        wide = torch.float32
        found = (
            torch.empty_like(query),
            torch.empty_like(key, dtype=wide),
            torch.empty_like(value, dtype=wide),
        )
        given = (query, key, value, attn_mask, scale, operands, above, lse)
        with on_device(query):
            self._launch(self.launcher, given, out, lse_above, found, lengths.contiguous())
        of_key, of_value = (into_pages(x, like, table) for x, like in zip(found[1:], pages, strict=True))
        return found[0], of_key, of_value


def _with_results(
    kind: tuple[Any, ...], written: bool, tensors: tuple[Tensor | None, ...]
) -> tuple[Any, ...] | None:
    """The kind of a call together with what the launches depend on of its results and their gradients; None as of ``kind_of``."""
    there = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.data_ptr() % ALIGNMENT for tensor in there):
        return None
    described = tuple(None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors)
    return (written, described, *kind)


class _Making:
    """A recording in the making: a launcher whose launches are recorded, with the workspace that they are given."""

    def __init__(self, launcher: GradientLauncher, tensors: tuple[Tensor | None, ...]) -> None:
        self.tensors = tensors
        self.recording = Recording()
        self.launcher = copy.copy(launcher)
        self.launcher.rooms = []
        self._start = launcher.start
        self.launcher.start = self._recorded_start

    def _recorded_start(self, kernel: Any, grid: Any, arguments: tuple[Any, ...], constants: Any) -> Any:
        again = self._start(kernel, grid, arguments, constants)
        self.recording.add(again, arguments, (*self.tensors, *(self.launcher.rooms or ())))
        return again

    @property
    def usable(self) -> bool:
        """Whether every tensor of the launches was found again."""
        return self.recording.usable

    def recorded(self) -> _Recorded:
        """What replays the launches; nothing of this call is kept alive by it."""
        self.recording.release()
        rooms = [(room.shape, room.stride(), room.dtype) for room in self.launcher.rooms or ()]
        return _Recorded(self.recording, rooms)


class _Recorded:
    """The launches of a backward pass, and the workspace that another call needs for them."""

    def __init__(self, recording: Recording, rooms: list[tuple[Any, Any, torch.dtype]]) -> None:
        self.recording = recording
        self.rooms = rooms

    def replay(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Start the kernels on other tensors."""
        query = tensors[0]
        assert query is not None
        made = [query.new_empty_strided(*of, dtype=dtype) for *of, dtype in self.rooms]
        self.recording.replay((*tensors, *made))
