"""Calls of a backend on tape, so that its results can be judged in a process where it never was.

A check calls a backend through :func:`calls.call` and asks the results its question. Where the backend runs, the
results of each call are recorded, with the gradients that came back for its leaves; elsewhere the same check runs again
with the recorded results in the place of the calls. A backend that replaces ``torch.equal``, or answers the run itself,
changes nothing there: it has to deliver the right numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.errors import Unsupported
from torchhal.problems import Plan
from torchhal_conformance import calls
from torchhal_conformance.model import Inputs, Outputs, Sample

PROMISES: Final = tuple(
    f.name for f in dataclasses.fields(Plan) if f.name not in ("run", "direct", "bind", "variants")
)
"""What a plan says; what it does stays where the backend is."""
LONGEST: Final = 1 << 28
"""Bytes of a tape."""


class TapeError(Exception):
    """A tape is damaged, or does not hold what the check asks for."""


@dataclass
class Entry:
    """One call: what it returned, or what it raised."""

    outputs: list[Tensor] = field(default_factory=list)
    differentiable: list[bool] = field(default_factory=list)
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)
    """Of each leaf, one for each time that autograd came back to it."""
    refused: str | None = None
    """What ``Unsupported`` said."""
    promises: dict[str, Any] | None = None
    """Of the plan, where a check asked for that and made no call."""


# ---------------------------------------------------------------------------- recording


class Recorder:
    """Makes the calls and keeps what came of them."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def call(self, sample: Sample, inputs: Inputs, make: Callable[[], Outputs]) -> Outputs:
        """The results of the backend."""
        entry = Entry()
        self.entries.append(entry)
        for name in sample.leaves if torch.is_grad_enabled() else ():
            if inputs[name].requires_grad:
                inputs[name].register_hook(_keeper(entry, name))
        try:
            outputs = make()
        except Unsupported as refusal:
            entry.refused = str(refusal)
            raise
        entry.outputs = [t.detach().clone() for t in outputs]
        entry.differentiable = [t.requires_grad for t in outputs]
        return outputs

    def plan(self, make: Callable[[], Plan | None]) -> Plan | None:
        """The plan of the backend."""
        plan = make()
        promises = None if plan is None else {name: getattr(plan, name) for name in PROMISES}
        self.entries.append(Entry(promises=promises))
        return plan


def _keeper(entry: Entry, name: str) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        entry.gradients.setdefault(name, []).append(gradient.detach().clone())

    return keep


@contextmanager
def recording() -> Iterator[list[Entry]]:
    """Record every call of the block; the list is complete when the block ends."""
    recorder = Recorder()
    with _relayed(recorder):
        yield recorder.entries


@contextmanager
def _relayed(relay: calls.Relay) -> Iterator[None]:
    before, calls.relay = calls.relay, relay
    try:
        yield
    finally:
        calls.relay = before


# ---------------------------------------------------------------------------- playing


class Player:
    """Gives the calls what is on the tape, in order, and makes none."""

    def __init__(self, entries: list[Entry]) -> None:
        self._count = len(entries)
        self._waiting = iter(entries)

    def _next(self) -> Entry:
        entry = next(self._waiting, None)
        if entry is None:
            raise TapeError(f"expected the results of more calls than {self._count}")
        return entry

    def call(self, sample: Sample, inputs: Inputs, make: Callable[[], Outputs]) -> Outputs:
        """The recorded results."""
        entry = self._next()
        if entry.refused is not None:
            raise Unsupported(entry.refused)
        names = [n for n in sample.leaves if isinstance(inputs[n], Tensor) and inputs[n].requires_grad]
        device = next((v.device for v in inputs.values() if isinstance(v, Tensor)), None)
        outputs = [t.to(device) for t in entry.outputs]
        if not names or not any(entry.differentiable) or not torch.is_grad_enabled():
            return tuple(outputs)
        leaves = [inputs[name] for name in names]
        return _Played.apply(entry, names, outputs, *leaves)  # type: ignore[no-any-return, no-untyped-call]

    def plan(self, make: Callable[[], Plan | None]) -> Plan | None:
        """A plan of the recorded promises, which can not be run."""
        promises = self._next().promises
        return None if promises is None else Plan(run=_not_here, **promises)


