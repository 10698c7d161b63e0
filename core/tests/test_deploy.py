"""Deployment on the CPU by torch's own means, and the errors where something is missing."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from torchhal import deploy
from torchhal.errors import InvalidProblem, Unsupported

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


@pytest.fixture
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    rows = torch.export.Dim("rows", min=1, max=64)
    return torch.export.export(Small(), (torch.randn(3, 8),), dynamic_shapes={"x": {0: rows}})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")  # torch's own use of it
def test_a_package_runs_what_was_exported_for_any_number_of_rows(
    program: torch.export.ExportedProgram, tmp_path: Path
) -> None:
    path = deploy.package(program, tmp_path / "small.pt2")
    assert path == (tmp_path / "small.pt2").absolute()
    model = deploy.load(path)
    for rows in (1, 3, 17):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            torch.testing.assert_close(model(x), program.module()(x))


def test_compile_options_are_accepted_by_torch_compile() -> None:
    options: Any = deploy.compile_options("cpu")
    torch.compile(Small(), options=options)
    assert deploy.compile_options(torch.device("cpu")) == options


def test_profiler_activities_record_work() -> None:
    activities = deploy.profiler_activities("cpu")
    assert activities == [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        torch.ones(4).add(1)
    assert any(event.key == "aten::add" for event in profile.key_averages())


def test_profiling_a_device_this_torch_was_not_built_for_says_so() -> None:
    with pytest.raises(Unsupported, match=r"was built without profiling of meta \[no_profiler\]"):
        deploy.profiler_activities("meta")


def test_each_call_gives_a_list_and_a_dictionary_of_its_own() -> None:
    deploy.profiler_activities("cpu").clear()
    deploy.compile_options("cpu")["x"] = 1
    assert deploy.profiler_activities("cpu")
    assert "x" not in deploy.compile_options("cpu")


# ---------------------------------------------------------------------------- quantizer


@pytest.fixture
def _fresh_choice() -> Any:
    """A choice depends on what is installed, so it is made anew before and after."""
    from torchhal import selection

    selection.reset()
    yield
    selection.reset()


@pytest.mark.usefixtures("_fresh_choice")
def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(Unsupported, match=r"not installed; run: pip install torchao \[missing_dependency\]"):
        deploy.quantizer("cpu")


@pytest.mark.usefixtures("_fresh_choice")
def test_a_torchao_that_does_not_import_is_not_taken_for_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    with pytest.raises(
        Unsupported, match=r"installed and its PT2E quantizer does not import \(.*\[broken_dependency\]"
    ):
        deploy.quantizer("cpu")


@pytest.mark.usefixtures("_fresh_choice")
def test_a_device_without_a_quantizer_says_which_have_one() -> None:
    with pytest.raises(Unsupported, match=r"for x86-64 and 64-bit Arm CPUs, not for meta .*\[other_device\]"):
        deploy.quantizer("meta")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_quantizer_quantises_an_exported_program(program: torch.export.ExportedProgram) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(program.module(), deploy.quantizer("cpu"))
    x = torch.randn(3, 8)
    exact = prepared(x)
    quantised = convert_pt2e(prepared)
    error = (quantised(x) - exact).abs().max()
    assert 0 < error < 0.05


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("device", ["toaster", None, 3.5])
def test_what_is_no_device_is_refused(device: Any) -> None:
    with pytest.raises(InvalidProblem, match="expected a torch device, such as 'cpu', and got"):
        deploy.compile_options(device)


def test_packaging_a_module_says_how_to_export_it(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidProblem, match=r"expects an ExportedProgram and got Small; make one with torch.export"
    ):
        deploy.package(Small(), tmp_path / "x.pt2")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x.zip", "missing/x.pt2"])
def test_packaging_to_another_path_is_refused(
    program: torch.export.ExportedProgram, tmp_path: Path, name: str
) -> None:
    with pytest.raises(InvalidProblem, match=r"a \.pt2 file in a directory that exists and got"):
        deploy.package(program, tmp_path / name)


def test_loading_nothing_and_loading_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidProblem, match="there is no package at"):
        deploy.load(tmp_path / "x.pt2")
    (tmp_path / "x.pt2").write_bytes(b"no zip")
    with pytest.raises(InvalidProblem, match="is no package, or a damaged one"):
        deploy.load(tmp_path / "x.pt2")


def test_a_backend_that_is_not_installed_is_refused_by_name() -> None:
    from torchhal.errors import BackendNotFound

    with pytest.raises(BackendNotFound, match="no backend is called 'nobody'"):
        deploy.compile_options("cpu", backend="nobody")
