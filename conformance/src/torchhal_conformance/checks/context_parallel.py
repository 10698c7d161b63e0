"""Attention whose sequence is sharded over real processes, against one evaluation of the whole in one process."""

from __future__ import annotations

import datetime
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

import torchhal
from torchhal.errors import Unsupported
from torchhal.registry import registry
from torchhal_conformance import calls, oracle, tolerance
from torchhal_conformance.checks.processes import await_all, named, specification, start
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

SECONDS: Final = 150.0
"""For all ranks of one sample, most of it to import torch as often as there are ranks."""
COLLECTIVE_SECONDS: Final = 60
BATCH, HEADS, SIZE, VALUE_SIZE = 2, 4, 16, 8
LENGTHS: Final[dict[str, tuple[int, ...]]] = {
    "ranks2-even": (16, 16),
    "ranks2-uneven": (5, 18),
    "ranks4-even": (8, 8, 8, 8),
    "ranks4-uneven": (7, 0, 1, 13),
}
"""Query rows and keys of each rank."""


@dataclass(frozen=True)
class Variant:
    """One call that the ranks make together."""

    scheme: str
    causal: bool
    kv_heads: int
    other_keys: bool = False
    """Whether keys are sharded otherwise than queries, and are fewer."""

    @property
    def name(self) -> str:
        """Words for messages."""
        words = [self.scheme, *["causal"] * self.causal, *["gqa"] * (self.kv_heads != HEADS)]
        return " ".join([*words, *["with other key lengths"] * self.other_keys])

    def key_lengths(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Keys of each rank."""
        return tuple(n // 2 + 1 for n in reversed(lengths)) if self.other_keys else lengths


def variants(schemes: list[str]) -> list[Variant]:
    """Every variant, in the order in which all ranks call them."""
    made = [
        Variant(scheme, causal, kv_heads)
        for scheme, causal, kv_heads in itertools.product(schemes, (False, True), (HEADS, 2))
    ]
    return made + [Variant(scheme, False, HEADS, other_keys=True) for scheme in schemes]


def whole(variant: Variant, lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    """Query, key, value and the cotangents of output and LSE, of the whole sequence; the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    rows, keys = sum(lengths), sum(variant.key_lengths(lengths))
    shapes = (
        (BATCH, HEADS, rows, SIZE), (BATCH, variant.kv_heads, keys, SIZE), (BATCH, variant.kv_heads, keys, VALUE_SIZE),
        (BATCH, HEADS, rows, VALUE_SIZE), (BATCH, HEADS, rows),
    )  # fmt: skip
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _schemes(backend: str) -> list[str]:
    claims = registry().get(backend).info.capabilities.context_parallel
    return ["auto", *sorted(claims.schemes)] if claims is not None else []


# ---------------------------------------------------------------------------- one rank


def rank_main(specified: str, rank: str, folder: str, case: str, seed: str) -> None:
    """One rank: every variant, its results written to ``folder``."""
    torch.set_num_threads(1)
    backend, lengths, me = named(specified), LENGTHS[case], int(rank)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "rendezvous").as_uri(),
        rank=me,
        world_size=len(lengths),
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    try:
        found = [
            _shard_results(variant, backend, lengths, me, int(seed))
            for variant in variants(_schemes(backend))
        ]
        torch.save(found, Path(folder) / f"{rank}.pt")
        dist.barrier()
    except Unsupported as refusal:
        (Path(folder) / "unsupported.json").write_text(json.dumps(str(refusal)), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def _shard_results(
    variant: Variant, backend: str, lengths: tuple[int, ...], rank: int, seed: int
) -> list[Tensor]:
    """Output, LSE and the three gradients of this rank; attention on one device is the reference's."""
    keys = variant.key_lengths(lengths)
    tensors = whole(variant, lengths, seed)
    shards = [
        torch.split(t, list(split), 2)[rank].clone()
        for t, split in zip(tensors, (lengths, keys, keys, lengths, lengths))
    ]
    leaves = [t.requires_grad_() for t in shards[:3]]
    assert dist.group.WORLD is not None
    with torchhal.context_parallel(dist.group.WORLD, scheme=variant.scheme, backend=backend):
        found: Any = torchhal.attention(
            *leaves, is_causal=variant.causal, enable_gqa=variant.kv_heads != HEADS, return_lse=True, backend="reference"
        )  # fmt: skip
    out, lse = found
    gradients = torch.autograd.grad([out, lse], leaves, [shards[3], shards[4]])
    return [out.detach(), lse.detach(), *gradients]


# ---------------------------------------------------------------------------- the whole


def _truth(variant: Variant, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in tensors[:3]]
    out, lse, _ = oracle.attention(*leaves, dtype=dtype, scale=SIZE**-0.5, is_causal=variant.causal)
    gradients = torch.autograd.grad([out, lse], leaves, [t.to(dtype) for t in tensors[3:]])
    return [out.detach(), lse.detach(), *gradients]


def numbers(backend: str, sample: Sample, seed: int) -> Measured:
    """All variants over one group of processes."""
    lengths = LENGTHS[sample.name]
    with tempfile.TemporaryDirectory(prefix="torchhal-conformance-") as name:
        folder = Path(name).resolve()
        logs = [folder / f"{rank}.log" for rank in range(len(lengths))]
        processes = [
            start(
                __name__,
                "rank_main",
                specification(backend),
                str(rank),
                name,
                sample.name,
                str(seed),
                log=log,
            )
            for rank, log in enumerate(logs)
        ]
        await_all(processes, logs, f"{len(lengths)} ranks", SECONDS)
        if (refusal := folder / "unsupported.json").exists():
            raise Unsupported(json.loads(refusal.read_text(encoding="utf-8")))
        ranks: list[list[list[Tensor]]] = [torch.load(log.with_suffix(".pt")) for log in logs]
    listed = variants(_schemes(backend))
    return Measured(
        max(
            _judge(variant, lengths, seed, [rank[number] for rank in ranks])
            for number, variant in enumerate(listed)
        ),
        f"{len(listed)} calls over {len(lengths)} ranks",
    )


def _judge(variant: Variant, lengths: tuple[int, ...], seed: int, ranks: list[list[Tensor]]) -> float:
    with calls.harness():
        tensors = whole(variant, lengths, seed)
        exact, plain = (_truth(variant, tensors, dtype) for dtype in (torch.float64, torch.float32))
    keys = variant.key_lengths(lengths)
    names = ["output", "LSE", "gradient of query", "gradient of key", "gradient of value"]
    for number, split in enumerate((lengths, lengths, lengths, keys, keys)):
        for rank, (results, expected) in enumerate(zip(ranks, torch.split(exact[number], list(split), 2))):
            if results[number].shape != expected.shape:
                where = f"the {names[number]} of rank {rank} ({variant.name})"
                raise CheckFailed(f"{where} of shape {tuple(expected.shape)}", tuple(results[number].shape))
    found = [torch.cat(parts, 2) for parts in zip(*ranks)]
    labels = [f"{name} ({variant.name})" for name in names]
    return max(
        tolerance.judge(found[:2], exact[:2], plain[:2], tolerance.FORWARD, labels[:2]),
        tolerance.judge(found[2:], exact[2:], plain[2:], tolerance.BACKWARD, labels[2:]),
    )


# ---------------------------------------------------------------------------- checks


def _sample(name: str) -> Sample:
    def alone(backend: str, inputs: Inputs) -> Outputs:
        raise Unsupported("context parallelism is asked for by several processes together")

    def nothing(inputs: Inputs) -> Outputs:
        return ()

    needs = Needs("context_parallel")
    return Sample(name, needs, lambda generator, device: {}, alone, nothing, nothing, profile="distributed")


def checks() -> Iterator[Check]:
    """One."""
    yield Check(
        name="context_parallel.numbers",
        explanation=Explanation(
            tests=(
                "Starts two and four gloo processes on the CPU and holds output, LSE and gradients of every scheme against a "
                "float64 evaluation of the whole sequence: even, uneven and empty shards, causal or not, grouped heads."
            ),
            why=(
                "Ring schemes that count positions from the start of a shard mask the wrong keys and still give plausible "
                "numbers, and a merge without the LSE's gradient trains a wrong model; PyTorch's context parallelism "
                "supported even shards alone for long."
            ),
            debug=(
                "A wrong output on all ranks but the first is a position that starts at 0 on each of them. A right output "
                "with wrong gradients of key and value is a reduction over the wrong ranks, or one that was left out."
            ),
        ),
        samples=lambda: (_sample(name) for name in LENGTHS),
        run=numbers,
        profile="distributed",
    )