def _not_here(*arguments: object) -> None:
    raise TapeError("a recorded plan can not be run")


@contextmanager
def playing(entries: list[Entry]) -> Iterator[None]:
    """Give the recorded results to the calls of the block, in order.

    Raises:
        TapeError: from a call for which there is none.
    """
    with _relayed(Player(entries)):
        yield


class _Played(torch.autograd.Function):
    """Recorded results with their recorded gradients."""

    @staticmethod
    def forward(ctx: Any, entry: Entry, names: list[str], outputs: list[Tensor], *leaves: Tensor) -> Any:
        ctx.entry, ctx.names, ctx.device = entry, names, leaves[0].device
        ctx.mark_non_differentiable(*(t for t, on in zip(outputs, entry.differentiable) if not on))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        # Of a leaf that autograd did not reach there is none, as there was none then.
        kept = [ctx.entry.gradients.get(name) for name in ctx.names]
        return None, None, None, *(found.pop(0).to(ctx.device) if found else None for found in kept)


# ---------------------------------------------------------------------------- bytes


def encode(entries: list[Entry]) -> bytes:
    """The tape as bytes: a line of JSON, and the tensors' memory; no pickle, since a backend could have made it."""
    blobs: dict[bytes, int] = {}

    def described(tensor: Tensor) -> dict[str, Any]:
        # A copy, for a tensor of one element is contiguous whatever its stride, and bytes want one of 1.
        flat = tensor.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        memory = flat.view(torch.uint8).numpy().tobytes()
        index = blobs.setdefault(memory, len(blobs))  # calls that are repeated give the same again
        return {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "blob": index,
        }

    listed = [
        {
            "outputs": [described(t) for t in entry.outputs],
            "differentiable": entry.differentiable,
            "gradients": {name: [described(t) for t in each] for name, each in entry.gradients.items()},
            "refused": entry.refused,
            "promises": entry.promises,
        }
        for entry in entries
    ]
    head = json.dumps({"entries": listed, "blobs": [len(blob) for blob in blobs]})
    return head.encode() + b"\n" + b"".join(blobs)


def decode(tape: bytes) -> list[Entry]:
    """The tape of bytes from anywhere.

    Raises:
        TapeError: they are none.
    """
    if not tape:
        return []  # of a check that made no calls
    head, _, memory = tape.partition(b"\n")
    try:
        content = json.loads(head)
        blobs, at = [], 0
        for size in content["blobs"]:
            blobs.append(memory[at : at + size])
            at += size
        return [_entry(found, blobs) for found in content["entries"]]
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise TapeError(f"no tape of calls: {type(error).__name__}: {error}") from error


def _entry(found: dict[str, Any], blobs: list[bytes]) -> Entry:
    refused, flags, promises = found["refused"], found["differentiable"], found["promises"]
    if not (refused is None or isinstance(refused, str)) or len(flags) != len(found["outputs"]):
        raise ValueError("an entry of other kinds")
    if promises is not None and set(promises) != set(PROMISES):
        raise ValueError("other promises than those of a plan")
    return Entry(
        [_tensor(each, blobs) for each in found["outputs"]],
        [flag is True for flag in flags],
        {str(name): [_tensor(t, blobs) for t in each] for name, each in found["gradients"].items()},
        refused,
        promises,
    )


def _tensor(described: dict[str, Any], blobs: list[bytes]) -> Tensor:
    dtype = getattr(torch, described["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{described['dtype']} is no element type")
    shape, memory = described["shape"], bytearray(blobs[described["blob"]])
    if not memory:
        return torch.empty(shape, dtype=dtype) if 0 in shape else _missing(shape)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).reshape(shape)


def _missing(shape: list[int]) -> Tensor:
    raise ValueError(f"no memory for a tensor of shape {shape}")
