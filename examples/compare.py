"""Let the model of chat.py answer the same questions under torch alone and under torchhal, and compare.

    python examples/compare.py
    python examples/compare.py "Name three rivers." --repeat 5 --json

Both sides run in one process and take turns, so that whatever else the machine does meets both alike. Printed are the
answers, tokens per second of both (medians), the largest difference of the logits along the answer, and which
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import chat
import torch
from transformers import DynamicCache

import torchhal

HERE: Final = Path(__file__).resolve().parent
SIDES: Final = ("torch", "torchhal")
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
            with torchhal.enable():
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


@dataclass
class Comparison:
    """One question: the answers of each side, one per repetition, and what they differ by."""

    question: str
    answers: dict[str, list[chat.Answer]]
    logit_difference: float
    logit_range: float
    """Largest magnitude of torch's own logits, to read the difference against."""

    @property
    def identical(self) -> bool:
        """Whether every repetition of both sides gave the same tokens."""
        return len({tuple(answer.tokens) for answers in self.answers.values() for answer in answers}) == 1

    def agreeing(self) -> int:
        """How many tokens both sides have in common from the start."""
        pairs = zip(*(self.answers[side][0].tokens for side in SIDES))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, self.tokens().values())))

    def tokens(self) -> dict[str, list[int]]:
        return {side: self.answers[side][0].tokens for side in SIDES}

    def seconds(self, side: str, what: Callable[[chat.Answer], float]) -> float:
        return statistics.median(what(answer) for answer in self.answers[side])

    def rates(self, side: str) -> dict[str, float | None]:
        """Median tokens per second: of the prompt, of the answer after its first token, and of the answer in all."""
        first = self.answers[side][0]
        decode = self.seconds(side, lambda answer: answer.decode)
        return {
            "prefill": len(first.prompt) / self.seconds(side, lambda answer: answer.prefill),
            "decode": (len(first.tokens) - 1) / decode if decode else None,
            "total": len(first.tokens) / self.seconds(side, lambda answer: answer.total),
        }


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


def overall(comparisons: list[Comparison], side: str) -> float:
    """Answer tokens per second over all questions."""
    tokens = sum(len(c.answers[side][0].tokens) for c in comparisons)
    return tokens / sum(c.seconds(side, lambda answer: answer.total) for c in comparisons)


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
    found = ", ".join(f"{count} by {name}" for name, count in served.items()) or "none"
    return [f"{what}: expected {expected} attention calls served by {backend}, and found {found}"]


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


def title(question: str) -> str:
    """The question's first line, and how much follows."""
    head, _, rest = question.partition("\n")
    return f"{head} [{len(rest.split())} words]" if rest else head


def show(comparison: Comparison) -> None:
    """Print one question's answers and numbers."""
    first = {side: comparison.answers[side][0] for side in SIDES}
    print(f"\n> {title(comparison.question)}")
    if comparison.identical:
        print(f"both: {first['torch'].text}")
        print(f"identical tokens: {len(first['torch'].tokens)}")
    else:
        print("\n".join(f"{side}: {first[side].text}" for side in SIDES))
        print(f"the first {comparison.agreeing()} tokens are the same")
    difference, most = comparison.logit_difference, comparison.logit_range
    print(f"largest logit difference {difference:.2g} (logits up to {most:.0f})")
    rates = {side: comparison.rates(side) for side in SIDES}
    print(f"{'tokens/s':<28}{'torch':>10}{'torchhal':>10}{'ratio':>8}")
    given = len(first["torch"].prompt)
    names = {
        "prefill": f"prompt ({given} tokens)",
        "decode": "answer, later tokens",
        "total": "answer in all",
    }
    for key, name in names.items():
        ours, theirs = rates["torchhal"][key], rates["torch"][key]
        if ours is not None and theirs is not None:
            print(f"{name:<28}{theirs:>10.1f}{ours:>10.1f}{ours / theirs:>8.2f}")


def show_all(document: dict[str, Any], comparisons: list[Comparison]) -> None:
    """Print the whole result."""
    dtype, threads, repeat = (document[name] for name in ("dtype", "threads", "repeat"))
    print(f"SmolLM2-135M-Instruct in {dtype}, {threads} threads, greedy; medians of {repeat} turns")
    for comparison in comparisons:
        show(comparison)
    torchs, ours, ratio = (document["tokens_per_second"][name] for name in (*SIDES, "ratio"))
    print(f"\nall questions: torch {torchs:.1f}, torchhal {ours:.1f} tokens/s, ratio {ratio:.2f}")
    attention = document["attention"]
    passes, layers, expected = (attention[name] for name in ("passes", "layers", "expected"))
    print(f"attention: {passes} forward passes of {layers} layers, {expected} calls expected")
    print(f"\n{'calls':>8}  {'served by':<10} problem")
    for route in torchhal.routes():
        print(f"{route.count:>8}  {route.chosen or 'nobody':<10} {route.problem.summary()}")
        print(f"{'':>20} by {route.rule} ({route.description})")
    if command := document["torchhal_run"]:
        served = ", ".join(f"{count} by {name}" for name, count in command["served"].items())
        print(f"\ntorchhal run chat.py: exit code {command['code']}, attention calls served: {served}")
    print("\n".join(f"FAILED: {text}" for text in document["failures"]) or "\nok")


def question_document(c: Comparison) -> dict[str, Any]:
    times = {s: [{"prefill": a.prefill, "decode": a.decode} for a in c.answers[s]] for s in SIDES}
    return {
        "question": c.question,
        "prompt_tokens": len(c.answers["torch"][0].prompt),
        "answers": {side: c.answers[side][0].text for side in SIDES},
        "tokens": c.tokens(),
        "identical": c.identical,
        "largest_logit_difference": c.logit_difference,
        "largest_logit": c.logit_range,
        "tokens_per_second": {side: c.rates(side) for side in SIDES},
        "seconds": times,
    }


def result(
    options: argparse.Namespace, comparisons: list[Comparison], ledger: Ledger, command: CommandRun | None
) -> dict[str, Any]:
    """The JSON document."""
    rates = {side: overall(comparisons, side) for side in SIDES}
    exact = options.dtype == "float32"
    return {
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "repeat": options.repeat,
        "questions": [question_document(c) for c in comparisons],
        "tokens_per_second": {**rates, "ratio": rates["torchhal"] / rates["torch"]},
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
    parser.add_argument("--repeat", type=chat.positive, default=4, metavar="N", help="turns of each side (4)")
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
        show_all(document, comparisons)
    raise SystemExit(1 if document["failures"] else 0)


if __name__ == "__main__":
    main()
