"""Let the model of chat.py answer the same questions under torch alone and under torchhal, and compare.

    python examples/compare.py
    python examples/compare.py "Name three rivers." --repeat 5 --json
    python examples/compare.py --weights q4

With ``--weights q4`` torchhal's side computes with the 4-bit blocks of the file, and torch's with the same numbers expanded
to float32.

Both sides run in one process and take turns, so that whatever else the machine does meets both alike. Printed are the
answers, tokens per second of both, the largest difference of the logits along the answer, and which
backend served what. Then ``torchhal run chat.py`` has to give the first answer once more, from a process of its own.

Exit code 1 when a call was not served by the expected backend or, unless in bfloat16, when the answers differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import chat
import torch
from comparison import SIDES, Comparison, overall, served_text, show, title
from transformers import DynamicCache

import torchhal
from torchhal.nn.report import bytes_of

HERE: Final = Path(__file__).resolve().parent
LONG: Final = "Summarise the following text in three sentences.\n\n"
FAMILIES: Final = ("attention", "matmul")

Served = dict[str, Counter[str]]
"""Calls of each family, by who served them."""


def say(text: str = "") -> None:
    """Progress, which is no result."""
    print(text, file=sys.stderr, flush=True)


def no_calls() -> Served:
    return {family: Counter() for family in FAMILIES}


def calls_so_far() -> Served:
    """Calls routed so far in this process."""
    calls = no_calls()
    for route in torchhal.routes():
        if route.problem.family in FAMILIES:
            calls[route.problem.family][route.chosen or "nobody"] += route.count
    return calls


@dataclass(frozen=True)
class Expected:
    """How many calls of each family one forward pass of a model under torchhal makes."""

    attention: int
    matmul: int

    @staticmethod
    def of(model: Any) -> Expected:
        """One call for each layer of attention, and one for each linear layer that goes through torchhal."""
        fused = sum(isinstance(module, torchhal.nn.FusedLinear) for module in model.modules())
        return Expected(int(model.config.num_hidden_layers), fused)

    def in_passes(self, passes: int) -> dict[str, int]:
        return {"attention": passes * self.attention, "matmul": passes * self.matmul}


@dataclass
class Ledger:
    """Runs things under one side or the other, and counts what went through the model under torchhal."""

    models: dict[str, Any]
    """By side; the same model for both, unless torchhal's is quantised."""
    passes: int = 0
    served: Served = field(default_factory=no_calls)

    @property
    def expected(self) -> dict[str, int]:
        """Calls of each family in all forward passes so far."""
        return Expected.of(self.models["torchhal"]).in_passes(self.passes)

    @contextlib.contextmanager
    def under(self, side: str) -> Iterator[Any]:
        """The side's model, to be run in the block."""
        model = self.models[side]
        if side == "torch":
            yield model
            return
        before = calls_so_far()
        hook = model.register_forward_pre_hook(self._count)
        try:
            with torchhal.install():  # as torchhal run does
                yield model
        finally:
            hook.remove()
            for family, calls in calls_so_far().items():
                self.served[family] += calls - before[family]

    def _count(self, *_: object) -> None:
        self.passes += 1


