"""Let the model of chat.py answer the same questions under torch alone and under torchhal, and compare.

    python examples/compare.py
    python examples/compare.py "Name three rivers." --repeat 5 --json

Both sides run in one process and take turns, so that whatever else the machine does meets both alike. Printed are the
answers, tokens per second of both, the largest difference of the logits along the answer, and which
backend served what. Then ``torchhal run chat.py`` has to give the first answer once more, from a process of its own.

Exit code 1 when an attention call was not served by the expected backend or, in float32, when the answers differ.
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

HERE: Final = Path(__file__).resolve().parent
LONG: Final = "Summarise the following text in three sentences.\n\n"
FAMILY: Final = "attention"


def say(text: str = "") -> None:
    """Progress, which is no result."""
    print(text, file=sys.stderr, flush=True)


def attention_calls() -> Counter[str]:
    """Attention calls routed so far in this process, by who served them."""
    calls: Counter[str] = Counter()
    for route in torchhal.routes():
        if route.problem.family == FAMILY:
            calls[route.chosen or "nobody"] += route.count
    return calls


@dataclass
class Ledger:
    """Runs things under one side or the other, and counts what went through the model under torchhal."""

    model: Any
    passes: int = 0
    served: Counter[str] = field(default_factory=Counter)

    @property
    def expected(self) -> int:
        """One attention call for each layer in each forward pass."""
        return int(self.passes * self.model.config.num_hidden_layers)

    @contextlib.contextmanager
    def under(self, side: str) -> Iterator[None]:
        if side == "torch":
            yield
            return
        before = attention_calls()
        hook = self.model.register_forward_pre_hook(self._count)
        try:
            with torchhal.install():  # as torchhal run does
                yield
        finally:
            hook.remove()
            self.served += attention_calls() - before

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
            with ledger.under(side):
                answers[side].append(chat.ask(ledger.model, tokenizer, question, max_new_tokens))
        say(f"  {repetition + 1}/{repeat}")
    logits = {}
    for side in SIDES:
        with ledger.under(side):
            logits[side] = forced_logits(ledger.model, answers["torch"][0])
    difference = (logits["torch"] - logits["torchhal"]).abs().max().item()
    return Comparison(question, answers, difference, logits["torch"].abs().max().item())


@dataclass(frozen=True)
class CommandRun:
    """What ``torchhal run chat.py QUESTION`` said and routed."""

    code: int
    output: str
    served: dict[str, int]


def run_command(question: str, max_new_tokens: int, dtype: str) -> CommandRun:
    """Run the unmodified chat.py under the command line, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "routes.json"
        command = [sys.executable, "-m", "torchhal.cli", "run", "--quiet", "--routes", str(file)]
        program = [str(HERE / "chat.py"), question, "--max-new-tokens", str(max_new_tokens), "--dtype", dtype]
        done = subprocess.run([*command, *program], stdout=subprocess.PIPE, text=True)
        routes = json.loads(file.read_text())["routes"] if file.exists() else []
    served: Counter[str] = Counter()
    for route in routes:
        if route["problem"]["family"] == FAMILY:
            served[route["chosen"]] += route["count"]
    return CommandRun(done.returncode, done.stdout, dict(served))


def unserved(what: str, served: dict[str, int], expected: int, backend: str) -> list[str]:
    """A sentence if not exactly ``expected`` calls were served, all of them by ``backend``."""
    if served == {backend: expected}:
        return []
    return [
        f"{what}: expected {expected} attention calls served by {backend}, and found {served_text(served)}"
    ]


def failures(
    comparisons: list[Comparison], ledger: Ledger, command: CommandRun | None, exact: bool, backend: str
) -> list[str]:
    """Everything that makes this a failure, in sentences."""
    found = unserved("in this process", dict(ledger.served), ledger.expected, backend)
    for c in comparisons if exact else ():
        if not c.identical:
            found.append(f"the answers to {title(c.question)!r} differ after {c.agreeing()} tokens")
    if command is not None:
        answer = comparisons[0].answers["torchhal"][0]
        expected = len(answer.tokens) * ledger.model.config.num_hidden_layers
        found += unserved("torchhal run", command.served, expected, backend)
        if command.code != 0:
            found.append(f"torchhal run ended with exit code {command.code}")
        if answer.text not in command.output:
            found.append(f"torchhal run answered otherwise: {command.output!r}")
    return found


def result(
    options: argparse.Namespace, comparisons: list[Comparison], ledger: Ledger, command: CommandRun | None
) -> dict[str, Any]:
    """The JSON document."""
    exact = options.dtype == "float32"
    return {
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "repeat": options.repeat,
        "questions": [comparison.document() for comparison in comparisons],
        "tokens_per_second": overall(comparisons, statistics.median),
        "best_tokens_per_second": overall(comparisons, min),
        "attention": {
            "layers": ledger.model.config.num_hidden_layers,
            "passes": ledger.passes,
            "expected": ledger.expected,
            "served": dict(ledger.served),
        },
        "routes": [json.loads(route.to_json()) for route in torchhal.routes()],
        "torchhal_run": None if command is None else {"code": command.code, "served": command.served},
        "failures": failures(comparisons, ledger, command, exact, options.backend),
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
    parser.add_argument("--dtype", choices=chat.DTYPES, default="float32")
    parser.add_argument(
        "--backend", default="cpu_x86", help="who has to serve every attention call (cpu_x86)"
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
    model, tokenizer = chat.load(chat.DTYPES[options.dtype])
    say(f"  {time.perf_counter() - start:.0f} s")
    questions = options.questions or [*chat.QUESTIONS, LONG + (HERE / "article.txt").read_text()]
    ledger = Ledger(model)
    for side in SIDES:  # the first call of each pays for what later ones find ready
        with ledger.under(side):
            chat.ask(model, tokenizer, "Hello.", 4)
    comparisons = []
    for question in questions:
        say(f"torch and torchhal in turn: {title(question)}")
        comparisons.append(compare(ledger, tokenizer, question, options.repeat, options.max_new_tokens))
    command = None
    if not options.skip_run:
        say("torchhal run examples/chat.py")
        command = run_command(questions[0], options.max_new_tokens, options.dtype)
    document = result(options, comparisons, ledger, command)
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        show(document, comparisons, torchhal.routes())
    raise SystemExit(1 if document["failures"] else 0)


if __name__ == "__main__":
    main()
