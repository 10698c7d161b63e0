"""What a worker writes down of a plan can be read where the backend is not."""

from __future__ import annotations

from typing import Any

import torch

from torchhal.problems import Plan
from torchhal_conformance import tape


def run(*arguments: Any) -> torch.Tensor:
    return torch.zeros(1)


def test_the_promises_of_a_plan_with_functions_in_it_survive_the_tape() -> None:
    made = Plan(run, "one of two", direct=run, variants={"one": run, "two": run}, batch_invariant=True)
    recorder = tape.Recorder()
    assert recorder.plan(lambda: made) is made
    (entry,) = tape.decode(tape.encode(recorder.entries))
    read = tape.Player([entry]).plan(lambda: None)
    assert read is not None
    assert (read.description, read.batch_invariant, read.deterministic) == ("one of two", True, True)
    assert not read.variants and read.direct is None
