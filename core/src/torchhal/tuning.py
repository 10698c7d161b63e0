"""Measures which backend is fastest for a problem, for ``torchhal tune``; the lock file keeps the answers.

A Problem has no lengths, so that a plan serves every length; a measurement needs some. By default each problem is
measured where models spend their time, one decoding step and one prompt, and the choice is the backend
with the smallest geometric mean of its times: no single length decides.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from torchhal import lock
from torchhal.bench import accuracy
from torchhal.bench.candidates import OF, named_variants
from torchhal.bench.cases import Inputs, Shape, random_inputs
from torchhal.bench.timing import Effort, Timing, timed
from torchhal.errors import ConfigurationError
from torchhal.problems import AttentionProblem, Decline, Plan, Problem
from torchhal.registry import Registry

EFFORT: Final = Effort(repetitions=5, budget=0.5, limit=10.0, most=20)


DECODE: Final = Shape(1, 1, 1024)
PROMPT: Final = Shape(1, 512, 512)


@dataclass(frozen=True)
class Measurement:
    """What one problem's backends took at one shape."""

    shape: Shape
    timings: Mapping[str, Timing]
    wrong: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Backends whose result was wrong or that raised, and how; they are not chosen."""

    def to_dict(self) -> dict[str, Any]:
        """Sizes, median seconds and faults, for JSON."""
        medians = {name: timing.median for name, timing in self.timings.items()}
        return {"shape": dataclasses.asdict(self.shape), "seconds": medians, "wrong": dict(self.wrong)}


@dataclass(frozen=True)
class Tuned:
    """One problem's outcome."""

    problem: Problem
    measurements: tuple[Measurement, ...] = ()
    declined: Mapping[str, Decline] = dataclasses.field(default_factory=dict)
    not_measured: str = ""
    """Why there is no measurement; empty if there is one."""

    @property
    def seconds(self) -> dict[str, float]:
        """Geometric mean of the median times of each backend that was right at every shape, fastest first."""
        usable = [
            name
            for name in self._names()
            if all(name in m.timings and name not in m.wrong for m in self.measurements)
        ]
        means = {
            name: _geometric_mean([m.timings[name].median for m in self.measurements]) for name in usable
        }
        return dict(sorted(means.items(), key=lambda item: item[1]))

    @property
    def chosen(self) -> str | None:
        """The fastest backend, and behind a colon the variant of its plan where it has some; None without one."""
        return next(iter(self.seconds), None)

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for m in self.measurements for name in m.timings))

    def entry(self) -> dict[str, Any]:
        """The problem's entry in a lock file."""
        backend, _, variant = (self.chosen or "").partition(OF)
        return {
            "backend": backend or None,
            **({"variant": variant} if variant else {}),
            "seconds": self.seconds,
            "measurements": [m.to_dict() for m in self.measurements],
        }


# ---------------------------------------------------------------------------- which problems


