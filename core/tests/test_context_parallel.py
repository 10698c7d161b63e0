"""Context parallelism over real gloo process groups of two and three ranks, and its errors without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchhal
from torchhal import _offsets
from torchhal.context_parallel import context_parallel, known_schemes
from torchhal.errors import InvalidProblem, Unsupported
from torchhal.problems import ContextParallelProblem, Decline
from torchhal.reference import context_parallel as reference
from torchhal.selection import select

PROGRAM = Path(__file__).with_name("context_parallel_checks.py")
NAMES = [
    line[len("def check_") : line.index("(")]
    for module in ("results", "refusals")
    for line in PROGRAM.with_name(f"context_parallel_{module}.py").read_text().splitlines()
    if line.startswith("def check_")
]


@pytest.fixture(scope="module", params=[2, 3], ids=["two ranks", "three ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank's checks raised, by name; the processes run once for all tests."""
    world: int = request.param
    folder = tmp_path_factory.mktemp(f"ranks{world}")
    outs = [folder / f"{rank}.json" for rank in range(world)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder / "rendezvous"), str(rank), str(world), str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        logs = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(out.exists() for out in outs), "\n".join(logs)
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.parametrize("name", NAMES)
def test_on_every_rank(results: list[dict[str, str]], name: str) -> None:
    faults = [f"rank {rank}: {result[name]}" for rank, result in enumerate(results) if result[name]]
    assert not faults, "\n".join(faults)


def test_without_torch_distributed_the_error_says_how_to_start_it() -> None:
    with (
        pytest.raises(InvalidProblem, match=r"not initialised in this process; call.*init_process_group"),
        context_parallel(None),
    ):
        pass


def test_known_schemes_are_those_of_the_installed_backends_and_auto() -> None:
    assert {"all_gather", "auto"} <= set(known_schemes())


def test_a_scheme_nobody_claims_is_declined_by_name() -> None:
    problem = ContextParallelProblem(device=torch.device("cpu"), scheme="rings", world_size=2)
    with pytest.raises(
        Unsupported, match=r"reference: does not claim the scheme 'rings' \[unclaimed_scheme\]"
    ):
        select(problem)
    assert isinstance(reference.plan(problem), Decline)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 0), (3, 3), (2, 7), (40, 0), (0, 40)])
def test_a_part_of_a_causal_mask_hides_what_the_whole_mask_hides_there(row: int, column: int) -> None:
    rows, columns = 6, 9
    whole = torch.ones(60, 60, dtype=torch.bool).tril()[row : row + rows, column : column + columns]
    part = _offsets.locate(
        torch.zeros(1, 1, rows, 2),
        torch.zeros(1, 1, columns, 2),
        query_offset=row,
        key_offset=column,
        score_mod=None,
        block_mask=None,
        attn_mask=None,
        is_causal=True,
    )
    if part.attn_mask is not None:
        visible = part.attn_mask
    else:
        visible = torch.ones(rows, columns, dtype=torch.bool)
    if part.is_causal:
        visible = visible.tril()
    assert torch.equal(visible, whole)
    assert part.is_causal == (row == column), (
        "the native form is used wherever the diagonal starts at the corner"
    )


def test_a_block_mask_for_all_keys_is_not_applied_to_some() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu")
    with pytest.raises(InvalidProblem, match="over 8 keys can not be applied to keys 4 to 8 alone"):
        _offsets.locate(
            torch.zeros(1, 1, 8, 2),
            torch.zeros(1, 1, 4, 2),
            query_offset=0,
            key_offset=4,
            score_mod=None,
            block_mask=mask,
            attn_mask=None,
            is_causal=False,
        )


def test_partial_results_over_each_ranks_keys_merge_into_the_whole() -> None:
    """What a ring scheme does with LocalAttention: keys in pieces, an LSE for each, then merge_attention."""
    from torchhal.context_parallel import AttentionArguments, LocalAttention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (4, 10, 10))
    arguments = AttentionArguments(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j) / 8, is_causal=True)
    call = LocalAttention(arguments, rank=1, query_lengths=(3, 4, 3), key_lengths=(3, 4, 3))
    assert call.query_offset == 3
    assert call.key_offsets == (0, 3, 7)
    whole = call(q, k, v)
    parts = [
        call(q, k[:, :, at : at + n], v[:, :, at : at + n], key_offset=at, return_lse=True)
        for at, n in zip(call.key_offsets, call.key_lengths, strict=True)
    ]
    merged, _ = torchhal.merge_attention([out for out, _ in parts], [lse for _, lse in parts])
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)
