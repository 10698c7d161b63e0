"""The core and the conformance suite know no vendor: what they say holds for hardware nobody has built yet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = sorted(
    path.name for path in (ROOT / "backends").iterdir() if path.is_dir() and not path.name.startswith("_")
)
VENDORS = (
    "nvidia",
    "intel",
    "amd",
    "qualcomm",
    "geforce",
    "radeon",
    "hopper",
    "blackwell",
    "xeon",
    "epyc",
)
NAME = re.compile(rf"(?<![A-Za-z0-9])({'|'.join((*VENDORS, *BACKENDS))})(?![A-Za-z0-9])", re.IGNORECASE)
SOURCES = sorted([*ROOT.glob("core/src/**/*.py"), *ROOT.glob("conformance/src/**/*.py")])


def found(text: str) -> list[str]:
    return [f"line {n}: {m[0]}" for n, line in enumerate(text.splitlines(), 1) for m in NAME.finditer(line)]


def test_there_are_sources_and_backends_to_look_for() -> None:
    assert len(SOURCES) > 20
    assert {"cpu_x86", "cuda128", "xpu"} <= set(BACKENDS)


@pytest.mark.parametrize("text", ["import torchhal_cuda128", "# as on Intel", "device == 'xpu'", "NVIDIA's"])
def test_a_name_is_found_in_whatever_form(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize("text", ["platform.machine() == 'AMD64'", "warm up", "x86_64", "charm"])
def test_what_only_looks_like_a_name_is_left_alone(text: str) -> None:
    assert not found(text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_names_a_vendor_or_a_backend_of_one(path: Path) -> None:
    assert found(path.read_text(encoding="utf-8")) == []
