"""Graphs are canonical, storable, and refuse text that is not theirs; composing them keeps their meaning."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

from torchhal.errors import InvalidProblem
from torchhal.pointwise import (
    Graph,
    GraphBuilder,
    and_masks,
    capture,
    concatenate,
    evaluate,
    masked_score,
    or_masks,
    shift,
    substitute,
)

F32, I32 = torch.float32, torch.int32
X = [("x", F32)]
MASK = [("b", I32), ("h", I32), ("q_idx", I32), ("kv_idx", I32)]
SCORE = [("score", F32), *MASK]


def graph_of(fn: Any, inputs: Any = X) -> Graph:
    return capture(fn, inputs).graph


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (lambda x: x * 2.0, lambda x: 2.0 * x),
        (lambda x: x + (1.0 + 2.0), lambda x: x + (torch.full_like(x, 1.0) + 2.0)),
        (lambda x: torch.sin(x) + torch.sin(x), lambda x: (lambda s: s + s)(x.sin())),
        (lambda x: (torch.exp(x), x)[1], lambda x: x),
        (lambda x: x.double().float(), lambda x: x),
        (lambda x: torch.clamp(x, 0, 1), lambda x: x.clamp(min=0.0, max=1.0)),
        (lambda x: x + torch.zeros_like(x) * 2, lambda x: x + 0.0),
        (lambda x: torch.where(x > 0, x, x), lambda x: x),
    ],
)
def test_functions_that_do_the_same_have_one_graph(left: Any, right: Any) -> None:
    assert graph_of(left) == graph_of(right)
    assert graph_of(left).digest == graph_of(right).digest


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (lambda x: x * 0.0, lambda x: x * -0.0),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x - 1.0, lambda x: 1.0 - x),
        (lambda x: (x, x), lambda x: x),
        (lambda x: 0, lambda x: False),
    ],
)
def test_functions_that_differ_have_different_graphs(left: Any, right: Any) -> None:
    assert graph_of(left) != graph_of(right)
    assert graph_of(left).digest != graph_of(right).digest


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -0.0, 1e-45, 0.1, 3.4e38])
def test_every_float_constant_survives_text_and_pickle(value: float) -> None:
    graph = graph_of(lambda x: torch.where(x > 0, x, value))
    again = Graph.from_text(graph.to_text())
    assert again == graph and hash(again) == hash(graph) and again.digest == graph.digest
    assert pickle.loads(pickle.dumps(graph)) == graph
    result = evaluate(again, [torch.tensor([-1.0])])[0]
    expected = torch.tensor([value])
    assert torch.equal(result.view(torch.int32), expected.view(torch.int32)) or value != value


def test_the_digest_does_not_depend_on_the_process_or_its_hash_seed() -> None:
    code = (
        "import torch; from torchhal.pointwise import capture;"
        "t = torch.ones(3);"
        "print(capture(lambda x: torch.tanh(x * 0.5) + t[0 * x.int()], [('x', torch.float32)]).graph.digest)"
    )
    table = torch.ones(3)
    here = graph_of(lambda x: torch.tanh(x * 0.5) + table[0 * x.int()]).digest
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    there = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here and len(here) == 64


def changed(graph: Graph, **parts: Any) -> str:
    return json.dumps({**json.loads(graph.to_text()), **parts}, separators=(",", ":"))


def test_malformed_text_is_refused_with_the_reason() -> None:
    graph = graph_of(lambda x: x + 0.5)  # input, constant, add
    nodes = json.loads(graph.to_text())["nodes"]
    bad = {
        "{": "not JSON",
        "[]": "expected an object with the keys",
        changed(graph, version=9): "version 9 is not the version 1",
        changed(graph, inputs=[["x", "float12"]]): "input 0 has dtype 'float12'",
        changed(graph, inputs=[[3, "float32"]]): "input 0 must be named by a string",
        changed(graph, inputs=7): "inputs must be a list, got int",
        changed(graph, captured=[["float32", -1]]): "captured 0 must have a rank of 0 or more",
        changed(
            graph, nodes=[*nodes[:2], ["quux", "float32", [0, 1], None]]
        ): "node 2 is 'quux', which is no primitive",
        changed(
            graph, nodes=[*nodes[:2], ["add", "float32", [0], None]]
        ): "node 2 \\(add\\) takes 2 operands, got 1",
        changed(graph, nodes=[*nodes[:2], ["add", "float32", [0, 2], None]]): "node 2 refers to node 2",
        changed(
            graph, nodes=[*nodes[:2], ["add", "float64", [0, 1], None]]
        ): "says float64, but it gives float32",
        changed(
            graph, nodes=[*nodes[:2], ["logical_and", "bool", [0, 1], None]]
        ): "expects bool operands, got float32",
        changed(graph, nodes=[["input", "float32", [], 4], *nodes[1:]]): "reads position 4 of 1",
        changed(
            graph, nodes=[nodes[0], ["constant", "float32", [], "0.50"], nodes[2]]
        ): "no float32 constant",
        changed(
            graph, nodes=[nodes[0], ["constant", "float32", [], "0.1"], nodes[2]]
        ): "holds '0.1', which is no float32 constant",
        changed(graph, nodes=[*nodes[:2], ["add", "float32", [0, 1], 5]]): "takes no attribute, got 5",
        changed(graph, outputs=[9]): "outputs refers to node 9",
        changed(graph, outputs=[True]): "outputs refers to node True",
        changed(graph, outputs=[0]): "not in canonical form",
        graph.to_text() + " ": "not in canonical form",
    }
    for text, reason in bad.items():
        with pytest.raises(InvalidProblem, match=reason):
            Graph.from_text(text)


def test_a_graph_prints_as_a_listing() -> None:
    table = torch.ones(2, 2)
    text = str(graph_of(lambda x, q: x + table[q, 0], [("x", F32), ("q", I32)]))
    assert text.splitlines()[:2] == ["graph(x: float32, q: int32)", "  captured 0: float32, 2-dim"]
    assert "captured 0[%1, %2]" in text and text.endswith("return %4")


def test_the_builder_refuses_operands_that_do_not_fit() -> None:
    builder = GraphBuilder([("x", F32), ("i", I32)], [(F32, 2)])
    with pytest.raises(InvalidProblem, match=r"add expects .* got float32, int32"):
        builder.apply("add", builder.input(0), builder.input(1))
    with pytest.raises(InvalidProblem, match=r"captured 0 has 2 dimensions, got 1 indices"):
        builder.gather(0, [builder.input(1)])
    with pytest.raises(InvalidProblem, match=r"gather expects one int32 or int64 index"):
        builder.gather(0, [builder.input(1), builder.input(0)])
    with pytest.raises(InvalidProblem, match=r"complex64"):
        GraphBuilder([("z", torch.complex64)])


def test_evaluate_refuses_wrong_tensors() -> None:
    table = torch.ones(3)
    graph = graph_of(lambda x, q: x + table[q], [("x", F32), ("q", I32)])
    x, q = torch.ones(3), torch.arange(3, dtype=I32)
    with pytest.raises(InvalidProblem, match=r"2 inputs, got 1"):
        evaluate(graph, [x], [table])
    with pytest.raises(InvalidProblem, match=r"input 'x' must be float32, got torch.float64"):
        evaluate(graph, [x.double(), q], [table])
    with pytest.raises(InvalidProblem, match=r"captured tensor 0 must have 1 dimensions, got shape \(1, 3\)"):
        evaluate(graph, [x, q], [table[None]])
    with pytest.raises(InvalidProblem, match=r"upcast must be a floating dtype"):
        evaluate(graph, [x, q], [table], upcast=I32)


def test_upcast_computes_in_float64_and_indices_count_from_the_end_or_are_clamped() -> None:
    table = torch.tensor([1.0, 2.0, 3.0])
    graph = graph_of(lambda x, q: torch.sin(x) * table[q - 1], [("x", F32), ("q", I32)])
    x, q = torch.rand(3), torch.arange(3, dtype=I32)
    (exact,) = evaluate(graph, [x, q], [table], upcast=torch.float64)
    assert torch.equal(exact, torch.sin(x.double()) * table.double()[q.long() - 1])
    far = torch.tensor([-7, 2, 99], dtype=I32)
    with pytest.raises(
        InvalidProblem, match=r"captured tensor 0 has shape \(3,\), and the function reads index -8"
    ):
        evaluate(graph, [x, far], [table])
    (clamped,) = evaluate(graph, [x, far], [table], clamp_indices=True)
    assert torch.equal(clamped, torch.sin(x) * table[[0, 1, 2]])


def test_evaluate_broadcasts_and_accepts_empty_inputs_and_fake_tensors() -> None:
    table = torch.rand(4)
    graph = graph_of(lambda x, q: x + table[q], [("x", F32), ("q", I32)])
    x, q = torch.rand(2, 3, 4), torch.arange(4, dtype=I32)
    assert torch.equal(evaluate(graph, [x, q], [table])[0], x + table)
    assert evaluate(graph, [x[:0], q], [table])[0].shape == (0, 3, 4)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, q, table)]
        assert evaluate(graph, fake[:2], fake[2:])[0].shape == (2, 3, 4)


def test_shift_adds_a_captured_offset_to_an_index() -> None:
    causal = capture(lambda b, h, q, kv: q >= kv, MASK)
    shifted = shift(causal.graph, "q_idx", torch.int64)
    assert shifted.inputs == causal.graph.inputs
    zero, q, kv = torch.zeros((), dtype=I32), torch.arange(4, dtype=I32)[:, None], torch.arange(6, dtype=I32)
    (result,) = evaluate(shifted, [zero, zero, q, kv], [torch.tensor(2)])
    assert torch.equal(result, q + 2 >= kv)


def test_substitute_replaces_an_input_and_merges_inputs_by_name() -> None:
    outer = graph_of(lambda x, y: x * y, [("x", F32), ("y", F32)])
    inner = graph_of(lambda y, z: y + z, [("y", F32), ("z", F32)])
    made = substitute(outer, "x", inner)
    assert [name for name, _ in made.inputs] == ["y", "z"]
    y, z = torch.rand(3), torch.rand(3)
    assert torch.equal(evaluate(made, [y, z])[0], (y + z) * y)
    with pytest.raises(InvalidProblem, match=r"no input 'w'; it has x, y"):
        substitute(outer, "w", inner)
    with pytest.raises(InvalidProblem, match=r"1 outputs, so no output 3"):
        substitute(outer, "x", inner, output=3)
    with pytest.raises(InvalidProblem, match=r"is torch.float32, but its replacement gives torch.bool"):
        substitute(outer, "x", graph_of(lambda y: y > 0, [("y", F32)]))


def test_masks_combine_and_share_captured_tensors() -> None:
    limit = torch.tensor(2)
    causal = capture(lambda b, h, q, kv: q >= kv, MASK)
    near = capture(lambda b, h, q, kv: q - kv < limit, MASK)
    far = capture(lambda b, h, q, kv: kv < limit, MASK)
    both, either = and_masks(causal, near, far), or_masks(causal, near)
    assert len(both.tensors) == 1 and both.tensors[0] is limit
    zero, q, kv = torch.zeros((), dtype=I32), torch.arange(4, dtype=I32)[:, None], torch.arange(6, dtype=I32)
    args = [zero, zero, q, kv]
    assert torch.equal(evaluate(both.graph, args, both.tensors)[0], (q >= kv) & (q - kv < 2) & (kv < 2))
    assert torch.equal(evaluate(either.graph, args, either.tensors)[0], (q >= kv) | (q - kv < 2))
    assert and_masks().graph.output_dtypes == (torch.bool,)
    with pytest.raises(InvalidProblem, match=r"expected one bool output, got float32"):
        and_masks(causal, capture(lambda s, *_: s, SCORE))


def test_masked_score_and_concatenate_join_functions() -> None:
    score = capture(lambda s, b, h, q, kv: s * 2, SCORE)
    causal = capture(lambda b, h, q, kv: q >= kv, MASK)
    made = masked_score(score, causal)
    zero, q, kv = torch.zeros((), dtype=I32), torch.arange(3, dtype=I32)[:, None], torch.arange(3, dtype=I32)
    s = torch.rand(3, 3)
    (result,) = evaluate(made.graph, [s, zero, zero, q, kv], made.tensors)
    assert torch.equal(result, torch.where(q >= kv, s * 2, -float("inf")))
    assert concatenate(score, causal).graph.output_dtypes == (F32, torch.bool)
    with pytest.raises(
        InvalidProblem, match=r"'q_idx' is torch.int32 in one function and torch.float32 in the other"
    ):
        concatenate(causal, capture(lambda q: q, [("q_idx", F32)]))


def test_an_exponent_keeps_the_digits_that_torch_reads_and_no_other_constant_may() -> None:
    graph = graph_of(lambda x: torch.pow(x, 3.7) + 3.7, X)
    assert [node.attribute for node in graph.nodes if node.primitive == "constant"] == [
        "3.7",
        "3.700000047683716",
    ]
    assert Graph.from_text(graph.to_text()) == graph
    with pytest.raises(InvalidProblem, match=r"node 3 holds '3\.7', which is no float32 constant"):
        Graph.from_text(graph.to_text().replace("3.700000047683716", "3.7"))
