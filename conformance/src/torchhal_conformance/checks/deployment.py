"""Deployment: every task on a small model, from the advice to a model that runs."""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from torchhal import deploy
from torchhal_conformance import calls, tolerance
from torchhal_conformance.model import (
    Check,
    CheckFailed,
    Explanation,
    Inputs,
    Measured,
    Needs,
    Outputs,
    Sample,
)


class Small(torch.nn.Module):
    """Two layers, to be deployed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def _model(backend: str, seed: int) -> tuple[Small, Tensor, Callable[[Callable[..., Tensor], Tensor], float]]:
    """A model, its input, and a judge of functions that should compute the same."""
    device = calls.device_of(backend)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, x = Small().eval().to(device), torch.randn(17, 16).to(device)
        wide = Small().eval().double()
    wide.load_state_dict(model.state_dict())
    untouched = copy.deepcopy(model)  # what is deployed is the backend's to spoil

    def judge(function: Callable[..., Tensor], given: Tensor) -> float:
        with torch.no_grad():
            exact, plain = wide(given.double().cpu()), untouched(given)
            return tolerance.judge([function(given)], [exact], [plain], tolerance.FORWARD, ["result"])

    return model, x, judge


def _compile_options(backend: str, seed: int) -> Measured:
    model, x, judge = _model(backend, seed)
    options: Any = deploy.compile_options(x.device, backend=backend)
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise CheckFailed("a dictionary of options by name", repr(options))
    try:
        return Measured(judge(torch.compile(model, options=options), x))
    finally:
        torch._dynamo.reset()


def _quantizer(backend: str, seed: int) -> Measured:
    model, x, _ = _model(backend, seed)
    quantizer = deploy.quantizer(x.device, backend=backend)
    with calls.harness():
        pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
        exported = torch.export.export(model, (x,)).module()
        exact = model(x)
    prepared = pt2e.prepare_pt2e(exported, quantizer)
    prepared(x)
    converted = pt2e.convert_pt2e(prepared)
    if not any("quantize" in str(node.target) for node in converted.graph.nodes):
        raise CheckFailed("an exported model with quantised operations", "a graph without any")
    error = float((converted(x) - exact).abs().max() / exact.abs().max())
    if not error < 0.1:
        raise CheckFailed("a quantised model within 10 % of the model", f"{error:.0%}")
    return Measured(note=f"off by {error:.2%}")


def _package(backend: str, seed: int) -> Measured:
    model, x, judge = _model(backend, seed)
    with calls.harness():
        rows = torch.export.Dim("rows", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: rows}})
    with tempfile.TemporaryDirectory(prefix="torchhal-conformance-") as folder:
        path = Path(folder).resolve() / "small.pt2"
        written = deploy.package(program, path, backend=backend)
        if written != path:
            raise CheckFailed("the path of the package", written)
        loaded = deploy.load(path)
        return Measured(max(judge(loaded, x[:count]) for count in (1, 3, 17)))


def _profiler(backend: str, seed: int) -> Measured:
    model, x, _ = _model(backend, seed)
    activities = deploy.profiler_activities(x.device, backend=backend)
    known = torch.profiler.supported_activities()  # type: ignore[no-untyped-call]
    if not activities or not set(activities) <= set(known):
        raise CheckFailed(f"activities out of {sorted(a.name for a in known)}", repr(activities))
    with torch.profiler.profile(activities=activities) as profile:
        model(x)
    events = {event.key for event in profile.key_averages()}
    if not any("addmm" in event or "linear" in event for event in events):
        raise CheckFailed("a profile that shows the model's matrix products", sorted(events)[:5])
    return Measured()


TASKS: Final[dict[str, tuple[Callable[[str, int], Measured], Callable[[str], object]]]] = {
    "compile_options": (
        _compile_options,
        lambda name: deploy.compile_options(calls.device_of(name), backend=name),
    ),
    "quantizer": (_quantizer, lambda name: deploy.quantizer(calls.device_of(name), backend=name)),
    "package": (_package, lambda name: _package(name, 0)),
    "profiler": (_profiler, lambda name: deploy.profiler_activities(calls.device_of(name), backend=name)),
}
"""How each task is examined, and the plainest call that asks for it."""


def _task_sample(task: str) -> Sample:
    def call(backend: str, inputs: Inputs) -> Outputs:
        TASKS[task][1](backend)
        return ()

    def nothing(inputs: Inputs) -> Outputs:
        return ()

    needs = Needs("deploy", choice=task)
    return Sample(task, needs, lambda generator, device: {}, call, nothing, nothing, tags=frozenset({task}))


def tasks(backend: str, sample: Sample, seed: int) -> Measured:
    """One deployment task, from the options to a model that runs."""
    return TASKS[sample.needs.choice][0](backend, seed)


def checks() -> Iterator[Check]:
    """One."""
    yield Check(
        "deploy.tasks",
        Explanation(
            "Compiles a small model with the options, quantises it through PT2E, packages and loads it with AOTInductor, and "
            "profiles it.",
            "Option names of Inductor change between releases and torch.compile refuses unknown ones; a quantizer that "
            "matches no pattern of this release's export annotates nothing, silently.",
            "Run the task by hand with the public functions of torchhal.deploy; each is a line.",
        ),
        lambda: (_task_sample(task) for task in TASKS), tasks, refuses=True,
    )  # fmt: skip
