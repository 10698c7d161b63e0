"""The xpu backend's verdicts on machines it was told about, and its behaviour on the one it runs on."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata

import pytest
import torch
from torch.profiler import ProfilerActivity

from torchhal.problems import AttentionProblem, Decline, DeployProblem, Plan
from torchhal.registry import Backend, verify
from torchhal_xpu import deploy, plugin
from torchhal_xpu.hardware import Device, Hardware, cannot_compile, describe, observe, unsuitable
from torchhal_xpu.providers import installed, legacy_providers

A770 = Device(
    "Intel(R) Arc(TM) A770 Graphics",
    "1.6.33578",
    16 << 30,
    512,
    (8, 16, 32),
    matrix_units=True,
    bfloat16=True,
)
B580 = Device(
    "Intel(R) Arc(TM) B580 Graphics",
    "1.6.34666",
    12 << 30,
    160,
    (16, 32),
    matrix_units=True,
    float64=True,
    bfloat16=True,
)
LUNAR_LAKE = Device(
    "Intel(R) Arc(TM) Graphics 140V", "1.6.34666", 28 << 30, 64, (16, 32), matrix_units=True, bfloat16=True
)
METEOR_LAKE = Device("Intel(R) Arc(TM) Graphics", "1.6.33578", 28 << 30, 128, (8, 16, 32))

READY = Hardware(
    torch_version="2.13.0+xpu",
    platform="linux",
    torch_sycl="20260000",
    level_zero=True,
    devices=(B580,),
    xccl=True,
    triton={"triton-xpu": "3.7.0"},
)
CPU_ONLY = Hardware(torch_version="2.13.0+cpu", platform="linux", torch_sycl=None)
PROFILER = DeployProblem(torch.device("xpu", 0), task="profiler")
COMPILE = DeployProblem(torch.device("xpu", 0), task="compile_options")


def code(decline: Decline | Plan | None) -> str:
    assert isinstance(decline, Decline), decline
    return decline.code


def backend() -> Backend:
    outcome = verify("xpu", "torchhal-xpu", plugin)
    assert isinstance(outcome, Backend), outcome
    return outcome


@pytest.mark.parametrize("device", [A770, B580, LUNAR_LAKE, METEOR_LAKE], ids=lambda d: str(d.name))
@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_arc_and_core_ultra_are_suitable_on_linux_and_windows(device: Device, platform: str) -> None:
    assert unsuitable(replace(READY, platform=platform, devices=(device,))) is None


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        (CPU_ONLY, "torch_without_xpu"),
        (replace(READY, platform="darwin"), "other_platform"),
        (replace(READY, level_zero=False), "no_driver"),
        (replace(READY, devices=()), "no_device"),
    ],
)
def test_each_obstacle_has_its_own_code(hardware: Hardware, expected: str) -> None:
    assert code(unsuitable(hardware)) == expected


def test_a_build_without_xpu_is_named_with_where_to_get_the_other_one() -> None:
    verdict = unsuitable(CPU_ONLY)
    assert verdict is not None
    assert "2.13.0+cpu" in verdict.reason
    assert "install torch's XPU build" in verdict.reason


def test_a_device_index_that_does_not_exist_says_how_many_there_are() -> None:
    assert "torch sees 1" in str(unsuitable(READY, 3))


def test_the_error_of_a_broken_driver_is_quoted() -> None:
    assert "UR_RESULT_ERROR" in str(
        unsuitable(replace(READY, devices=(), error="UR_RESULT_ERROR_DEVICE_LOST"))
    )


@pytest.mark.parametrize(
    ("triton", "expected"),
    [
        ({"triton-xpu": "3.7.0", "triton": "3.9.0"}, "triton_conflict"),
        ({"triton-xpu": "3.7.0", "pytorch-triton-xpu": "3.5.0"}, "triton_conflict"),
        ({"triton": "3.9.0"}, "no_triton"),
        ({}, "no_triton"),
    ],
)
def test_compiling_needs_exactly_the_triton_that_knows_these_gpus(
    triton: dict[str, str], expected: str
) -> None:
    hardware = replace(READY, triton=triton)
    assert code(cannot_compile(hardware)) == expected
    assert code(deploy.plan(COMPILE, hardware)) == expected


def test_compiling_on_windows_needs_the_level_zero_sdk() -> None:
    windows = replace(READY, platform="win32")
    assert code(cannot_compile(windows)) == "no_level_zero_sdk"
    assert cannot_compile(replace(windows, level_zero_sdk=True)) is None


def test_compile_options_are_options_that_inductor_has() -> None:
    plan = deploy.plan(COMPILE, READY)
    assert isinstance(plan, Plan)
    assert set(plan.run()) <= set(torch._inductor.list_options())


def test_profiler_activities_are_offered_only_by_a_profiler_that_records_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.profiler, "supported_activities", lambda: {ProfilerActivity.CPU})
    assert code(deploy.plan(PROFILER, READY)) == "profiler_without_xpu"
    monkeypatch.setattr(
        torch.profiler, "supported_activities", lambda: {ProfilerActivity.CPU, ProfilerActivity.XPU}
    )
    plan = deploy.plan(PROFILER, READY)
    assert isinstance(plan, Plan)
    assert plan.run() == [ProfilerActivity.CPU, ProfilerActivity.XPU]


def test_a_legacy_provider_for_another_torch_is_named_unusable_without_an_import() -> None:
    (provider,) = legacy_providers("2.13.0+xpu", {"intel-extension-for-pytorch": "2.8.10+xpu"})
    assert not provider.usable
    assert "needs torch 2.8.*" in provider.reason
    assert "torch 2.13.0+xpu is installed" in provider.reason


def test_a_legacy_provider_of_the_same_torch_release_is_usable() -> None:
    versions = {"intel-extension-for-pytorch": "2.8.10+xpu", "oneccl-bind-pt": "2.8.0+xpu"}
    assert [p.usable for p in legacy_providers("2.8.0+xpu", versions)] == [True, True]


def test_a_legacy_provider_with_an_unreadable_version_is_unusable() -> None:
    (provider,) = legacy_providers("2.13.0", {"oneccl-bind-pt": "nightly-from-somewhere"})
    assert not provider.usable
    assert "not readable" in provider.reason


def test_providers_are_found_by_metadata_and_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "intel-extension-for-pytorch":
            return "2.8.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert installed(("intel-extension-for-pytorch", "oneccl-bind-pt")) == {
        "intel-extension-for-pytorch": "2.8.0"
    }


def test_the_plugin_satisfies_the_specification_on_this_machine() -> None:
    assert backend().info.device_types == {"xpu"}


def test_kernel_families_are_declined_as_unclaimed() -> None:
    assert code(backend().ask(AttentionProblem(torch.device("xpu", 0)))) == "unclaimed_family"


def test_a_task_without_a_claim_is_declined_by_the_core() -> None:
    assert code(backend().ask(DeployProblem(torch.device("xpu", 0), task="package"))) == "unclaimed_task"


def test_the_probe_describes_this_machine_and_says_the_same_as_the_verdict() -> None:
    seen = observe()
    verdict = unsuitable(seen)
    assert backend().info.probe()["status"] == (str(verdict) if verdict else "ready")


def test_the_description_carries_driver_and_traits_of_each_device() -> None:
    (device,) = describe(READY)["devices"]  # type: ignore[misc]
    assert device["driver"] == "1.6.34666"
    assert device["matrix units"] is True


def test_deployment_on_this_machine_is_planned_exactly_where_the_hardware_is_suitable() -> None:
    answer = backend().ask(PROFILER)
    assert isinstance(answer, Plan) == (unsuitable(observe(), 0) is None)


@pytest.mark.hardware
def test_a_real_device_is_ready_and_computes() -> None:
    assert unsuitable(observe()) is None
    assert torch.ones(3, device="xpu").sum().item() == 3
    assert isinstance(backend().ask(PROFILER), Plan)
