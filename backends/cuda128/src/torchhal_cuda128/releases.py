"""Release numbers, as the packages and the driver state them."""

from __future__ import annotations

import re


def release(text: str) -> tuple[int, int]:
    """Major and minor number that a version begins with: (3, 6) for ``3.6.0+git``; (0, 0) for what begins with none."""
    found = re.match(r"(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def dotted(numbers: tuple[int, ...]) -> str:
    """``12.8`` for (12, 8)."""
    return ".".join(map(str, numbers))
