"""Programs in processes of their own, for what a process can be asked once."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def printed_by(code: str) -> int:
    """The whole number that a program prints last; it has to succeed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])
