"""Distributions agree with each other: versions, extras, entry points, licences, types."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [
    "core",
    "conformance",
    *(f"backends/{p.parent.name}" for p in sorted(ROOT.glob("backends/*/pyproject.toml"))),
]
VERSION = (ROOT / "VERSION").read_text().strip()


def project(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    return content


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_backend_folder_is_a_distribution() -> None:
    assert {"backends/_template", "backends/cpu_x86", "backends/cuda128", "backends/xpu"} <= set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_version_is_the_one_in_version(folder: str) -> None:
    assert project(folder)["version"] == VERSION


def test_a_version_that_disagrees_is_reported_with_what_was_expected(tmp_path: Path) -> None:
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "pyproject.toml").write_text('[project]\nversion = "9.9"\n')
    (tmp_path / "VERSION").write_text("1.2.3\n")
    version = tool("version")
    assert len(version.disagreements(tmp_path)) == len(FOLDERS)
    assert 'expected version = "1.2.3", as in VERSION, and found "9.9"' in version.disagreements(tmp_path)[0]
    version.write("2.0.0", tmp_path)
    assert version.disagreements(tmp_path) == []
    assert version.current(tmp_path) == "2.0.0"


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_distribution_is_licensed_typed_and_says_which_python(folder: str) -> None:
    about = project(folder)
    assert about["license"] == "BSD-3-Clause"
    assert about["requires-python"] == ">=3.11"
    assert (ROOT / folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (ROOT / folder / about["readme"]).is_file()
    assert (ROOT / folder / "src" / about["name"].replace("-", "_") / "py.typed").is_file()


def test_the_extras_are_those_promised_and_name_distributions_of_this_repository() -> None:
    extras = project("core")["optional-dependencies"]
    assert set(extras) == {"cpu-x86", "cuda128", "xpu", "conformance", "bench"}
    names = {project(folder)["name"] for folder in FOLDERS}
    for extra in ("cpu-x86", "cuda128", "xpu", "conformance"):
        (requirement,) = map(Requirement, extras[extra])
        assert requirement.name == f"torchhal-{extra}"
        assert requirement.name in names
        assert requirement.specifier.contains(VERSION, prereleases=True)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f != "core"])
def test_what_depends_on_the_core_accepts_this_version_of_it(folder: str) -> None:
    requirements = {r.name: r.specifier for r in map(Requirement, project(folder)["dependencies"])}
    assert requirements["torchhal"].contains(VERSION, prereleases=True)


def test_torch_is_accepted_from_the_first_release_with_the_functions_used() -> None:
    requirements = {r.name: r.specifier for r in map(Requirement, project("core")["dependencies"])}
    assert requirements["torch"] == SpecifierSet(">=2.10")


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.startswith("backends/")])
def test_a_backend_has_one_entry_point_named_after_its_folder(folder: str) -> None:
    name = folder.removeprefix("backends/").lstrip("_")
    assert project(folder)["entry-points"]["torchhal.backends"] == {name: f"torchhal_{name}.plugin"}


def test_every_pinned_requirement_of_the_tools_is_constrained() -> None:
    pinned = {canonicalize_name(Requirement(line).name) for line in _lines(ROOT / "constraints.txt")}
    for path in (ROOT / "requirements").glob("*.txt"):
        needed = {canonicalize_name(Requirement(line).name) for line in _lines(path)}
        assert needed <= pinned, f"{path.name} needs {needed - pinned}, which constraints.txt does not pin"


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-"))]


def test_a_backend_without_its_hardware_is_reported_as_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = tool("hardware")
    monkeypatch.setattr(hardware, "_open", lambda name: None)
    assert hardware.main(["cuda128"]) == hardware.NOT_RUN
    assert hardware.main(["xpu"]) == hardware.NOT_RUN
    assert capsys.readouterr().out.splitlines() == [
        "not run: no CUDA driver is installed",
        "not run: no Level Zero loader is installed",
    ]


def test_another_processor_is_reported_as_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = tool("hardware")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "aarch64")
    assert hardware.main(["cpu_x86"]) == hardware.NOT_RUN
    assert "aarch64, and x86-64 is needed" in capsys.readouterr().out


def test_the_installed_core_has_the_version_in_version() -> None:
    assert metadata.version("torchhal") == VERSION


def test_importing_the_core_imports_no_backend() -> None:
    code = "import torchhal, sys; print([m for m in sys.modules if m.startswith('torchhal_')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f != "core"])
def test_what_builds_on_the_core_imports_only_its_public_modules(folder: str) -> None:
    private = re.compile(
        r"^\s*(?:from|import)\s+(torchhal(?:\.\w+)*\._\w+|torchhal import _\w+)", re.MULTILINE
    )
    for path in (ROOT / folder / "src").rglob("*.py"):
        assert private.findall(path.read_text(encoding="utf-8")) == [], path


LAZY = """
import sys, torchhal
early = [name for name in ("cache", "deploy", "foreach", "inventory", "mode") if f"torchhal.{name}" in sys.modules]
assert not early, early
missing = [name for name in torchhal.__all__ if not hasattr(torchhal, name) or name not in dir(torchhal)]
assert not missing, missing
assert torchhal.deploy is sys.modules["torchhal.deploy"]
try:
    torchhal.attend
except AttributeError as error:
    assert "has no attribute 'attend'" in str(error)
"""


def test_what_is_rarely_used_is_imported_when_it_is_asked_for() -> None:
    subprocess.run([sys.executable, "-c", LAZY], check=True, timeout=60)
