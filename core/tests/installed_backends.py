"""Backends for tests, installed for real: a module and its distribution's metadata in a folder on the path."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Final

import pytest

from torchhal import selection

REAL_ENTRY_POINTS: Final = metadata.entry_points
"""What finds entry points on the path; other tests replace it, and here it is what is tested."""

PLUGIN = """
import time

import torch
import torch.nn.functional as F

import torchhal
from torchhal.problems import AttentionClaims, BackendInfo, Capabilities, Decline, Plan

CLAIMS = AttentionClaims(dtypes=frozenset({{torch.float32}}), layouts=frozenset({{"dense"}}), causal=True, gqa=True, backward=True)


def probe():
    {probe}


def run(query, key, value, attn_mask, scale, operands):
    time.sleep({delay})
    return F.scaled_dot_product_attention(query, key, value, is_causal={causal}, scale=scale, enable_gqa=True) * {factor}


@torchhal.hookimpl
def torchhal_backend():
    return BackendInfo(
        "{name}", "nobody", frozenset({{"cpu"}}), ">=1.0,<2", Capabilities(attention=CLAIMS), {{"cpu": {preference}}}, probe
    )


@torchhal.hookimpl
def torchhal_attention(problem):
    if problem.head_size == 13:
        return Decline("unlucky", "does not like 13")
    return Plan(run, "sleeps {delay} s", differentiable=True)
"""


class Site:
    """A folder that counts as installed while the test runs; ``TORCHHAL_PLUGINS`` admits nothing else."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.names: list[str] = []
        folder.mkdir()
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(metadata, "entry_points", REAL_ENTRY_POINTS)
        self._admit()

    def add(
        self,
        name: str,
        *,
        delay: float = 0.0,
        factor: float = 1.0,
        causal: str = "False",
        preference: int = 50,
        probe: str = 'return {"status": "ready", "answer": 42, "fma_gflops": lambda: 1e9}',
    ) -> None:
        """Install a backend that waits ``delay`` seconds and multiplies the right result by ``factor``."""
        text = PLUGIN.format(
            name=name, delay=delay, factor=factor, causal=causal, preference=preference, probe=probe
        )
        self.add_module(name, text)

    def add_module(self, name: str, text: str) -> None:
        """Install a plugin with this source, as version 1.5 of the distribution ``fake-NAME``."""
        self.monkeypatch.delitem(sys.modules, f"installed_{name}", raising=False)
        (self.folder / f"installed_{name}.py").write_text(text, encoding="utf-8")
        described = self.folder / f"fake_{name}-1.5.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: fake-{name}\nVersion: 1.5\n", encoding="utf-8"
        )
        entry_points = f"[torchhal.backends]\n{name} = installed_{name}\n"
        (described / "entry_points.txt").write_text(entry_points, encoding="utf-8")
        self.names.append(name)
        self._admit()

    def _admit(self) -> None:
        self.monkeypatch.setenv("TORCHHAL_PLUGINS", ",".join(self.names))
        selection.reset()


def clean_environment(monkeypatch: pytest.MonkeyPatch, lock: Path) -> None:
    """No setting of the person who runs the tests, and a lock file of the test's own."""
    for name in list(os.environ):
        if name.startswith("TORCHHAL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHHAL_LOCK", str(lock))
    monkeypatch.setenv("COLUMNS", "200")
