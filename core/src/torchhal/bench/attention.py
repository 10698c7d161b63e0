"""``torchhal bench attention``: our backends, torch's own attention and its variants, on the same inputs, in turns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from torchhal._text import dtype_name
from torchhal.bench import accuracy, cases
from torchhal.bench.cases import Case, Inputs
from torchhal.bench.ceilings import Ceilings
from torchhal.bench.timing import Effort, Timing, interleaved, synchronizer
from torchhal.problems import Decline
from torchhal.registry import REFERENCE, Backend

SDPA: Final = "torch sdpa"
SDPA_DENSE: Final = "torch sdpa, dense mask"
FLEX: Final = "torch flex, compiled"

_MOST_SCORES: Final = 1 << 30
"""Bytes of scores past which the reference, which keeps them all, is not run."""

Attention = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One candidate on one case."""

    case: Case
    candidate: str
    ours: bool
    """Whether it is a backend of torchhal, not a peer."""
    timing: Timing | None = None
    error: float = 0.0
    """Largest absolute error at the checked rows."""
    tolerance: float = 0.0
    not_run: str = ""
    """Why there is no time; empty if there is one."""

    @property
    def passed(self) -> bool:
        """Whether the result was right."""
        return bool(self.not_run) or self.error <= self.tolerance


@dataclass(frozen=True)
class CaseResult:
    """All candidates on one case."""

    case: Case
    rows: list[Row] = field(default_factory=list)

    def timing(self, candidate: str) -> Timing | None:
        """The times of a candidate, None if it was not run."""
        return next((row.timing for row in self.rows if row.candidate == candidate), None)

    def speedup(self, row: Row, best: bool = False) -> float | None:
        """How many times faster than torch's scaled_dot_product_attention a candidate is; None if it is wrong.

        By medians, or by the best times, which other programs on the machine disturb less.
        """
        peer = self.timing(SDPA)
        if peer is None or row.timing is None or not row.passed:
            return None
        return peer.best / row.timing.best if best else peer.median / row.timing.median

    def to_dict(self, limits: Ceilings) -> dict[str, Any]:
        """Numbers for JSON."""
        case = self.case
        described = {
            "dtype": dtype_name(case.dtype),
            "causal": case.causal,
            "masked": case.masked,
            **case.shape,
        }
        return {
            "case": case.name,
            **described,
            "flops": case.flops,
            "bytes": case.bytes,
            "candidates": [self._row_dict(row, limits) for row in self.rows],
        }

    def _row_dict(self, row: Row, limits: Ceilings) -> dict[str, Any]:
        start: dict[str, Any] = {"candidate": row.candidate, "ours": row.ours}
        if row.timing is None:
            return {**start, "not_run": row.not_run}
        seconds = row.timing.median
        wrong = row.error if row.error != float("inf") else None
        return {
            **start,
            "seconds": row.timing.to_dict(),
            "speedup_over_sdpa": self.speedup(row),
            "speedup_over_sdpa_by_best": self.speedup(row, best=True),
            "gflops": self.case.flops / seconds / 1e9,
            "gbps": self.case.bytes / seconds / 1e9,
            "compute_share": limits.compute_share(self.case.flops, seconds),
            "read_share": limits.read_share(self.case.bytes, seconds),
            "max_error": wrong,
            "tolerance": row.tolerance,
            "passed": row.passed,
        }


def measure(
    case: Case, backends: list[Backend], device: torch.device, effort: Effort, flex: bool = False
) -> CaseResult:
    """Check every candidate on one case, then time those that are right, in turns."""
    inputs = case.inputs(device)
    found = [*(_ours(case, inputs, backend) for backend in backends), *_peers(case, inputs, flex)]
    expected = accuracy.expectation(inputs, case.causal)
    checked = [_checked(case, name, call, expected, ours) for name, call, ours in found]
    calls = {
        row.candidate: call for row, (_, call, _) in zip(checked, found) if not row.not_run and callable(call)
    }
    with torch.inference_mode():
        timings = interleaved(calls, effort, synchronizer(device))
    return CaseResult(case, [_with_timing(row, timings) for row in checked])


Candidate = tuple[str, "Attention | str", bool]
"""Name, what to call or why there is nothing to call, and whether it is ours."""


def _checked(case: Case, name: str, call: Attention | str, expected: accuracy.Expectation, ours: bool) -> Row:
    if isinstance(call, str):
        return Row(case, name, ours, not_run=call)
    try:
        with torch.inference_mode():
            error = expected.error(call())
    except Exception as fault:  # a candidate that fails is a result
        return Row(
            case, name, ours, not_run=f"raised {type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
        )
    return Row(case, name, ours, None, error, expected.tolerance)


def _with_timing(row: Row, timings: dict[str, Timing]) -> Row:
    return Row(
        row.case, row.candidate, row.ours, timings.get(row.candidate), row.error, row.tolerance, row.not_run
    )


# ---------------------------------------------------------------------------- candidates


def _ours(case: Case, inputs: Inputs, backend: Backend) -> Candidate:
    problem = case.problem(inputs)
    answer = backend.ask(problem)
    if isinstance(answer, Decline):
        return backend.name, f"declined: {answer}", True
    scores = 4 * case.batch * case.heads * case.length * case.keys
    if backend.name == REFERENCE and scores > _MOST_SCORES:
        return backend.name, f"keeps all scores, {scores / 2**30:.1f} GiB here", True
    query, key, value, mask = inputs
    scale = case.head_size**-0.5
    return backend.name, functools.partial(answer.run, query, key, value, mask, scale, None), True


def _peers(case: Case, inputs: Inputs, flex: bool) -> list[Candidate]:
    query, key, value, mask = inputs
    grouped = case.heads != case.kv_heads
    sdpa = functools.partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=grouped)
    peers: list[Candidate] = [(SDPA, functools.partial(sdpa, attn_mask=mask, is_causal=case.causal), False)]
    if case.causal:
        rows = torch.arange(case.length, device=query.device).unsqueeze(1)
        dense = torch.arange(case.keys, device=query.device) <= rows
        peers.append((SDPA_DENSE, functools.partial(sdpa, attn_mask=dense), False))
    if flex:
        peers.append((FLEX, _flex(case, inputs), False))
    return peers


def _flex(case: Case, inputs: Inputs) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < case.window)

    query, key, value, _ = inputs
    mask_mod = causal if case.causal else window if case.masked else None
    block_mask = None
    if mask_mod is not None:
        block_mask = create_block_mask(mask_mod, None, None, case.length, case.keys, device=str(query.device))
    torch._dynamo.reset()  # each case compiles anew: a graph for changing shapes would be a slower one
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = case.heads != case.kv_heads
    return functools.partial(compiled, query, key, value, block_mask=block_mask, enable_gqa=grouped)


def candidates(found: dict[str, Backend], device: torch.device, only: str | None) -> list[Backend]:
    """The backends to time: the one asked for, or all for the device but the reference, if there is any."""
    if only is not None:
        return [found[only]]
    fitting = [b for b in found.values() if not b.info.device_types or device.type in b.info.device_types]
    fitting = [b for b in fitting if b.info.capabilities.attention is not None]
    better = [b for b in fitting if b.name != REFERENCE]
    return better or fitting


def select_cases(patterns: str | None, quick: bool) -> list[Case]:
    """The cases to time."""
    chosen = cases.chosen(patterns)
    return [case.quick() for case in chosen] if quick else chosen
