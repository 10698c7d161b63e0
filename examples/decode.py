"""Tokens per second that SmolLM2-135M decodes, one sequence, by torch, by torchhal on the file's blocks, and by llama.cpp.

    python examples/decode.py
    python examples/decode.py --tokens 64 --repeat 5 --json
    python examples/decode.py --compile

All start from the same prompt and choose greedily; they take turns, so that whatever else the machine does meets all alike.
llama.cpp takes part where the package llama-cpp-python is installed; it reads the same file. It rounds activations to 8
bits for its 4-bit products, which torchhal does not, so that its tokens may differ. ``--compile`` adds torch and torchhal with
steps by torch.compile, after a wait that is printed too: the tokens that a model needs for that to pay are many.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Final

import chat
import torch
from transformers import DynamicCache, StaticCache

import torchhal

PROMPT: Final = "Tell me about rivers."
Step = Callable[[int], int]
"""Takes a token and gives the next."""
Start = Callable[[list[int]], tuple[int, Step]]
"""Takes a prompt and gives the first token of the answer, and the steps after it."""


def of_model(model: Any) -> Start:
    """A model of transformers."""

    def start(prompt: list[int]) -> tuple[int, Step]:
        cache = DynamicCache(config=model.config)

        def forward(tokens: list[int]) -> int:
            ids = torch.tensor([tokens])
            with torch.inference_mode():
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return int(logits[0, -1].argmax())

        return forward(prompt), lambda token: forward([token])

    return start


def of_torchhal(model: Any) -> Start:
    """A model whose attention is served too."""
    plain = of_model(model)

    def start(prompt: list[int]) -> tuple[int, Step]:
        with torchhal.install():
            first, step = plain(prompt)

        def served(token: int) -> int:
            with torchhal.install():
                return step(token)

        return first, served

    return start


def of_compiled(model: Any, context: int) -> Start:
    """A model whose steps torch.compile makes one graph of, with a cache of a fixed size, for up to ``context`` tokens."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    # The model stays as it is: looking each time whether any of its parts has changed takes 2 ms of a step.
    unguarded = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiled = torch.compile(model.forward, dynamic=False, options=unguarded)

    def start(prompt: list[int]) -> tuple[int, Step]:
        with torch.inference_mode():
            cache.reset()
        at = 0

        def forward(call: Any, tokens: list[int]) -> int:
            nonlocal at
            ids, places = torch.tensor([tokens]), torch.arange(at, at + len(tokens))[None]
            at += len(tokens)
            with torch.inference_mode():
                logits = call(
                    ids, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits
            return int(logits[0, -1].argmax())

        return forward(model, prompt), lambda token: forward(compiled, [token])

    return start


def of_llama_cpp(threads: int, context: int) -> Start:
    """llama.cpp on the same file, for up to ``context`` tokens."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(chat.file()), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def forward(tokens: list[int]) -> int:
        model.eval(tokens)
        return int(model.sample(temp=0.0))

    def start(prompt: list[int]) -> tuple[int, Step]:
        model.reset()
        return forward(prompt), lambda token: forward([token])

    return start


def decode(start: Start, prompt: list[int], count: int) -> tuple[list[int], float]:
    """``count`` tokens, and the seconds that all but the first took."""
    token, step = start(prompt)
    tokens = [token]
    begin = time.perf_counter()
    for _ in range(count - 1):
        tokens.append(step(tokens[-1]))
    return tokens, time.perf_counter() - begin


def contenders(names: list[str], context: int) -> Iterator[tuple[str, Start]]:
    """Each one that was asked for and is there, for up to ``context`` tokens."""
    for name in names:
        if name == "llama.cpp":
            if find_spec("llama_cpp"):
                yield name, of_llama_cpp(torch.get_num_threads(), context)
            continue
        whose, weights, *compiled = name.split(" ")
        model = chat.load(weights)[0]
        if compiled:
            yield name, of_compiled(model, context)
        else:
            yield name, of_torchhal(model) if whose == "torchhal" else of_model(model)


def several(text: str) -> int:
    """A whole number of at least 2, for argparse."""
    value = int(text)
    if value < 2:
        raise ValueError(text)
    return value


WARM: Final = 4
"""Tokens of the turn that is not measured."""
ALL: Final = ["torch f32", "torch bf16", "torchhal q4", "llama.cpp"]
COMPILED: Final = ["torch bf16 compiled", "torchhal q4 compiled"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding speed of SmolLM2-135M, one sequence.")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="WHO",
        help=f"some of: {', '.join([*ALL, *COMPILED])} (all that are not compiled)",
    )
    parser.add_argument(
        "--tokens", type=several, default=33, metavar="N", help="tokens of a turn, 2 or more (33)"
    )
    parser.add_argument("--repeat", type=chat.positive, default=5, metavar="N", help="turns of each (5)")
    parser.add_argument("--compile", action="store_true", help="add those that are compiled")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    options = parser.parse_args()
    known = [*ALL, *COMPILED]
    names = options.names or ALL
    names = [*names, *(name for name in COMPILED if options.compile and name not in names)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(known)}")
    if "llama.cpp" in options.names and not find_spec("llama_cpp"):
        parser.error("llama.cpp: not installed (pip install llama-cpp-python)")
    tokenizer = chat.load_tokenizer()
    message = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    starts = dict(contenders(names, len(prompt) + max(options.tokens, WARM)))
    tokens: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    wait = {}
    for name, start in starts.items():  # the first turn of each pays for what later ones find ready
        begin = time.perf_counter()
        decode(start, prompt, WARM)
        wait[name] = time.perf_counter() - begin
    for _ in range(options.repeat):
        for name, start in starts.items():
            tokens[name], spent = decode(start, prompt, options.tokens)
            seconds[name].append(spent / (options.tokens - 1))
    result = {
        name: {
            "tokens_per_second": 1 / statistics.median(times),
            "best_tokens_per_second": 1 / min(times),
            "first_turn_seconds": wait[name],
            "tokens": tokens[name],
        }
        for name, times in seconds.items()
    }
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "decode": result}, indent=2))
        return
    print(
        f"SmolLM2-135M-Instruct, {torch.get_num_threads()} threads, {options.tokens} tokens, {options.repeat} turns"
    )
    print(f"{'':<22}{'tokens/s, median':>18}{'best':>10}{'first turn':>12}  tokens as the first")
    first = next(iter(tokens.values()))
    for name, row in result.items():
        same = next((i for i, (a, b) in enumerate(zip(first, tokens[name])) if a != b), len(first))
        speeds = f"{row['tokens_per_second']:>18.1f}{row['best_tokens_per_second']:>10.1f}"
        print(f"{name:<22}{speeds}{row['first_turn_seconds']:>10.1f} s  {same}")
    if "llama.cpp" not in starts and not options.names:
        print("llama.cpp: not installed (pip install llama-cpp-python)")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
