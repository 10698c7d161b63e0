"""A process that examines cases one by one, so that what a backend does to it is done to nobody else.

It is told case ids and answers with results over a local connection of its own; standard output and error stay free for
whatever the backend prints.
"""

from __future__ import annotations

import json
import os
import sys
from multiprocessing.connection import Client
from typing import Any

ADDRESS = "TORCHHAL_CONFORMANCE_WORKER"
"""Environment variable with the address and the key of the connection; nobody is to set it by hand."""
READY = b"ready"


def main() -> None:
    """Serve one parent until it hangs up."""
    host, port, key = os.environ.pop(ADDRESS).split(" ")
    with Client((host, int(port)), authkey=bytes.fromhex(key)) as connection:
        _serve(connection, *sys.argv[1:])


def _serve(connection: Any, backend: str, plugin: str, seed: str) -> None:
    import torch

    from torchhal.registry import registry
    from torchhal_conformance import corpus, examine, explore

    torch.manual_seed(0)
    if plugin:
        backend = examine.load_plugin(plugin)
    registry()  # which imports what is installed
    corpus.cases(int(seed))  # seconds that are no case's
    connection.send_bytes(READY)
    while True:
        try:
            name = connection.recv_bytes().decode()
        except EOFError:
            return
        case_named = explore.case_named if name.startswith("explore.") else corpus.case_named
        result = {"case": name, **examine.examine(case_named(name, int(seed)), backend)}
        connection.send_bytes(json.dumps(result).encode())


if __name__ == "__main__":
    main()
