"""Freeze the profiles of a new edition of the conformance suite: ``python tools/freeze.py 2027.05``.

An edition that was released is never frozen again; its file changes no more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from torchhal_conformance import corpus

FOLDER: Final = Path(corpus.__file__).with_name("profiles")


def main(edition: str) -> None:
    path = FOLDER / f"{edition}.json"
    if path.exists():
        raise SystemExit(f"{edition} is frozen already: {path}")
    path.write_text(json.dumps(corpus.freeze(), indent=1) + "\n", encoding="utf-8")
    print(f"{path}: set EDITION in corpus.py to {edition!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
