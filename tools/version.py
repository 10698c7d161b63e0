"""The version of every distribution, kept in one place: the file VERSION at the root.

``python tools/version.py`` prints it, ``--check`` compares what the distributions say, ``--write`` stamps
them, ``--write 0.2.0`` changes it everywhere. The stamp is a plain static ``version`` in each
pyproject.toml, so that installing by path, from an sdist or from a wheel needs nothing outside the folder. The
ranges by which the distributions require each other, ``torchhal>=0.1.0,<0.2``, are stamped with it.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r'^version = "([^"]*)"( # stamped from VERSION by tools/version\.py)?$', re.MULTILINE)
STAMP = 'version = "{}" # stamped from VERSION by tools/version.py'
REQUIREMENT = re.compile(r'"(torchhal(?:-[a-z0-9-]+)?)>=[^"]*"')


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


def requirement(name: str, version: str) -> str:
    """How the distributions require each other: this version or a later one with the same first two numbers."""
    major, minor = version.split(".")[:2]
    return f'"{name}>={version},<{major}.{int(minor) + 1}"'


def disagreements(root: Path = ROOT) -> list[str]:
    """One sentence for each distribution whose version is not that of VERSION."""
    wanted, found = current(root), []
    for path in distributions(root):
        text = path.read_text()
        said = LINE.search(text)
        if said is None or said[1] != wanted:
            got = f'"{said[1]}"' if said else "no static version line"
            found.append(
                f'{path.relative_to(root)}: expected version = "{wanted}", as in VERSION, and found {got}'
            )
        for match in REQUIREMENT.finditer(text):
            if match[0] != requirement(match[1], wanted):
                expected = requirement(match[1], wanted)
                found.append(f"{path.relative_to(root)}: expected {expected} and found {match[0]}")
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
        path.write_text(REQUIREMENT.sub(lambda match: requirement(match[1], version), text))


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
