"""The cuda128 backend's verdicts on machines it was told about, and its behaviour on the one it runs on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity

from torchhal.problems import ContextParallelProblem, Decline, DeployProblem, Plan
from torchhal.registry import Backend, verify
from torchhal_cuda128 import deploy, plugin
from torchhal_cuda128.doctor import describe
from torchhal_cuda128.hardware import Device, Hardware, observe, unsuitable

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132)
B200 = Device("NVIDIA B200", (10, 0), 180 << 30, 148)
B300 = Device("NVIDIA B300", (10, 3), 270 << 30, 148)
RTX_5090 = Device("NVIDIA GeForce RTX 5090", (12, 0), 32 << 30, 170)
GB10 = Device("NVIDIA GB10", (12, 1), 120 << 30, 48)
A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 << 30, 108)
THOR = Device("NVIDIA Thor", (11, 0), 120 << 30, 20)

ARCHES = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
READY = Hardware("2.13.0+cu128", torch_cuda=(12, 8), driver_cuda=(12, 8), devices=(H100,), arch_list=ARCHES)
CPU_ONLY = Hardware("2.13.0+cpu", torch_cuda=None, driver_cuda=None)
PROFILER = DeployProblem(torch.device("cuda", 0), task="profiler")
COMPILE = DeployProblem(torch.device("cuda", 0), task="compile_options")


def code(decline: Decline | Plan | None) -> str:
    assert isinstance(decline, Decline), decline
    return decline.code


def backend() -> Backend:
    outcome = verify("cuda128", "torchhal-cuda128", plugin)
    assert isinstance(outcome, Backend), outcome
    return outcome


@pytest.mark.parametrize("device", [H100, B200, B300, RTX_5090, GB10], ids=lambda d: str(d.name))
def test_hopper_and_blackwell_are_suitable(device: Device) -> None:
    assert unsuitable(replace(READY, devices=(device,))) is None


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        (CPU_ONLY, "torch_without_cuda"),
        (replace(READY, torch_cuda=(12, 6)), "torch_cuda_too_old"),
        (replace(READY, driver_cuda=None), "no_driver"),
        (replace(READY, driver_cuda=(12, 4)), "driver_too_old"),
        (replace(READY, devices=()), "no_device"),
        (replace(READY, devices=(A100,)), "capability_too_low"),
        (replace(READY, devices=(THOR,)), "capability_unknown"),
        (replace(READY, devices=(RTX_5090,), arch_list=("sm_80", "sm_90")), "torch_without_arch"),
    ],
)
def test_each_obstacle_has_its_own_code(hardware: Hardware, expected: str) -> None:
    assert code(unsuitable(hardware)) == expected


def test_a_torch_for_a_later_major_release_needs_a_driver_of_that_release() -> None:
    verdict = unsuitable(replace(READY, torch_cuda=(13, 0), driver_cuda=(12, 9)))
    assert str(verdict) == "the driver runs CUDA up to 12.9; 13.0 or later is needed [driver_too_old]"


def test_a_driver_of_the_same_major_release_runs_a_later_torch() -> None:
    assert unsuitable(replace(READY, torch_cuda=(12, 9), driver_cuda=(12, 8))) is None


def test_a_capability_that_is_too_low_is_stated_with_the_name_of_the_device() -> None:
    assert "NVIDIA A100-SXM4-80GB has compute capability 8.0" in str(
        unsuitable(replace(READY, devices=(A100,)))
    )


def test_each_device_of_a_machine_is_judged_on_its_own() -> None:
    mixed = replace(READY, devices=(A100, H100))
    assert code(unsuitable(mixed, 0)) == "capability_too_low"
    assert unsuitable(mixed, 1) is None
    assert "torch sees 2" in str(unsuitable(mixed, 2))


def test_virtual_code_of_an_earlier_release_counts_and_of_a_later_one_does_not() -> None:
    blackwell = replace(READY, devices=(RTX_5090,))
    assert unsuitable(replace(blackwell, arch_list=("compute_90",))) is None
    assert code(unsuitable(replace(blackwell, arch_list=("compute_121", "sm_100a")))) == "torch_without_arch"


def test_the_error_of_a_broken_driver_is_quoted() -> None:
    assert "no CUDA-capable device" in str(
        unsuitable(replace(READY, devices=(), error="no CUDA-capable device is detected"))
    )


def test_compile_options_are_options_that_inductor_has() -> None:
    plan = deploy.plan(COMPILE, READY)
    assert isinstance(plan, Plan)
    options = plan.run()
    assert options["max_autotune"] is True
    assert set(options) <= set(torch._inductor.list_options())


def test_profiler_activities_are_offered_only_by_a_profiler_that_records_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: {ProfilerActivity.CPU})
    assert code(deploy.plan(PROFILER, READY)) == "profiler_without_cuda"
    monkeypatch.setattr(
        torch.profiler, "supported_activities", lambda: {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    )
    plan = deploy.plan(PROFILER, READY)
    assert isinstance(plan, Plan)
    assert plan.run() == [ProfilerActivity.CPU, ProfilerActivity.CUDA]


@pytest.mark.parametrize("problem", [PROFILER, COMPILE], ids=lambda p: str(p.task))
def test_deployment_without_the_hardware_is_declined_with_the_true_reason(problem: DeployProblem) -> None:
    assert code(deploy.plan(problem, CPU_ONLY)) == "torch_without_cuda"


def test_the_plugin_satisfies_the_specification_on_this_machine() -> None:
    assert backend().info.device_types == {"cuda"}


def test_families_without_kernels_are_declined_as_unclaimed() -> None:
    assert code(backend().ask(ContextParallelProblem(torch.device("cuda", 0)))) == "unclaimed_family"


def test_a_task_without_a_claim_is_declined_by_the_core() -> None:
    assert code(backend().ask(DeployProblem(torch.device("cuda", 0), task="quantizer"))) == "unclaimed_task"


def test_the_probe_describes_this_machine_and_says_the_same_as_the_verdict() -> None:
    verdict = unsuitable(observe())
    assert backend().info.probe()["status"] == (str(verdict) if verdict else "ready")


def test_the_description_names_architecture_and_releases() -> None:
    text = describe(replace(READY, devices=(RTX_5090,)))
    assert text["torch built for CUDA"] == "12.8"
    (device,) = text["devices"]  # type: ignore[misc]
    assert device["compute capability"] == "12.0"
    assert device["architecture"] == "Blackwell"


def test_deployment_on_this_machine_is_planned_exactly_where_the_hardware_is_suitable() -> None:
    answer = backend().ask(PROFILER)
    assert isinstance(answer, Plan) == (unsuitable(observe(), 0) is None)


@pytest.mark.hardware
def test_a_real_device_is_ready_and_computes() -> None:
    assert unsuitable(observe()) is None
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.hardware
def test_a_real_device_compiles_with_the_options_offered() -> None:
    answer = backend().ask(COMPILE)
    assert isinstance(answer, Plan)
    a, b = torch.randn(256, 256, device="cuda"), torch.randn(256, 256, device="cuda")
    compiled = torch.compile(lambda x, y: torch.relu(x @ y), options=answer.run())
    torch.testing.assert_close(compiled(a, b), torch.relu(a @ b), rtol=1e-2, atol=1e-2)
