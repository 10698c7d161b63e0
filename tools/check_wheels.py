"""Installs the wheels in dist/ into an empty folder and asks the installed packages who they are.

Proves that the wheels are complete: nothing is imported from the source tree, and torch and the other
dependencies come from the environment that runs this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))
from version import current

ROOT: Final = Path(__file__).resolve().parent.parent

QUESTION: Final = """
import importlib.metadata as m, importlib.resources as r, sys
for name in {names}:
    assert m.version(name) == {version!r}, (name, m.version(name))
    module = name.replace("-", "_")
    assert r.files(module).joinpath("py.typed").is_file(), f"{{name}} has no py.typed"
    assert m.metadata(name)["License-Expression"] == "BSD-3-Clause", name
    assert any("LICENSE" in str(f) for f in m.files(name)), f"{{name}} has no LICENSE"
found = sorted(p.name for p in m.entry_points(group="torchhal.backends"))
assert found == ["cpu_x86", "cuda128", "template", "xpu"], found
import torchhal.registry
registry = torchhal.registry.registry()
assert not registry.failures, registry.failures
print("wheels:", ", ".join(f"{{n}} {{b.version}}" for n, b in registry.backends.items()))
"""


def main() -> None:
    names = [
        "torchhal",
        "torchhal-conformance",
        "torchhal-cpu-x86",
        "torchhal-cuda128",
        "torchhal-xpu",
        "torchhal-template",
    ]
    wheels = [
        next((ROOT / "dist").glob(f"{name.replace('-', '_')}-{current()}-*.whl"), None) for name in names
    ]
    if None in wheels:
        raise SystemExit(f"dist/ lacks wheels of version {current()}; run: python tools/dev.py build")
    with tempfile.TemporaryDirectory() as folder:
        install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder]
        subprocess.run([sys.executable, *install, *map(str, wheels)], check=True)
        question = QUESTION.format(names=names, version=current())
        subprocess.run(
            [sys.executable, "-c", question], check=True, cwd=folder, env={**os.environ, "PYTHONPATH": folder}
        )


if __name__ == "__main__":
    main()
