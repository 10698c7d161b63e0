"""Streams and graphs of a device: is the work put where it was asked for, and is it the same when it is replayed?

Both are torch's words for every accelerator (``torch.Stream``, :func:`torchhal_conformance.calls.new_graph`); what a device lacks it is not
asked about (:data:`torchhal_conformance.model.FACILITIES`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.errors import Unsupported
from torchhal_conformance import calls
from torchhal_conformance.checks.promises import agree, representatives
from torchhal_conformance.model import (
    Check,
    CheckFailed,
    Explanation,
    Inputs,
    Measured,
    Outputs,
    Sample,
    tensors_of,
)

WARM_UP: Final = 3
"""Calls on the side stream before one is captured: kernels are compiled and memory is reserved then."""
DELAY: Final = 40
"""Matrix products of :data:`DELAY_SIZE` that a stream works at before the data of a call is ready: milliseconds, which is
more than it takes to launch the call."""
DELAY_SIZE: Final = 2048
SHAPES_FOLLOW: Final = "shapes follow the data, so nothing can be put in place"


def _with_data_of(inputs: Inputs, others: Inputs) -> Inputs | None:
    """The inputs with the others' tensors; numbers stay, for a graph holds those. None where shapes differ."""
    old, new = tensors_of(inputs), tensors_of(others)
    if old.keys() != new.keys() or any(new[name].shape != t.shape for name, t in old.items()):
        return None
    return {name: _replaced(name, value, new) for name, value in inputs.items()}


