"""A process that examines cases one by one, so that what a backend does to it is done to nobody else.

It is told case ids and answers with results over a local connection of its own; standard output and error stay free for
whatever the backend prints.
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Client
from typing import Any

ADDRESS = "TORCHHAL_CONFORMANCE_WORKER"
"""Environment variable with the address and the key of the connection; nobody is to set it by hand."""


def main() -> None:
    """Serve one parent until it hangs up."""
    host, port, key = os.environ.pop(ADDRESS).split(" ")
    with Client((host, int(port)), authkey=bytes.fromhex(key)) as connection:
        _serve(connection, *sys.argv[1:])


def _serve(connection: Any, backend: str, plugin: str, seed: str) -> None:
    import torch

    from torchhal_conformance import examine
    from torchhal_conformance.corpus import case_named
    from torchhal_conformance.explore import random_case

    torch.manual_seed(0)
    if plugin:
        backend = examine.load_plugin(plugin)
    connection.send({"ready": backend})
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        case = random_case(name, int(seed)) if name.startswith("explore.") else case_named(name, int(seed))
        connection.send({"case": name, **examine.examine(case, backend)})


if __name__ == "__main__":
    main()
