"""The version of every distribution, kept in one place: the file VERSION at the root.

``python tools/version.py`` prints it, ``--check`` compares what the distributions say, ``--write`` stamps
them, ``--write 0.2.0`` changes it everywhere. The stamp is a plain static ``version`` in each
pyproject.toml, so that installing by path, from an sdist or from a wheel needs nothing outside the folder.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r'^version = "([^"]*)"( # stamped from VERSION by tools/version\.py)?$', re.MULTILINE)
STAMP = 'version = "{}" # stamped from VERSION by tools/version.py'


def distributions(root: Path = ROOT) -> list[Path]:
    """The pyproject.toml of every distribution, the core's first."""
    return [
        root / "core/pyproject.toml",
        *sorted(root.glob("backends/*/pyproject.toml")),
        root / "conformance/pyproject.toml",
    ]


def current(root: Path = ROOT) -> str:
    """The one version."""
    return (root / "VERSION").read_text().strip()


def disagreements(root: Path = ROOT) -> list[str]:
    """One sentence for each distribution whose version is not that of VERSION."""
    wanted, found = current(root), []
    for path in distributions(root):
        said = LINE.search(path.read_text())
        if said is None or said[1] != wanted:
            got = f'"{said[1]}"' if said else "no static version line"
            found.append(
                f'{path.relative_to(root)}: expected version = "{wanted}", as in VERSION, and found {got}'
            )
    return found


def write(version: str, root: Path = ROOT) -> None:
    """Stamp ``version`` into VERSION and every distribution."""
    (root / "VERSION").write_text(f"{version}\n")
    for path in distributions(root):
        text, count = LINE.subn(STAMP.format(version), path.read_text(), count=1)
        if not count:
            raise SystemExit(
                f"{path}: has no line of the form {STAMP.format('0.0.0')!r}; add one under [project]"
            )
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 when a distribution disagrees")
    parser.add_argument(
        "--write", nargs="?", const=current(), metavar="VERSION", help="stamp every distribution"
    )
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write)
    problems = disagreements() if arguments.check else []
    print("\n".join(problems) or current())
    if problems:
        print("run: python tools/version.py --write")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