def forced_logits(model: Any, answer: chat.Answer) -> torch.Tensor:
    """Logits before each token of ``answer``, (tokens, vocabulary), the answer being fed in as it stands.

    The prompt goes through in one pass and every token in one of its own, as in generation.
    """
    cache = DynamicCache(config=model.config)
    chunks = [answer.prompt, *([token] for token in answer.tokens[:-1])]
    with torch.inference_mode():
        rows = [
            model(torch.tensor([chunk]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0]
            for chunk in chunks
        ]
    return torch.cat(rows).float()


def compare(ledger: Ledger, tokenizer: Any, question: str, repeat: int, max_new_tokens: int) -> Comparison:
    """Both sides in turn, ``repeat`` times, each side being first as often as the other."""
    answers: dict[str, list[chat.Answer]] = {side: [] for side in SIDES}
    for repetition in range(repeat):
        for side in SIDES if repetition % 2 == 0 else SIDES[::-1]:
            with ledger.under(side) as model:
                answers[side].append(chat.ask(model, tokenizer, question, max_new_tokens))
        say(f"  {repetition + 1}/{repeat}")
    logits = {}
    for side in SIDES:
        with ledger.under(side) as model:
            logits[side] = forced_logits(model, answers["torch"][0])
    difference = (logits["torch"] - logits["torchhal"]).abs().max().item()
    return Comparison(question, answers, difference, logits["torch"].abs().max().item())


@dataclass(frozen=True)
class CommandRun:
    """What ``torchhal run chat.py QUESTION`` said and routed."""

    code: int
    output: str
    served: Served

    def document(self) -> dict[str, Any]:
        peak = [line for line in self.output.splitlines() if line.startswith("peak memory")]
        return {"code": self.code, "served": self.served, "peak": "".join(peak)}


def run_command(question: str, max_new_tokens: int, weights: str) -> CommandRun:
    """Run the unmodified chat.py under the command line, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "routes.json"
        command = [sys.executable, "-m", "torchhal.cli", "run", "--quiet", "--routes", str(file)]
        program = [str(HERE / "chat.py"), question, "--max-new-tokens", str(max_new_tokens)]
        program += ["--weights", weights]
        done = subprocess.run([*command, *program], stdout=subprocess.PIPE, text=True)
        routes = json.loads(file.read_text())["routes"] if file.exists() else []
    served = no_calls()
    for route in routes:
        if route["problem"]["family"] in FAMILIES:
            served[route["problem"]["family"]][route["chosen"]] += route["count"]
    return CommandRun(done.returncode, done.stdout, served)


def unserved(what: str, served: Served, expected: dict[str, int], backends: dict[str, str]) -> list[str]:
    """A sentence for each family of which not exactly the expected calls were served, all of them by its backend."""
    return [
        f"{what}: expected {expected[family]} {family} calls served by {backends[family]}, and found {served_text(calls)}"
        for family, calls in served.items()
        if dict(calls) != ({backends[family]: expected[family]} if expected[family] else {})
    ]


def failures(
    comparisons: list[Comparison],
    ledger: Ledger,
    command: CommandRun | None,
    exact: bool,
    backends: dict[str, str],
) -> list[str]:
    """Everything that makes this a failure, in sentences."""
    found = unserved("in this process", ledger.served, ledger.expected, backends)
    for c in comparisons if exact else ():
        if not c.identical:
            found.append(f"the answers to {title(c.question)!r} differ after {c.agreeing()} tokens")
    if command is not None:
        answer = comparisons[0].answers["torchhal"][0]
        expected = Expected.of(ledger.models["torchhal"]).in_passes(len(answer.tokens))
        found += unserved("torchhal run", command.served, expected, backends)
        if command.code != 0:
            found.append(f"torchhal run ended with exit code {command.code}")
        if answer.text not in command.output:
            found.append(f"torchhal run answered otherwise: {command.output!r}")
    return found


def result(
    options: argparse.Namespace, comparisons: list[Comparison], ledger: Ledger, command: CommandRun | None
) -> dict[str, Any]:
    """The JSON document."""
    exact = options.weights != "bf16"
    backends = {"attention": options.backend, "matmul": options.linear_backend}
    return {
        "weights": options.weights,
        "threads": torch.get_num_threads(),
        "repeat": options.repeat,
        "questions": [comparison.document() for comparison in comparisons],
        "tokens_per_second": overall(comparisons, statistics.median),
        "best_tokens_per_second": overall(comparisons, min),
        "passes": ledger.passes,
        "expected": ledger.expected,
        "served": ledger.served,
        "megabytes": {side: round(bytes_of(model) / 1e6, 1) for side, model in ledger.models.items()},
        "routes": [json.loads(route.to_json()) for route in torchhal.routes()],
        "torchhal_run": None if command is None else command.document(),
        "failures": failures(comparisons, ledger, command, exact, backends),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="chat.py under torch alone and under torchhal, compared.")
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help="by default two short ones and one long one"
    )
    parser.add_argument(
        "--max-new-tokens", type=chat.positive, default=32, metavar="N", help="length of an answer (32)"
    )
    parser.add_argument("--repeat", type=chat.positive, default=3, metavar="N", help="turns of each side (3)")
    parser.add_argument(
        "--weights",
        choices=chat.WEIGHTS,
        default="f32",
        help="as for chat.py; with q4 torch alone takes f32 (f32)",
    )
    parser.add_argument(
        "--backend", default="cpu_x86", help="who has to serve every attention call (cpu_x86)"
    )
    parser.add_argument(
        "--linear-backend", default="cpu_x86", help="with q4, who has to serve every linear layer (cpu_x86)"
    )
    parser.add_argument(
        "--skip-run", action="store_true", help="leave out torchhal run in a process of its own"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    say("loading the model")
    start = time.perf_counter()
    model, tokenizer = chat.load("f32" if options.weights == "q4" else options.weights)
    ours = chat.load("q4")[0] if options.weights == "q4" else model
    say(f"  {time.perf_counter() - start:.0f} s")
    questions = options.questions or [*chat.QUESTIONS, LONG + (HERE / "article.txt").read_text()]
    ledger = Ledger({"torch": model, "torchhal": ours})
    for side in SIDES:  # the first call of each pays for what later ones find ready
        with ledger.under(side) as warmed:
            chat.ask(warmed, tokenizer, "Hello.", 4)
    comparisons = []
    for question in questions:
        say(f"torch and torchhal in turn: {title(question)}")
        comparisons.append(compare(ledger, tokenizer, question, options.repeat, options.max_new_tokens))
    command = None
    if not options.skip_run:
        say("torchhal run examples/chat.py")
        command = run_command(questions[0], options.max_new_tokens, options.weights)
    document = result(options, comparisons, ledger, command)
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        show(document, comparisons, torchhal.routes())
    raise SystemExit(1 if document["failures"] else 0)


if __name__ == "__main__":
    main()
