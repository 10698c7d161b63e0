"""Every test of the core starts with no backend installed but the reference, and no choice made by the environment."""

from __future__ import annotations

import os

if (
    "PORTABLE_DEVICE" not in os.environ
):  # before anything imports Triton, which decides once how kernels are run
    os.environ["TRITON_INTERPRET"] = "1"

import importlib
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_backends import FakeEntryPoint, Install
from installed_backends import Site, clean_environment

from torchhal import registry, selection

LIBRARY = "TORCHHAL_CPU_X86_LIBRARY"
BUILT_BY_HAND = os.environ.get(LIBRARY)


@pytest.fixture(autouse=True)
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs backends for one test: ``install("name", plugin)`` or ``install("name", error=ImportError(...))``."""
    points: list[FakeEntryPoint] = []
    real = metadata.entry_points

    def entry_points(**wanted: Any) -> Any:
        return points if wanted.get("group") == registry.ENTRY_POINT_GROUP else real(**wanted)

    for name in [name for name in os.environ if name.startswith("TORCHHAL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHHAL_LOCK", "")
    monkeypatch.setattr(registry.metadata, "entry_points", entry_points)
    selection.reset()

    def add(
        name: str, plugin: object = None, *, error: BaseException | None = None, distribution: str = ""
    ) -> None:
        points.append(FakeEntryPoint(name, plugin, error, distribution or f"dist-of-{name}"))
        selection.reset()

    yield add
    points.clear()
    selection.reset()


@pytest.fixture
def native(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """The x86 backend, where it is installed. Where the processor can run it and it declines, that is a failure."""
    if BUILT_BY_HAND is not None:
        monkeypatch.setenv(LIBRARY, BUILT_BY_HAND)
    plugin = pytest.importorskip("torchhal_cpu_x86.plugin")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the kernels need AVX2, which torch does not find in this processor")
    refusal = importlib.import_module("torchhal_cpu_x86.hardware").decline()
    assert refusal is None, str(refusal)
    install("cpu_x86", plugin)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A place to install made-up backends in, which processes started from here find too."""
    clean_environment(monkeypatch, tmp_path / "selection.lock.json")
    yield Site(tmp_path / "site", monkeypatch)
    selection.reset()


@pytest.fixture
def restored(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that run inside this process find, and leave, their own ``sys.argv`` and ``sys.path``."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", ["the script's folder comes here", *sys.path])
