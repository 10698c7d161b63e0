"""What compare.py measured: the statistics of it, as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import chat

SIDES: Final = ("torch", "torchhal")
BUSY: Final = 1.5
"""Turns of one side on a machine with nothing else to do differ by less than this factor."""

Statistic = Callable[[Iterable[float]], float]
PARTS: Final[dict[str, Callable[[chat.Answer], tuple[int, float]]]] = {
    "prefill": lambda answer: (len(answer.prompt), answer.prefill),
    "decode": lambda answer: (len(answer.tokens) - 1, answer.decode),
    "total": lambda answer: (len(answer.tokens), answer.total),
}
"""Tokens and seconds of the prompt, of the answer after its first token, and of the answer in all."""


@dataclass
class Comparison:
    """One question: the answers of each side, one per turn, and what they differ by."""

    question: str
    answers: dict[str, list[chat.Answer]]
    logit_difference: float
    logit_range: float
    """Largest magnitude of torch's own logits, to read the difference against."""

    @property
    def identical(self) -> bool:
        """Whether every turn of both sides gave the same tokens."""
        return len({tuple(answer.tokens) for answers in self.answers.values() for answer in answers}) == 1

    def tokens(self) -> dict[str, list[int]]:
        return {side: self.answers[side][0].tokens for side in SIDES}

    def agreeing(self) -> int:
        """How many tokens both sides have in common from the start."""
        ours, theirs = self.tokens().values()
        return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))

    def seconds(self, side: str, part: str, statistic: Statistic) -> float:
        return statistic(PARTS[part](answer)[1] for answer in self.answers[side])

    def rates(self, side: str, statistic: Statistic) -> dict[str, float | None]:
        """Tokens per second of each part; None where an answer of one token leaves nothing to time."""
        first = self.answers[side][0]
        counts = {part: PARTS[part](first)[0] for part in PARTS}
        return {
            part: count / self.seconds(side, part, statistic) if count else None
            for part, count in counts.items()
        }

    def spread(self) -> float:
        """The slowest turn of a side over its fastest, for the worse side."""
        return max(self.seconds(side, "total", max) / self.seconds(side, "total", min) for side in SIDES)

    def document(self) -> dict[str, Any]:
        times = {s: [{"prefill": a.prefill, "decode": a.decode} for a in self.answers[s]] for s in SIDES}
        return {
            "question": self.question,
            "prompt_tokens": len(self.answers["torch"][0].prompt),
            "answers": {side: self.answers[side][0].text for side in SIDES},
            "tokens": self.tokens(),
            "identical": self.identical,
            "largest_logit_difference": self.logit_difference,
            "largest_logit": self.logit_range,
            "tokens_per_second": {side: self.rates(side, statistics.median) for side in SIDES},
            "best_tokens_per_second": {side: self.rates(side, min) for side in SIDES},
            "spread": self.spread(),
            "seconds": times,
        }


def overall(comparisons: list[Comparison], statistic: Statistic) -> dict[str, float]:
    """Answer tokens per second of each side over all questions, prompts included in the time, and their ratio."""
    rates = {
        side: sum(len(c.tokens()[side]) for c in comparisons)
        / sum(c.seconds(side, "total", statistic) for c in comparisons)
        for side in SIDES
    }
    return {**rates, "ratio": rates["torchhal"] / rates["torch"]}


def title(question: str) -> str:
    """The question's first line, and how much follows."""
    head, _, rest = question.partition("\n")
    return f"{head} [{len(rest.split())} words]" if rest else head


def served_text(served: dict[str, int]) -> str:
    return ", ".join(f"{count} by {name}" for name, count in served.items()) or "none"


def show_answers(comparison: Comparison) -> None:
    first = {side: comparison.answers[side][0] for side in SIDES}
    print(f"\n> {title(comparison.question)}")
    if comparison.identical:
        print(f"both: {first['torch'].text}\nidentical tokens: {len(first['torch'].tokens)}")
    else:
        print("\n".join(f"{side}: {first[side].text}" for side in SIDES))
        print(f"the first {comparison.agreeing()} tokens are the same")
    difference, most = comparison.logit_difference, comparison.logit_range
    print(f"largest logit difference {difference:.2g} (logits up to {most:.0f})")


def show_rates(comparison: Comparison) -> None:
    given = len(comparison.answers["torch"][0].prompt)
    names = {
        "prefill": f"prompt ({given} tokens)",
        "decode": "answer, later tokens",
        "total": "answer in all",
    }
    median, best = ({side: comparison.rates(side, s) for side in SIDES} for s in (statistics.median, min))
    print(f"{'tokens/s, median turn':<28}{'torch':>10}{'torchhal':>10}{'ratio':>8}{'best turns':>12}")
    for part, name in names.items():
        theirs, ours, fastest, ours_fastest = (r[side][part] for r in (median, best) for side in SIDES)
        if theirs and ours and fastest and ours_fastest:
            ratios = f"{ours / theirs:>8.2f}{ours_fastest / fastest:>12.2f}"
            print(f"{name:<28}{theirs:>10.1f}{ours:>10.1f}{ratios}")
    if comparison.spread() > BUSY:
        print(
            f"turns of one side differ by a factor of {comparison.spread():.1f}: this machine was busy, the ratios say little"
        )


def show(document: dict[str, Any], comparisons: list[Comparison], routes: list[Any]) -> None:
    """Print the whole result."""
    weights, threads, repeat = (document[name] for name in ("weights", "threads", "repeat"))
    print(f"SmolLM2-135M-Instruct in {weights}, {threads} threads, greedy, {repeat} turns of each side")
    if weights == "q4":
        sizes = ", ".join(f"{size} MB {side}" for side, size in document["megabytes"].items())
        print(f"torch has the same numbers in float32; weights: {sizes}")
    for comparison in comparisons:
        show_answers(comparison)
        show_rates(comparison)
    torchs, ours, ratio = (document["tokens_per_second"][name] for name in (*SIDES, "ratio"))
    best = document["best_tokens_per_second"]["ratio"]
    print(
        f"\nall questions: torch {torchs:.1f}, torchhal {ours:.1f} tokens/s, ratio {ratio:.2f}, of the best turns {best:.2f}"
    )
    for family, expected in document["expected"].items():
        if expected:
            served = served_text(document["served"][family])
            print(f"{family}: {document['passes']} forward passes, {expected} calls expected; {served}")
    print(f"\n{'calls':>8}  {'served by':<10} problem")
    for route in routes:
        print(f"{route.count:>8}  {route.chosen or 'nobody':<10} {route.problem.summary()}")
        print(f"{'':>20} by {route.rule} ({route.description})")
    if command := document["torchhal_run"]:
        calls = "; ".join(
            f"{family} {served_text(calls)}" for family, calls in command["served"].items() if calls
        )
        print(f"\ntorchhal run chat.py: exit code {command['code']}, calls: {calls}")
        print(command["peak"])
    print("\n".join(f"FAILED: {text}" for text in document["failures"]) or "\nok")
