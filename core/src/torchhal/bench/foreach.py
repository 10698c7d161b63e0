"""``torchhal bench foreach``: an optimizer written as one function, against torch's own, fused and not."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.bench.cases import Requirement
from torchhal.bench.timing import Effort, Timing, interleaved, synchronizer
from torchhal.foreach import foreach_map
from torchhal.registry import Backend

FUSED: Final = "torch AdamW, fused"
FOREACH: Final = "torch AdamW, foreach"
COMPILED: Final = "torch foreach_map, compiled"
RATE, DECAY, BETA1, BETA2, EPSILON = 1e-3, 1e-2, 0.9, 0.999, 1e-8
_AT_ONCE: Final = 100
"""Tensors in one compiled call: longer lists take minutes to compile, so they are served in parts."""
_TOLERANCE: Final = 2e-6
Lists = list[list[Tensor]]
"""Parameters, gradients, and two averages."""


def adamw(p: Any, g: Any, m: Any, v: Any, *changing: Any) -> Any:
    """One AdamW step of an element, as a user would write it; ``changing`` as :func:`numbers` has it."""
    shrink, rate, correction = changing
    m = m + (g - m) * (1 - BETA1)
    v = v * BETA2 + g * g * (1 - BETA2)
    return p * shrink - rate * m / (torch.sqrt(v) / correction + EPSILON), m, v


def numbers(step: int) -> tuple[float, float, float]:
    """What a step multiplies parameters by, its rate, and the second average's correction."""
    return 1 - RATE * DECAY, RATE / (1 - BETA1**step), (1 - BETA2**step) ** 0.5


