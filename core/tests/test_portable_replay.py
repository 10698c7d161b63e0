"""A call like an earlier one is started again on its own tensors, and every other call is worked out anew."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import interpreted
import oracle
import pytest
import torch
from attention_calls import alibi, call, qkv
from test_portable_attention import SLOPES, SPLIT, close
from test_reference_attention_layouts import packed, starts
from torch import Tensor

from torchhal.portable import attention, replay
from torchhal.portable.backward import Backward
from torchhal.portable.tiles import PLAIN, Tiles

FLOAT = torch.float32


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call whose arguments were worked out."""
    found: list[int] = []
    real = attention.Launcher.__call__

    def launch(self: Any, *arguments: Any) -> None:
        found.append(1)
        real(self, *arguments)

    monkeypatch.setattr(attention.Launcher, "__call__", launch)
    monkeypatch.setattr(attention, "SHORTEST_SPLIT", 16)
    return found


@pytest.mark.parametrize("tuning", [PLAIN, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("rows", [2, 33], ids=["decode", "prefill"])
def test_a_second_call_of_the_same_shapes_computes_on_its_own_tensors(
    rows: int, tuning: Any, worked_out: list[int]
) -> None:
    compute = interpreted.attention(tuning)
    for seed in range(3):
        tensors = qkv(2, 4, 2, rows, 50, 16, 16, FLOAT, seed)
        close(call(*tensors, compute=compute, scale=0.25), oracle.attention(*tensors, scale=0.25))
    assert len(worked_out) == 1


def test_a_second_backward_pass_of_the_same_shapes_computes_on_its_own_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[int] = []
    real = Backward._launch

    def launch(self: Any, *arguments: Any) -> None:
        launched.append(1)
        real(self, *arguments)

    monkeypatch.setattr(Backward, "_launch", launch)
    compute = interpreted.attention(PLAIN)
    rules: dict[str, Any] = {"scale": 0.25, "is_causal": True, "features": frozenset({"backward"})}
    for seed, value in enumerate([0.0, 0.0, float("nan")]):
        leaves = [t.requires_grad_() for t in qkv(2, 4, 2, 20, 20, 16, 16, FLOAT, seed)]
        with torch.no_grad():
            leaves[2][1, 1, 11, 3] += value
        above = torch.randn(2, 4, 20, 16), torch.randn(2, 4, 20)
        found, fresh = (
            torch.autograd.grad(call(*leaves, compute=how, **rules), leaves, above)
            for how in (compute, interpreted.attention(PLAIN))
        )
        for got, expected in zip(found, fresh, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert len(launched) == 1 + 3  # of the first call, and of those that are compared with


def test_a_recorded_backward_pass_keeps_no_tensor_alive() -> None:
    compute = interpreted.attention(PLAIN)
    leaves = [t.requires_grad_() for t in qkv(1, 2, 2, 20, 20, 16, 16, FLOAT)]
    out, lse = call(*leaves, compute=compute, is_causal=True, features=frozenset({"backward"}))
    found = torch.autograd.grad(out.sum(), leaves)
    held = [weakref.ref(t) for t in (*leaves, *found)]
    del out, lse, leaves, found
    gc.collect()
    assert not any(ref() is not None for ref in held)


def test_captured_tensors_and_lengths_are_those_of_the_call(worked_out: list[int]) -> None:
    compute = interpreted.attention(PLAIN)
    for seed, (rows, keys) in enumerate([([3, 9], [5, 20]), ([9, 3], [20, 5])]):
        tensors = [t.float() for t in packed(rows, keys)]
        q, k = starts(rows), starts(keys)
        slopes = SLOPES + seed
        out, _ = call(
            *tensors,
            layout="varlen",
            cu_seqlens_q=q,
            cu_seqlens_k=k,
            score_mod=alibi(slopes),
            scale=0.5,
            compute=compute,
        )
        for b in range(2):
            one, two = slice(q[b], q[b + 1]), slice(k[b], k[b + 1])
            parts = [t[s].transpose(0, 1)[None] for t, s in zip(tensors, (one, two, two), strict=True)]
            truth = oracle.attention(
                *parts, score_mod=alibi(slopes.double().numpy()), scale=0.5, first_batch=b
            )
            close((out[one].transpose(0, 1),), (truth[0][0],))
    assert len(worked_out) == 1


def test_descriptors_describe_the_tensors_of_the_call(worked_out: list[int]) -> None:
    tuning = PLAIN.__class__(prefill=lambda problem: Tiles(64, 32, descriptors=True), decode=PLAIN.decode)
    compute = interpreted.attention(tuning)
    for seed in range(2):
        tensors = qkv(1, 2, 1, 70, 90, 16, 16, FLOAT, seed)
        close(call(*tensors, compute=compute, scale=0.25), oracle.attention(*tensors, scale=0.25))
    assert len(worked_out) == 1


def test_another_scale_length_or_stride_is_worked_out_anew(worked_out: list[int]) -> None:
    compute = interpreted.attention(PLAIN)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(1, 2, 2, 5, 20, 16, 16, FLOAT)]
    calls: list[tuple[Any, float]] = [
        (qkv(1, 2, 2, 5, 20, 16, 16, FLOAT), 0.25),
        (qkv(1, 2, 2, 5, 20, 16, 16, FLOAT), 0.5),
        (qkv(1, 2, 2, 5, 21, 16, 16, FLOAT), 0.25),
        (turned, 0.25),
    ]
    for tensors, scale in calls:
        close(call(*tensors, compute=compute, scale=scale), oracle.attention(*tensors, scale=scale))
    assert len(worked_out) == len(calls)


def test_memory_that_begins_between_multiples_of_16_bytes_is_not_replayed(worked_out: list[int]) -> None:
    compute = interpreted.attention(PLAIN)
    tensors = list(qkv(1, 2, 2, 5, 20, 16, 16, FLOAT))
    tensors[1] = torch.cat([torch.zeros(1), tensors[1].flatten()])[1:].view(tensors[1].shape)
    for _ in range(2):
        close(call(*tensors, compute=compute, scale=0.25), oracle.attention(*tensors, scale=0.25))
    assert len(worked_out) == 2


def test_a_recording_keeps_no_tensor_alive() -> None:
    compute = interpreted.attention(SPLIT)

    def serve() -> list[weakref.ref[Tensor]]:
        tensors = qkv(1, 2, 2, 2, 90, 16, 16, FLOAT)
        results = call(*tensors, compute=compute, score_mod=alibi(SLOPES))
        return [weakref.ref(tensor) for tensor in (*tensors, *results)]

    alive = serve()
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


def test_lengths_without_end_do_not_fill_the_memory(
    worked_out: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST", 2)
    compute = interpreted.attention(PLAIN)
    for keys in (1, 2, 3, 3, 1):
        call(*qkv(1, 1, 1, 1, keys, 16, 16, FLOAT), compute=compute)
    assert len(worked_out) == 4  # that of one key was forgotten when that of three came


def test_a_tensor_made_on_the_way_makes_a_recording_useless() -> None:
    recording = replay.Recording()
    given = torch.ones(1)
    recording.add(lambda *a: None, (given, (given.view(1), 3)), [given])
    assert not recording.usable
