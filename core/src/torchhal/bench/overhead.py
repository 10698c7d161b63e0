"""``torchhal bench overhead``: what torchhal itself costs, each against its budget."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from torchhal import selection
from torchhal.attention import attention
from torchhal.bench import idle
from torchhal.errors import FallbackWarning
from torchhal.installation import install
from torchhal.mode import enable
from torchhal.problems import AttentionProblem, Plan
from torchhal.registry import Backend, registry

BUDGETS: Final = {
    "mode": 1.5e-6,
    "intercepted": 3e-6,
    "installed": 3e-6,
    "function": 3e-6,
    "negotiation": 1e-3,
    "import": 0.15,
    "compiled": 0.0,
}
"""Seconds, and for ``compiled`` a number of calls; where each comes from is said beside the measurement."""


@dataclass(frozen=True)
class Overhead:
    """One cost and its budget."""

    name: str
    what: str
    value: float | None
    """Seconds, or a count where ``unit`` says so; None if it was not measured."""
    budget: float | None
    unit: str = "s"
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the budget is kept; None where there is nothing to judge."""
        return None if self.value is None or self.budget is None else self.value <= self.budget

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        return {**asdict(self), "passed": self.passed}


class _Bare(TorchFunctionMode):
    """The least a function mode can do: the part of the cost that is torch's own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs) if kwargs else func(*args)


Variant = tuple[Callable[[], contextlib.AbstractContextManager[Any]], Callable[[], Any]]
"""What to enter once around a batch, and the call to repeat inside."""


def fastest(variants: dict[str, Variant], calls: int, batches: int) -> dict[str, float]:
    """Seconds per call of each variant: the shortest of several batches, taken in turns."""
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(batches):
        for name, (context, call) in variants.items():
            with context():
                for _ in range(10):
                    call()
                begin = time.perf_counter()
                for _ in itertools.repeat(None, calls):
                    call()
                best[name] = min(best[name], (time.perf_counter() - begin) / calls)
    return best


@dataclass(frozen=True)
class Amount:
    """How much to measure."""

    calls: int = 300
    """Repetitions in one batch: so few that most batches are not interrupted."""
    batches: int = 80
    processes: int = 7
    negotiations: int = 40


QUICK: Final = Amount(100, 15, 3, 10)


# ---------------------------------------------------------------------------- measurements


def untouched_operation(amount: Amount) -> list[Overhead]:
    """(a) What the mode adds to an operation it does not intercept."""
    x = torch.zeros(1)

    def call() -> Any:
        return torch.add(x, x)

    variants: dict[str, Variant] = {
        "plain": (contextlib.nullcontext, call),
        "bare": (_Bare, call),
        "torchhal": (enable, call),
    }
    best = fastest(variants, amount.calls, amount.batches)
    added, bare = best["torchhal"] - best["plain"], best["bare"] - best["plain"]
    return [
        Overhead(
            "mode", "operation not intercepted: under the mode, more than without", added, BUDGETS["mode"]
        ),
        Overhead(
            "bare mode",
            "the same under a mode that does nothing",
            bare,
            None,
            note="torch's own share of the line above",
        ),
    ]


def intercepted_call(backend: Backend, amount: Amount) -> list[Overhead]:
    """(b) and (c) What the mode, an installation and the public function add to a plan that is cached."""
    query, key, value = (torch.zeros(1, 1, 1, 16) for _ in range(3))  # three, as in a model
    plan = plan_of(backend, query)
    if plan is None:
        note = f"{backend.name} has no plan for a small float32 call"
        return [Overhead("intercepted", f"backend {backend.name}", None, BUDGETS["intercepted"], note=note)]
    run, name = plan.run, backend.name
    variants: dict[str, Variant] = {
        "plan": (contextlib.nullcontext, lambda: run(query, key, value, None, 0.25, None)),
        "mode": (lambda: enable(name), lambda: F.scaled_dot_product_attention(query, key, value)),
        "installation": (lambda: install(name), lambda: F.scaled_dot_product_attention(query, key, value)),
        "function": (contextlib.nullcontext, lambda: attention(query, key, value, backend=name)),
    }
    best = fastest(variants, amount.calls, amount.batches)
    above = f"more than the cached plan of {name} itself"
    added = {variant: seconds - best["plan"] for variant, seconds in best.items()}
    call = "scaled_dot_product_attention"
    return [
        Overhead("intercepted", f"{call} under the mode: {above}", added["mode"], BUDGETS["intercepted"]),
        Overhead("installed", f"{call} installed: {above}", added["installation"], BUDGETS["installed"]),
        Overhead("function", f"torchhal.attention: {above}", added["function"], BUDGETS["function"]),
    ]


def plan_of(backend: Backend, query: torch.Tensor) -> Plan | None:
    """The backend's plan for plain attention on such a query, None if it declines."""
    answer = backend.ask(_problem(query.shape[1], query.shape[3]))
    return answer if isinstance(answer, Plan) else None