def read_routes(path: Path) -> list[Problem]:
    """The problems in a file that ``torchhal run --routes`` wrote, each once.

    Raises:
        ConfigurationError: the file can not be read or holds something else.
        InvalidProblem: a problem in it is not one of this specification version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        texts = [json.dumps(route["problem"]) for route in content["routes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "write one with `torchhal run --routes FILE SCRIPT`"
        raise ConfigurationError(
            f"{path} is not a file of routes ({type(error).__name__}: {error}); {advice}"
        ) from error
    return list(dict.fromkeys(Problem.from_text(text) for text in texts))


def default_problems(device: torch.device) -> list[Problem]:
    """Attention as common models call it: head sizes 64 and 128, with and without groups, causal, full and masked."""
    problems: list[Problem] = []
    for dtype in (torch.float32, torch.bfloat16):
        for size, heads, key_heads in ((64, 8, 8), (128, 8, 2)):
            plain = AttentionProblem(
                device, _features(gqa=heads != key_heads), query_dtype=dtype, key_dtype=dtype, value_dtype=dtype,
                query_heads=heads, key_heads=key_heads, head_size=size, value_head_size=size,
            )  # fmt: skip
            causal = dataclasses.replace(plain, is_causal=True, features=plain.features | {"causal"})
            masked = dataclasses.replace(
                plain, mask_dtype=torch.bool, features=plain.features | {"boolean_mask"}
            )
            problems += [plain, causal, masked]
    return problems


def _features(**asked: bool) -> frozenset[str]:
    return frozenset(name for name, wanted in asked.items() if wanted)


def devices() -> list[torch.device]:
    """The devices of this machine: the CPU, and the first accelerator if torch sees one."""
    found = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found if accelerator is None else [*found, torch.device(accelerator.type, 0)]


def default_shapes(problem: Problem) -> list[Shape]:
    """One decoding step and one prompt; a causal problem, whose first row sees one key, as a prompt alone."""
    causal = isinstance(problem, AttentionProblem) and problem.is_causal
    return [PROMPT] if causal else [DECODE, PROMPT]


# ---------------------------------------------------------------------------- measuring


def tune(
    problem: Problem, registry: Registry, shapes: Sequence[Shape] | None = None, effort: Effort = EFFORT
) -> Tuned:
    """Measure every backend that has a plan for ``problem``, each variant of the plan, and the reference.

    Each result is first checked against float64; a backend that is wrong is reported and never chosen.

    Args:
        problem: attention in the dense layout, without captured functions, BlockMask and dropout; any other is
            returned with the reason for not measuring it.
        registry: the backends to ask.
        shapes: the sizes to measure at; :func:`default_shapes` by default.
        effort: how long to measure.
    """
    answers = {name: backend.ask(problem) for name, backend in registry.backends.items()}
    declined = {name: answer for name, answer in answers.items() if isinstance(answer, Decline)}
    plans = {
        key: plan
        for name, answer in answers.items()
        if isinstance(answer, Plan)
        for key, plan in named_variants(name, answer).items()
    }
    reason = _obstacle(problem, plans)
    if reason or not isinstance(problem, AttentionProblem):
        return Tuned(problem, (), declined, reason)
    measured = tuple(_measure(problem, plans, shape, effort) for shape in shapes or default_shapes(problem))
    return Tuned(problem, measured, declined)


def _obstacle(problem: Problem, plans: Mapping[str, Plan]) -> str:
    if not isinstance(problem, AttentionProblem):
        return f"only attention can be measured, not {problem.family}"
    if problem.layout != "dense":
        return f"only the dense layout can be measured, not {problem.layout}"
    for name in ("score_mod", "mask_mod", "block_size"):
        if getattr(problem, name) is not None:
            return f"calls with a {'BlockMask' if name == 'block_size' else name} can not be measured: their tensors are not known"
    if problem.dropout:
        return "calls with dropout can not be measured: their results differ by intent"
    if problem.device.type != "cpu" and problem.device not in devices():
        return f"torch sees no device {problem.device} here"
    return "" if plans else "no backend has a plan"


def _measure(
    problem: AttentionProblem, plans: Mapping[str, Plan], shape: Shape, effort: Effort
) -> Measurement:
    inputs = random_inputs(problem, shape)
    calls = {name: _call(problem, plan, inputs) for name, plan in plans.items()}
    expected = accuracy.expectation(inputs, problem.is_causal)
    faults = {name: _fault(call, expected) for name, call in calls.items()}
    right = {name: call for name, call in calls.items() if not faults[name]}
    timings = timed(right, effort, problem.device)
    return Measurement(shape, timings, {name: fault for name, fault in faults.items() if fault})


def _call(problem: AttentionProblem, plan: Plan, inputs: Inputs) -> Callable[[], Tensor]:
    """One call of a plan, with the backward pass where the problem asks for gradients; returns the output."""
    forward = functools.partial(plan.run, *inputs, problem.head_size**-0.5, None)
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]

    def call() -> Tensor:
        result = forward()
        out: Tensor = result[0] if problem.return_lse else result
        if wanted:
            torch.autograd.grad(out.sum(), wanted)
        return out

    return call


def _fault(call: Callable[[], Tensor], expected: accuracy.Expectation) -> str:
    try:
        error = expected.error(call())
    except Exception as fault:  # a backend's fault is a finding here
        return f"raised {type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
    return (
        ""
        if error <= expected.tolerance
        else f"is wrong by {error:.1e}, and {expected.tolerance:.1e} is allowed"
    )


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# ---------------------------------------------------------------------------- the lock file


def kept_entries(registry: Registry, path: Path) -> dict[str, Mapping[str, Any]]:
    """The choices at ``path`` that a new lock file keeps: those measured in this environment.

    Raises:
        ConfigurationError: there is a file at ``path`` that is no lock file, and it is not where lock files
            live, so it may be anything and is not overwritten.
    """
    try:
        before = lock.read(registry, path)
    except ConfigurationError:
        if path != lock.default_path():
            raise
        return {}
    return {} if before is None or before.stale else dict(before.entries)


def write_lock(tuned: Sequence[Tuned], registry: Registry, path: Path) -> lock.Lock:
    """Write the choices into the lock file at ``path``, stamped with this environment, beside those kept.

    Raises:
        ConfigurationError: as :func:`kept_entries`, or the file can not be written.
    """
    entries = {
        **kept_entries(registry, path),
        **{t.problem.text: t.entry() for t in tuned if t.chosen is not None},
    }
    try:
        return lock.write(registry, entries, path)
    except OSError as error:
        raise ConfigurationError(
            f"can not write the lock file {path}: {error.strerror}; choose another with --output"
        ) from error
