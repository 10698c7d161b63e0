"""What the doctor says is missing, and the command that mends it, on machines that are described to it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from torchhal_cuda128.doctor import Advice, advice, describe
from torchhal_cuda128.hardware import Device, Hardware, observe, unsuitable

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132)
A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 << 30, 108)
B300 = Device("NVIDIA B300", (10, 3), 270 << 30, 148)
RTX_5090 = Device("NVIDIA GeForce RTX 5090", (12, 0), 32 << 30, 170)
COMPLETE = Hardware(
    "2.11.0+cu130", torch_cuda=(13, 0), driver_cuda=(13, 0), devices=(H100,), arch_list=("sm_90", "sm_100", "sm_120"),
    driver="580.159.04", triton="3.6.0", torch_triton="==3.6.0", fa4="4.0.0b36",
)  # fmt: skip
CPU_ONLY = Hardware("2.13.0+cpu", torch_cuda=None, driver_cuda=(13, 0), triton="3.7.1")
LINUX, ARM, WINDOWS = (
    {"system": "Linux", "machine": "x86_64"},
    {"system": "Linux", "machine": "aarch64"},
    {"system": "Windows", "machine": "AMD64"},
)
CU130 = "-m uv pip install --reinstall-package torch torch --torch-backend=cu130"
CU128 = '-m uv pip install --reinstall-package torch "torch==2.11.*" --torch-backend=cu128'


def only(hardware: Hardware) -> Advice:
    (found,) = advice(hardware)
    return found


def test_a_complete_machine_has_nothing_to_mend() -> None:
    assert advice(COMPLETE) == ()
    assert describe(COMPLETE)["mend"] == []


@pytest.mark.parametrize(("system", "python"), [(LINUX, "python3"), (ARM, "python3"), (WINDOWS, "py")])  # fmt: skip
def test_a_torch_for_cpus_is_replaced_by_the_one_that_the_driver_runs(
    system: dict[str, str], python: str
) -> None:
    found = only(replace(CPU_ONLY, **system))  # type: ignore[arg-type]
    assert found.code == "torch_without_cuda"
    assert found.reason.startswith("torch 2.13.0+cpu is built without CUDA")
    assert found.command == f"{python} -m pip install -U uv && {python} {CU130}"
    older = only(replace(CPU_ONLY, driver_cuda=(12, 8), **system))  # type: ignore[arg-type]
    assert older.command == f"{python} -m pip install -U uv && {python} {CU128}"


@pytest.mark.parametrize(("system", "named"), [(LINUX, "Linux x86_64"), (ARM, "Linux aarch64"), (WINDOWS, "Windows")])  # fmt: skip
def test_a_missing_driver_is_named_by_its_branch_and_system(system: dict[str, str], named: str) -> None:
    found = only(replace(COMPLETE, driver_cuda=None, devices=(), **system))  # type: ignore[arg-type]
    assert found.code == "no_driver"
    assert found.command == f"install driver 580 or later for {named} from https://www.nvidia.com/drivers"


def test_a_driver_older_than_torch_may_be_kept_with_another_torch() -> None:
    found = only(replace(COMPLETE, driver_cuda=(12, 8), devices=()))
    assert found.reason == "the driver runs CUDA up to 12.8; 13.0 or later is needed"
    assert found.command.startswith("install driver 580 or later for Linux x86_64")
    assert found.command.endswith(f"; or keep it: python3 -m pip install -U uv && python3 {CU128}")


def test_a_driver_older_than_any_usable_torch_has_to_be_replaced() -> None:
    found = only(replace(COMPLETE, torch_cuda=(12, 8), driver_cuda=(12, 4), devices=()))
    assert found.command.startswith("install driver 570 or later") and "pip" not in found.command


@pytest.mark.parametrize("device", [H100, B300, RTX_5090], ids=lambda d: str(d.name))
def test_a_torch_without_kernels_for_the_device_says_which_it_has(device: Device) -> None:
    found = only(replace(COMPLETE, devices=(device,), arch_list=("sm_80", "sm_86")))
    assert found.code == "torch_without_arch"
    assert device.name in found.reason and found.reason.endswith("is compiled for sm_80, sm_86")
    assert found.command == f"python3 -m pip install -U uv && python3 {CU130}"


def test_a_device_too_old_is_stated_and_no_command_promises_to_mend_it() -> None:
    assert advice(replace(COMPLETE, devices=(A100,))) == ()
    assert "compute capability 8.0" in str(describe(replace(COMPLETE, devices=(A100,)))["status"])


def test_torch_that_sees_no_device_is_sent_to_what_lists_them() -> None:
    found = only(replace(COMPLETE, devices=(), error="CUDA unknown error"))
    assert "CUDA unknown error" in found.reason and found.command.startswith("nvidia-smi")


@pytest.mark.parametrize(("triton", "code"), [(None, "triton_missing"), ("3.5.1", "triton_too_old")])
@pytest.mark.parametrize(("own", "wanted"), [("==3.6.0", "==3.6.0"), ("~=3.9.0", "~=3.9.0"), ("", ">=3.6")])
def test_triton_is_installed_as_torch_names_it(triton: str | None, code: str, own: str, wanted: str) -> None:
    found = only(replace(COMPLETE, triton=triton, torch_triton=own))
    assert found.code == code
    assert "the kernels for Hopper need 3.6 or later" in found.reason
    assert found.command == f'python3 -m pip install --force-reinstall --no-deps "triton{wanted}"'


def test_on_windows_triton_is_another_distribution() -> None:
    found = only(replace(COMPLETE, triton=None, **WINDOWS))  # type: ignore[arg-type]
    assert found.command == 'py -m pip install -U "triton-windows>=3.6"'


@pytest.mark.parametrize("version", [None, "4.0.0b20", "4.1.0"])
@pytest.mark.parametrize(("cuda", "name"), [((12, 8), "fa4"), ((13, 0), "fa4-cu13")])
@pytest.mark.parametrize("system", [LINUX, ARM], ids=lambda s: str(s["machine"]))
def test_flash_attention_is_offered_with_the_compiler_for_torchs_cuda(
    version: str | None, cuda: tuple[int, int], name: str, system: dict[str, str]
) -> None:
    found = only(replace(COMPLETE, fa4=version, torch_cuda=cuda, **system))  # type: ignore[arg-type]
    assert found.code == ("fa4_incompatible" if version else "fa4_missing")
    assert version is None or version in found.reason
    assert found.command == f'python3 -m pip install -U "torchhal-cuda128[{name}]"'


@pytest.mark.parametrize("hardware", [
    replace(COMPLETE, fa4=None, devices=(RTX_5090,)),
    replace(COMPLETE, fa4=None, **WINDOWS),  # type: ignore[arg-type]
    replace(COMPLETE, fa4=None, devices=(A100,)),
], ids=["consumer Blackwell", "Windows", "Ampere"])  # fmt: skip
def test_flash_attention_is_not_offered_where_it_would_not_be_used(hardware: Hardware) -> None:
    assert "fa4_missing" not in [found.code for found in advice(hardware)]


def test_each_device_of_a_machine_is_mended_for_itself_and_once() -> None:
    mixed = replace(COMPLETE, devices=(H100, RTX_5090, RTX_5090), arch_list=("sm_90",), fa4=None)
    assert [found.code for found in advice(mixed)] == ["torch_without_arch", "fa4_missing"]


def test_the_report_names_system_driver_and_releases() -> None:
    text = describe(COMPLETE)
    assert text["system"] == "Linux x86_64"
    assert (text["driver"], text["driver runs CUDA up to"]) == ("580.159.04", "13.0")
    assert (text["torch built for CUDA"], text["triton"], text["flash-attn-4"]) == ("13.0", "3.6.0", "4.0.0b36")  # fmt: skip
    assert text["torch compiled for"] == ["sm_90", "sm_100", "sm_120"]


def test_what_keeps_this_machine_from_serving_is_among_what_there_is_to_mend() -> None:
    seen = observe()
    verdict = unsuitable(seen)
    if verdict is not None and verdict.code != "capability_too_low":
        assert verdict.code in [found.code for found in advice(seen)]
