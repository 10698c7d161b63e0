"""Run as ``context_parallel_checks.py RENDEZVOUS RANK WORLD OUT``: one rank of the context-parallel tests.

Each ``check_*`` function of the two modules gets a ``Rank``; what it raises is written to OUT as JSON, by name.
"""

from __future__ import annotations

import datetime
import json
import sys
import traceback
from collections.abc import Callable

import context_parallel_refusals
import context_parallel_results
import torch
import torch.distributed as dist
from context_parallel_support import Rank
from torch.distributed.device_mesh import init_device_mesh

CHECKS: dict[str, Callable[[Rank], None]] = {
    name.removeprefix("check_"): function
    for module in (context_parallel_results, context_parallel_refusals)
    for name, function in vars(module).items()
    if name.startswith("check_")
}


def main(rendezvous: str, rank: int, world: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )
    me = Rank(rank, world, init_device_mesh("cpu", (world,)))
    results = dict.fromkeys(CHECKS, "not run: an earlier check left the ranks out of step")
    try:
        for name, check in CHECKS.items():
            torch.manual_seed(len(name))
            try:
                check(me)
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
            dist.barrier()
        dist.destroy_process_group()
    finally:
        with open(out, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
