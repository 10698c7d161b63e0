"""The command line: ``torchhal doctor``, ``run``, ``explain``, ``tune``, ``bench`` and ``cache``."""

from __future__ import annotations


def main() -> None:
    """Run the ``torchhal`` console script."""
    from torchhal.cli.app import app

    app(prog_name="torchhal")


__all__ = ["main"]