@dataclass(frozen=True)
class Case:
    """Lists of equal float32 tensors, all parameters of an optimizer."""

    name: str
    count: int
    size: int
    requirements: tuple[Requirement, ...] = ()
    first: bool = False
    """Whether the first call of a function that nobody has seen is measured; a peer's is that for ``_AT_ONCE`` tensors."""

    @property
    def bytes(self) -> int:
        """Bytes to move at least: four numbers of each parameter read, three written."""
        return 28 * self.count * self.size

    def quick(self) -> Case:
        """A fiftieth of it."""
        return replace(self, count=max(2, self.count // 10), size=max(64, self.size // 5))

    def lists(self, device: torch.device) -> Lists:
        """Random tensors, the same every time; averages of zeros."""
        generator = torch.Generator().manual_seed(0)
        made = [
            [torch.randn(self.size, generator=generator).to(device) for _ in range(self.count)]
            for _ in range(2)
        ]
        return [*made, *([torch.zeros_like(t) for t in made[0]] for _ in range(2))]


CASES: Final = (
    Case(
        "adamw-20x1m", 20, 1 << 20,
        (Requirement(FUSED, 1.0), Requirement(FOREACH, 3.0), Requirement(COMPILED, 1.5)),
    ),
    Case(
        "adamw-1000x1k", 1000, 1024,
        (Requirement(FUSED, 2.0), Requirement(FOREACH, 8.0), Requirement(COMPILED, 3.0)),
    ),
    Case("first-call-2000", 2000, 64, (Requirement(COMPILED, 100.0),), first=True),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One candidate on one case."""

    case: Case
    candidate: str
    ours: bool
    timing: Timing | None = None
    error: float = 0.0
    not_run: str = ""

    @property
    def passed(self) -> bool:
        """Whether the step was right."""
        return bool(self.not_run) or self.error <= _TOLERANCE


@dataclass(frozen=True)
class Result:
    """All candidates on one case."""

    case: Case
    rows: list[Row] = field(default_factory=list)

    def ratio(self, row: Row, needed: Requirement) -> float | None:
        """How many times faster than a yardstick; None if one of them was not measured or was wrong."""
        held = next((r for r in self.rows if r.candidate == needed.against), None)
        if held is None or held.timing is None or row.timing is None or not (held.passed and row.passed):
            return None
        return needed.measured(held.timing, row.timing)

    def to_dict(self, gbps: float) -> dict[str, Any]:
        """Numbers for JSON; ``gbps``: what reading and writing together reach."""
        case = self.case
        return {
            "case": case.name, "tensors": case.count, "size": case.size, "bytes": case.bytes,
            "candidates": [self._row_dict(row, gbps) for row in self.rows],
        }  # fmt: skip

    def _row_dict(self, row: Row, gbps: float) -> dict[str, Any]:
        start = {"candidate": row.candidate, "ours": row.ours}
        if row.timing is None:
            return {**start, "not_run": row.not_run}
        ratios = {
            n.against: {"ratio": n.ratio, "measured": self.ratio(row, n)} for n in self.case.requirements
        }
        share = None if self.case.first else self.case.bytes / row.timing.median / 1e9 / gbps
        return {
            **start, "seconds": row.timing.to_dict(), "memory_share": share, "max_error": row.error,
            "passed": row.passed, "requirements": ratios if row.ours else {},
        }  # fmt: skip


def moving_gbps(device: torch.device) -> float:
    """1e9 bytes a second that are read and written, half and half, where 256 MiB are overwritten by torch.

    Not by a copy, which reads what it overwrites without using it, a third of what it moves.
    """
    data = torch.ones(64 << 20, device=device)
    effort = Effort(repetitions=5, budget=0.5, limit=5.0, most=20)
    timing = interleaved({"neg": data.neg_}, effort, synchronizer(device))["neg"]
    return 2 * data.nbytes / timing.best / 1e9


# ---------------------------------------------------------------------------- measuring


def measure(
    case: Case, backends: Iterable[Backend], device: torch.device, effort: Effort, compiled: bool
) -> Result:
    """Check every candidate's first step against float64, then time those that are right, in turns."""
    if case.first:
        return _measure_first(case, backends, device, compiled)
    steps = {b.name: functools.partial(_ours, b.name) for b in backends}
    made = {name: make(case.lists(device)) for name, make in steps.items()}
    made |= {
        name: _torchs(case.lists(device), **{how: True})
        for name, how in ((FUSED, "fused"), (FOREACH, "foreach"))
    }
    if compiled:
        made[COMPILED] = _compiled(case.lists(device))
    rows, calls = [], {}
    for name, (step, params) in made.items():
        row = Row(case, name, name in steps)
        try:
            step()
            rows.append(replace(row, error=_error(case, params)))
            calls[name] = step
        except Exception as fault:  # a candidate that fails is a result
            rows.append(
                replace(row, not_run=f"raised {type(fault).__name__}: {' '.join(str(fault).split())[:200]}")
            )
    timings = interleaved(calls, effort, synchronizer(device))
    return Result(case, [replace(row, timing=timings.get(row.candidate)) for row in rows])


Step = tuple[Callable[[], None], list[Tensor]]
"""A step, and the parameters that it changes."""


def _ours(backend: str, lists: Lists) -> Step:
    p, g, m, v = lists
    count = itertools.count(1)

    @torch.no_grad()
    def step() -> None:
        foreach_map(adamw, p, g, m, v, *numbers(next(count)), out=(p, m, v), backend=backend)

    return step, p


def _torchs(lists: Lists, **how: bool) -> Step:
    params = [torch.nn.Parameter(t) for t in lists[0]]
    for param, grad in zip(params, lists[1], strict=True):
        param.grad = grad
    rule = torch.optim.AdamW(params, lr=RATE, betas=(BETA1, BETA2), eps=EPSILON, weight_decay=DECAY, **how)
    return rule.step, lists[0]


def _compiled(lists: Lists) -> Step:
    compiled = _compile()
    parts = [
        [items[start : start + _AT_ONCE] for items in lists] for start in range(0, len(lists[0]), _AT_ONCE)
    ]
    count = itertools.count(1)

    @torch.no_grad()
    def step() -> None:
        changing = [
            torch.tensor(number) for number in numbers(next(count))
        ]  # numbers would be compiled anew each step
        for part in parts:
            compiled(*part, *changing)

    return step, lists[0]


def _compile() -> Callable[..., None]:
    from torch._higher_order_ops.foreach_map import foreach_map as torchs

    def function(p: Any, g: Any, m: Any, v: Any, *changing: Any) -> None:
        results = torchs(adamw, p, g, m, v, *changing)
        for values, places in zip(zip(*results, strict=True), (p, m, v), strict=True):
            torch._foreach_copy_(places, list(values))

    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _error(case: Case, params: list[Tensor]) -> float:
    """The largest error of the first step, at parameters of some positions."""
    first = case.lists(params[0].device)
    errors = []
    for position in {0, case.count // 2, case.count - 1}:
        exact = adamw(*[items[position].double() for items in first], *numbers(1))[0]
        errors.append(float((params[position].double() - exact).abs().max()))
    return max(errors)


def _measure_first(case: Case, backends: Iterable[Backend], device: torch.device, compiled: bool) -> Result:
    rows = []
    for backend in backends:
        lists, seconds = case.lists(device), []
        for number in range(5):
            function = _unseen(number)
            with torch.no_grad():
                begin = time.perf_counter()
                foreach_map(
                    function, *lists, *numbers(1), out=(lists[0], lists[2], lists[3]), backend=backend.name
                )
                seconds.append(time.perf_counter() - begin)
        rows.append(Row(case, backend.name, True, Timing(tuple(seconds[1:]))))
    if compiled:
        part = replace(case, count=_AT_ONCE).lists(device)
        begin = time.perf_counter()
        with torch.no_grad():
            _compile()(*part, *[torch.tensor(number) for number in numbers(1)])
        rows.append(Row(case, COMPILED, False, Timing((time.perf_counter() - begin,))))
    return Result(case, rows)


def _unseen(number: int) -> Callable[..., Any]:
    """A function that no cache knows."""
    salt = 1.0 + number * 1e-7 + time.time() % 1e-3

    def function(p: Any, g: Any, m: Any, v: Any, *changing: Any) -> Any:
        p, m, v = adamw(p, g, m, v, *changing)
        return p * salt, m, v

    return function