def _replaced(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [tensors.get(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return tensors.get(name, value)


def _fill(inputs: Inputs, others: Inputs) -> None:
    """Copy the others' tensors into the memory of the inputs, on the current stream."""
    new = tensors_of(others)
    for name, tensor in tensors_of(inputs).items():
        tensor.copy_(new[name])


# ---------------------------------------------------------------------------- graphs


def graphs(backend: str, sample: Sample, seed: int) -> Measured:
    """Capture once, replay with the data there was and with new data at the same place."""
    inputs = calls.make(sample, backend, seed)
    with calls.harness():
        later = _with_data_of(inputs, calls.make(sample, backend, seed + 1))
    if later is None:
        return Measured(note=SHAPES_FOLLOW)
    first, second = (calls.call(sample, backend, given) for given in (inputs, later))
    kept = tuple(t.clone() for t in first)
    graph, found = _captured(backend, sample, inputs)
    _replay(graph)
    agree(backend, sample, inputs, kept, found, "replayed as called")
    with calls.harness():
        before = {name: t.clone() for name, t in tensors_of(later).items()}
        _fill(inputs, later)
    _replay(graph)
    agree(backend, sample, inputs, second, found, "replayed with new data as called with it")
    for name, tensor in tensors_of(inputs).items():
        if not calls.same_bits(tensor, before[name]):
            raise CheckFailed(f"input {name} left as it was by a replay", "other values")
    agree(backend, sample, inputs, second, calls.call(sample, backend, inputs), "called after replays")
    return Measured()


def _captured(backend: str, sample: Sample, inputs: Inputs) -> tuple[Any, Outputs]:
    """A graph of the call, not yet replayed, and where its results will be."""
    device = calls.device_of(backend)
    stream = torch.Stream(device)
    torch.accelerator.synchronize()
    with stream:
        for _ in range(WARM_UP):
            calls.call(sample, backend, inputs)
    torch.accelerator.synchronize()
    graph = calls.new_graph()
    found: Outputs = ()
    try:
        with stream, graph:
            found = calls.call(sample, backend, inputs)
    except Unsupported:
        raise
    except Exception as error:
        # What ends a capture is often an error inside of it, of which the end then complains.
        first = error.__context__ or error
        raise CheckFailed(
            "a call that a device graph can capture", f"{type(first).__name__}: {first}"
        ) from error
    return graph, found


def _replay(graph: Any) -> None:
    graph.replay()
    torch.accelerator.synchronize()


# ---------------------------------------------------------------------------- streams


def streams(backend: str, sample: Sample, seed: int) -> Measured:
    """One side stream, then two at once: data that is written late on a stream is read there, and not before."""
    made = [calls.make(sample, backend, seed + number) for number in range(3)]
    with calls.harness():
        given = [_with_data_of(made[2], each) for each in made[:2]]
    if any(each is None for each in given):
        return Measured(note=SHAPES_FOLLOW)
    wanted = [(each, calls.call(sample, backend, each)) for each in given if each is not None]
    device = calls.device_of(backend)
    sides = [torch.Stream(device) for _ in wanted]
    for used, what in (((0,), "on a side stream"), ((0, 1), "on two streams at once")):
        with calls.harness():
            places = [_own_memory(made[2]) for _ in used]
            busy = [torch.ones(DELAY_SIZE, DELAY_SIZE, device=device) for _ in used]
        torch.accelerator.synchronize()
        found = [
            _on_stream(backend, sample, sides[number], busy[at], places[at], wanted[number][0])
            for at, number in enumerate(used)
        ]
        torch.accelerator.synchronize()
        for at, number in enumerate(used):
            agree(backend, sample, wanted[number][0], wanted[number][1], found[at], what)
    return Measured()


def _own_memory(inputs: Inputs) -> Inputs:
    return {name: _cloned(value) for name, value in inputs.items()}


def _cloned(value: Any) -> Any:
    if isinstance(value, list):
        return [_cloned(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


def _on_stream(
    backend: str, sample: Sample, stream: Any, busy: Tensor, place: Inputs, data: Inputs
) -> Outputs:
    """Producer, call and consumer on one stream; nothing is waited for."""
    with stream:
        for _ in range(DELAY):
            torch.mm(busy, busy, out=torch.empty_like(busy))
        _fill(place, data)
        found = calls.call(sample, backend, place)
        return tuple(t.clone() for t in found)


# ---------------------------------------------------------------------------- checks


def _asked(family: str) -> Iterator[Sample]:
    """What a program captures: a BlockMask is made outside of it, and a dropout seed is drawn where no graph looks."""
    for sample in representatives(family):
        blocks = "mask_mod" in sample.tags and "dense" in sample.tags
        if not blocks and "dropout" not in sample.tags and "asks_nobody" not in sample.tags:
            yield sample


GRAPHS: Final = Explanation(
    f"Calls {WARM_UP} times on a side stream, captures the call in a device graph, replays it, overwrites the inputs in place "
    "and replays it again: the bits are those of ordinary calls with the same data. For devices that have graphs.",
    "Servers replay decoding as one graph. What is read on the host while it is captured (a length, a maximum, a scale) is a "
    "constant from then on: the graph gives yesterday's answer to today's data, and no error.",
    "An error while capturing is a transfer or a synchronisation (.item(), .tolist(), .cpu()). Stale results: look for numbers "
    "read from tensors, caches keyed by address, and memory that is not the graph's own.",
)
STREAMS: Final = Explanation(
    "Keeps a side stream busy, writes the inputs there, calls, and copies the results there; then does it on two streams at "
    "once. The bits are those of ordinary calls. For devices that have streams.",
    "A kernel launched on the default stream reads its inputs before they are written whenever somebody else is slow: right on "
    "an idle device, wrong under load.",
    "Launch on torch's current stream of the tensors' device, and ask for it at every call, not when the plan is made.",
)


def checks() -> Iterator[Check]:
    """Both for each family whose results are tensors."""
    for family in ("attention", "matmul", "foreach"):
        for name, run, explanation in (("graphs", graphs, GRAPHS), ("streams", streams, STREAMS)):
            yield Check(
                name=f"{family}.{name}",
                explanation=explanation,
                samples=lambda family=family: _asked(family),  # type: ignore[misc]
                run=run,
                facilities=frozenset({name}),
            )
