"""SmolLM2 on the blocks of its GGUF file as they are: no weight is ever expanded to floating point.

Every linear layer multiplies by the file's 4-bit blocks (Q4_1), the output layer by the 8-bit blocks (Q8_0) that are the
embedding too. The file is mapped, not read: blocks come into memory as they are used. Tensors of other kinds, here the
norms, are loaded as floating point.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import gguf
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import torchhal

BLOCKS: Final = ("Q4_0", "Q4_1", "Q8_0")
TOP: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER: Final = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""What parts of a model of the Llama family are called in a GGUF file, and in transformers."""


def load(path: Path) -> Any:
    """The model, its linear layers and embedding on blocks of the file, in float32 otherwise."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):  # a structure without memory, which the file's tensors fill
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # computed, not stored
    packed: dict[str, Any] = {}
    # Copy on write, because torch has no read-only tensors; nothing is written, so nothing is copied.
    for tensor in gguf.GGUFReader(path, "c").tensors:
        name = name_of(tensor.name)
        kind = tensor.tensor_type.name
        rows = torch.from_numpy(
            tensor.data if kind in BLOCKS else gguf.dequantize(tensor.data, tensor.tensor_type)
        )
        rows = in_order(rows, name, config)
        if kind in BLOCKS:
            packed[name] = torchhal.gguf_weight(rows, kind.lower())
        else:
            model.get_submodule(name).weight = nn.Parameter(rows.float(), requires_grad=False)
    if config.tie_word_embeddings:
        tie(model, packed)
    torchhal.nn.load_packed(model, packed)
    missing = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if missing:
        raise SystemExit(f"{path.name} has no tensors for {', '.join(missing)}")
    return model.eval()


def tie(model: Any, packed: dict[str, Any]) -> None:
    """Give the output layer what the embedding has: its blocks, or its parameter where the file has none for it."""
    if "model.embed_tokens" in packed:
        packed["lm_head"] = packed["model.embed_tokens"]
    else:
        model.lm_head.weight = model.model.embed_tokens.weight


def name_of(tensor: str) -> str:
    """The path in the model of a tensor of the file: ``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj``."""
    parts = tensor.removesuffix(".weight").split(".")
    known = LAYER if parts[0] == "blk" else TOP
    if not tensor.endswith(".weight") or parts[-1] not in known:
        raise SystemExit(f"the tensor {tensor} is none of a model of the Llama family without biases")
    return f"model.layers.{parts[1]}.{known[parts[-1]]}" if parts[0] == "blk" else known[parts[-1]]


def in_order(rows: Tensor, name: str, config: Any) -> Tensor:
    """Rows in the order of transformers. Where a head's two halves rotate together, GGUF keeps their rows in turns
    (``permute`` in llama.cpp's convert_hf_to_gguf.py); blocks lie along a row, so whole rows move.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.rpartition(".")[2]
    )
    if heads is None:
        return rows
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
