"""Which matrix products cuda128 plans on which hardware and by which engine; and, on a GPU, that the numbers are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torchhal
from torchhal.portable.matmul_tiles import Tiles, Work
from torchhal.problems import Decline, MatmulProblem, Plan
from torchhal.products.product import NO_FUNCTIONS
from torchhal_cuda128 import matmul, matmul_tiles
from torchhal_cuda128.hardware import Device, Hardware

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132)
B200 = Device("NVIDIA B200", (10, 0), 180 << 30, 148)
RTX_5090 = Device("NVIDIA GeForce RTX 5090", (12, 0), 32 << 30, 170)
READY = Hardware("2.13.0+cu128", (12, 8), (12, 8), devices=(H100,), arch_list=("sm_90", "sm_100", "sm_120"))

SHARED = {9: 227 << 10, 10: 227 << 10, 12: 99 << 10}
"""Bytes of shared memory that one program may have, by compute capability major."""
CUDA = torch.device("cuda", 0)


def problem(**fields: Any) -> MatmulProblem:
    types = {"a_dtype": torch.bfloat16, "b_dtype": torch.bfloat16, "out_dtypes": (torch.bfloat16,)}
    return MatmulProblem(CUDA, **{**types, **fields})


def test_a_plan_names_the_engines() -> None:
    pytest.importorskip("triton")
    plain, fused = matmul.plan(problem(), READY), matmul.plan(problem(bias_dtype=torch.float32), READY)
    assert isinstance(plain, Plan)
    assert isinstance(fused, Plan)
    assert plain.description == "Triton, Hopper, one pass, cuBLAS from 512 rows, columns and terms on"
    assert fused.description == "Triton, Hopper, one pass"
    assert plain.deterministic
    assert not plain.unfused


@pytest.mark.parametrize("device", [B200, RTX_5090], ids=lambda d: str(d.name))
def test_products_where_the_kernels_have_never_run_are_declined(device: Any) -> None:
    answer = matmul.plan(problem(), replace(READY, devices=(device,)))
    assert isinstance(answer, Decline)
    assert answer.code == "architecture_untried"


def test_results_that_triton_does_not_write_are_declined() -> None:
    pytest.importorskip("triton")
    answer = matmul.plan(problem(out_dtypes=(torch.float8_e5m2,)), READY)
    assert isinstance(answer, Decline)
    assert answer.code == "out_dtype"


class Noted:
    """Stands for the Triton kernels, and counts."""

    calls = 0

    def __call__(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        self.calls += 1
        return ()


@pytest.mark.parametrize(("change", "by_triton"), [
    ({}, False),
    ({"bias": torch.zeros(512)}, True),
    ({"out_dtypes": (torch.bfloat16,)}, True),
    ({"a": torch.zeros(511, 512)}, True),  # its sums might be cut
    ({"b": torch.zeros(512, 1024)[:, ::2]}, True),  # it would be copied
    ({"a": torch.zeros(2, 512, 512)}, True),
])  # fmt: skip
def test_cublas_takes_plain_large_products_and_nothing_else(change: dict[str, Any], by_triton: bool) -> None:
    noted = Noted()
    call = {
        "a": torch.zeros(512, 512),
        "b": torch.zeros(512, 512),
        "bias": None,
        "out_dtypes": (torch.float32,),
        **change,
    }
    matmul.Multiplier(noted)(call["a"], call["b"], call["bias"], NO_FUNCTIONS, call["out_dtypes"])  # type: ignore[arg-type]
    assert noted.calls == by_triton


@pytest.mark.parametrize("major", sorted(matmul_tiles.TILES))
@pytest.mark.parametrize("rows", [1, 16, 64, 512, 4096])
@pytest.mark.parametrize(
    ("mode", "kind"), [("half", "tensor"), ("half", "int8"), ("split", "tensor"), ("full", "tensor")]
)
def test_tiles_of_each_family_fit_its_shared_memory(major: int, rows: int, mode: str, kind: str) -> None:
    for columns in (64, 4096):
        found: Tiles = matmul_tiles.TILES[major](Work(1, rows, columns, 4096, mode, kind, "", True))
        size = 4 if mode == "full" else 2
        assert found.inner * (found.rows + found.columns) * size * found.stages <= SHARED[major]


def test_the_sum_is_cut_until_each_multiprocessor_has_a_program() -> None:
    assert matmul_tiles.tuning(H100).multiprocessors == 132


@pytest.mark.hardware
@pytest.mark.parametrize("rows", [1, 300])
def test_a_real_device_computes_what_float64_computes(rows: int) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((rows, 512), (512, 640)))
    residual = torch.randn(rows, 640, device="cuda", dtype=torch.bfloat16)
    found = torchhal.matmul(
        a, b, epilogue=lambda v, n, r, c: F.gelu(v) + residual[r, c], backend="cuda128", fusion="require"
    )
    expected = F.gelu(a.double() @ b.double()) + residual.double()
    torch.testing.assert_close(found.double(), expected, rtol=8e-3, atol=1e-3)
