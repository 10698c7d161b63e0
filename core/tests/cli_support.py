"""What the tests of the command line share: an environment of their own, and commands run in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from torchhal.cli.app import app


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def document(*arguments: str, exit_code: int = 0) -> Any:
    """The JSON document on standard output, on which there must be nothing else."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)
