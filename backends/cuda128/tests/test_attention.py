"""Which attention problems cuda128 plans on which hardware, with which tiles; and, on a GPU, that the numbers are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import torchhal
from torchhal.portable.tiles import Tiles, padded
from torchhal.problems import AttentionProblem, Decline, Plan
from torchhal.registry import Backend, verify
from torchhal_cuda128 import attention, plugin, tiles
from torchhal_cuda128.hardware import Device, Hardware

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132)
B200 = Device("NVIDIA B200", (10, 0), 180 << 30, 148)
RTX_5090 = Device("NVIDIA GeForce RTX 5090", (12, 0), 32 << 30, 170)
ARCHES = ("sm_90", "sm_100", "sm_120")
READY = Hardware("2.13.0+cu128", torch_cuda=(12, 8), driver_cuda=(12, 8), devices=(H100,), arch_list=ARCHES)
SHARED = {9: 227 << 10, 10: 227 << 10, 12: 99 << 10}
"""Bytes of shared memory that one program may have, by compute capability major."""


def problem(size: int = 128, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> AttentionProblem:
    types = {"query_dtype": dtype, "key_dtype": dtype, "value_dtype": dtype}
    return AttentionProblem(
        torch.device("cuda", 0), head_size=size, value_head_size=size, **{**types, **fields}
    )


def decline(problem: AttentionProblem, hardware: Hardware) -> Decline:
    answer = attention.plan(problem, hardware)
    assert isinstance(answer, Decline), answer
    return answer


def test_attention_on_hopper_is_planned_by_the_portable_kernels() -> None:
    pytest.importorskip("triton")
    answer = attention.plan(problem(page_size=16, layout="paged"), READY)
    assert isinstance(answer, Plan), answer
    assert answer.description == "Triton, Hopper, tiled prefill and split-key decode, paged sequences"
    assert answer.deterministic


@pytest.mark.parametrize("device", [B200, RTX_5090], ids=lambda d: str(d.name))
def test_attention_where_the_kernels_have_never_run_is_declined(device: Device) -> None:
    answer = decline(problem(), replace(READY, devices=(device,)))
    assert answer.code == "architecture_untried"
    assert f"{device.name} has compute capability" in answer.reason


def test_each_device_has_an_answer_of_its_own() -> None:
    pytest.importorskip("triton")
    machine = replace(READY, devices=(RTX_5090, H100))
    second = replace(problem(), device=torch.device("cuda", 1))
    assert decline(problem(), machine).code == "architecture_untried"
    assert isinstance(attention.plan(second, machine), Plan)


def test_attention_without_suitable_hardware_is_declined_with_the_true_reason() -> None:
    assert decline(problem(), replace(READY, driver_cuda=None)).code == "no_driver"


def test_a_head_size_beyond_the_kernels_is_declined() -> None:
    pytest.importorskip("triton")
    assert decline(problem(1024), READY).code == "head_size"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_types_that_are_not_claimed_are_declined_by_the_core(dtype: torch.dtype) -> None:
    backend = verify("cuda128", "torchhal-cuda128", plugin)
    assert isinstance(backend, Backend), backend
    answer = backend.ask(problem(dtype=dtype))
    assert isinstance(answer, Decline)
    assert answer.code == "unclaimed_dtype"


@pytest.mark.parametrize("major", sorted(tiles.TILES))
@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_of_each_family_fit_its_shared_memory(major: int, size: int, dtype: torch.dtype) -> None:
    for choose in tiles.TILES[major]:
        chosen: Tiles = choose(problem(size, dtype))
        assert {chosen.rows, chosen.keys} <= {16, 32, 64, 128}
        elements = chosen.rows + 2 * chosen.keys * chosen.stages
        assert elements * padded(size) * dtype.itemsize <= SHARED[major]


def test_keys_are_split_until_each_multiprocessor_has_a_program() -> None:
    assert tiles.tuning(H100).programs == 132


@pytest.mark.hardware
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 300])
def test_a_real_device_computes_what_float64_computes(rows: int, causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 64, device="cuda", dtype=torch.bfloat16)
        for heads, length in ((8, rows), (2, 333), (2, 333))
    )
    rules: dict[str, Any] = {"is_causal": causal, "enable_gqa": True, "return_lse": True}
    out, lse = torchhal.attention(query, key, value, backend="cuda128", **rules)
    wide = (tensor.double() for tensor in (query, key, value))
    expected, truth = torchhal.attention(*wide, backend="reference", **rules)
    assert (out - expected).abs().max() < 2e-2
    torch.testing.assert_close(lse.double(), truth, rtol=1e-5, atol=1e-5)