def _problem(heads: int, size: int) -> AttentionProblem:
    return AttentionProblem(
        torch.device("cpu"), query_heads=heads, key_heads=heads, head_size=size, value_head_size=size
    )


def negotiation(amount: Amount) -> list[Overhead]:
    """(d) What choosing costs when a problem is met for the first time."""
    registry()
    times = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for size in range(8, 8 + amount.negotiations + 1):
            problem = _problem(3, size)
            begin = time.perf_counter()
            selection.select(problem)
            times.append(time.perf_counter() - begin)
    # The first question may make a backend load its library, once in a process.
    note = f"the first of the process took {times[0] * 1e3:.1f} ms"
    return [
        Overhead(
            "negotiation",
            "one new problem, plugins loaded",
            statistics.median(times[1:]),
            BUDGETS["negotiation"],
            note=note,
        )
    ]


_IMPORT: Final = (
    "import time, torch; wall, busy = time.perf_counter(), time.process_time(); import torchhal; "
    "print(time.perf_counter() - wall, time.process_time() - busy)"
)


def import_time(amount: Amount) -> list[Overhead]:
    """(e) What ``import torchhal`` adds to ``import torch``, in new processes."""
    name, what, budget = "import", "import torchhal, after import torch", BUDGETS["import"]
    times = []
    # Where nothing may write compiled modules, each process would compile them; an installed package has them.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(1 + amount.processes):
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            why = done.stderr.strip().splitlines()[-1:] or ["no message"]
            return [Overhead(name, what, None, budget, note=f"failed: {why[0]}")]
        times.append(tuple(map(float, done.stdout.split())))
    wall, busy = (statistics.median(values) for values in zip(*times[1:]))
    return [Overhead(name, what, wall, budget, note=f"{busy * 1e3:.0f} ms of it on the processor")]


def compiled_call(backend: Backend, amount: Amount) -> list[Overhead]:
    """(f) How many Python functions of torchhal and its backends a compiled call enters."""
    query = torch.zeros(1, 1, 1, 16)
    plan = plan_of(backend, query)
    what = f"Python calls of torchhal in a compiled call, backend {backend.name}"
    if plan is None:
        return [Overhead("compiled", what, None, BUDGETS["compiled"], "calls", f"{backend.name} has no plan")]
    name = backend.name

    def program(x: torch.Tensor) -> Any:
        return attention(x, x, x, backend=name)

    try:
        compiled = torch.compile(program, fullgraph=True)
        with torch.no_grad():
            compiled(query)
            compiled(query)
            entered = python_calls(lambda: compiled(query))
    except Exception as error:  # no C++ compiler, for one
        why = " ".join(str(error).split())[:200]
        return [
            Overhead("compiled", what, None, BUDGETS["compiled"], "calls", f"{type(error).__name__}: {why}")
        ]
    if not plan.traceable:
        note = "its plan is no operator of its own, so torchhal's operator calls it in Python; not judged"
        return [Overhead("compiled", what, float(len(entered)), None, "calls", note)]
    return [
        Overhead("compiled", what, float(len(entered)), BUDGETS["compiled"], "calls", ", ".join(entered[:5]))
    ]


def python_calls(call: Callable[[], Any]) -> list[str]:
    """Python functions of torchhal and its backends that ``call`` enters on this thread, in order."""
    entered: list[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        module = str(frame.f_globals.get("__name__", ""))
        if event == "call" and module.startswith("torchhal") and not module.startswith(__package__):
            entered.append(f"{module}.{frame.f_code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


# ---------------------------------------------------------------------------- all of it

Step = tuple[str, Callable[[], Iterable[Overhead]]]


def steps(backend: Backend, amount: Amount, compiled: bool = True) -> list[Step]:
    """The measurements in order, each with a name for the progress bar."""

    def idle_calls() -> Iterable[Overhead]:
        with idle.installed() as nothing:
            return intercepted_call(nothing, amount)

    found: list[Step] = [
        ("import", lambda: import_time(amount)),
        ("mode", lambda: untouched_operation(amount)),
        ("idle plan", idle_calls),
        (f"plan of {backend.name}", lambda: intercepted_call(backend, amount)),
        ("negotiation", lambda: negotiation(amount)),
    ]
    return [*found, ("torch.compile", lambda: compiled_call(backend, amount))] if compiled else found
