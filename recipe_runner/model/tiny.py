"""A configuration shrunk to a small real model of the same architecture, with random weights: for tests and trials."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

# transformers' common names (an architecture's own are mapped to them) and names that some architectures add.
SIZES = {
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "ffn_dim": 128,  # OPT
    "word_embed_proj_dim": 64,
    "n_inner": 128,  # GPT-2
    "d_kv": 16,  # T5
    "d_ff": 128,
    "num_decoder_layers": 2,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrink_config(
    config: PretrainedConfig, vocab_size: int, token_id: int = 0, layers: int = 0, keep_heads: bool = False
) -> PretrainedConfig:
    """A copy of a configuration with few narrow layers; what the architecture is stays as it is.

    There are as many layers as it takes to have one of each kind, at least two.

    Args:
        config: Of a model of any size.
        vocab_size: Tokens of the small model.
        token_id: Its token for beginning, end and padding.
        layers: How many there are at least; by default as few as show every kind.
        keep_heads: Whether there are as many query heads to a key-value head as in the model; else two.
    """
    small = copy.deepcopy(config)
    for part in (small, *(getattr(small, name) for name in small.sub_configs)):
        sizes = {**SIZES, **(_shrink_heads(part) if keep_heads else HEADS), "vocab_size": vocab_size}
        if isinstance(part, type(config.get_text_config())):
            sizes["num_hidden_layers"] = max(layers, _count_layers(part))
        for name, size in sizes.items():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(size, getattr(part, name)))
        for name in _PER_LAYER:
            if getattr(part, name, None):
                setattr(part, name, getattr(part, name)[: sizes["num_hidden_layers"]])
        for name in _TOKENS:
            setattr(part, name, token_id)
        rope: Any = getattr(part, "rope_scaling", None) or {}
        turned = sizes["head_dim"] * rope.get("partial_rotary_factor", 1.0)
        for name in ("short_factor", "long_factor"):  # one number for each pair of a head's dimensions
            if name in rope:
                rope[name] = rope[name][: int(turned) // 2]
    return small


def _shrink_heads(config: PretrainedConfig) -> dict[str, int]:
    """Heads with the same number of query heads for each key-value head, and a hidden size that they fill."""
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    sizes = dict(HEADS)
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared == 0:
        group = heads // shared
        few = 4 if group == 1 else min(2, shared)
        sizes |= {"num_key_value_heads": few, "num_attention_heads": few * group}
        if few * group > 4:
            sizes["head_dim"] = 16 if few * group <= 8 else 8
            sizes["hidden_size"] = few * group * sizes["head_dim"]
    return sizes


def _count_layers(config: PretrainedConfig) -> int:
    """How many layers it takes to have one of each kind: of attention, of rotation, dense or sparse."""
    kinds = [value for name in _PER_LAYER if isinstance(value := getattr(config, name, None), list)]
    first = [next(n for n, kind in enumerate(of) if kind == wanted) for of in kinds for wanted in dict.fromkeys(of)]
    return max([SIZES["num_hidden_layers"], *(place + 1 for place in first)])


def fill_padding(model: Any) -> None:
    """Gives the token that pads an embedding other than 0, as trained models have: at 0, a norm has a huge gradient."""
    embeddings = model.get_input_embeddings()
    if embeddings.padding_idx is not None:
        with torch.no_grad():
            embeddings.weight[embeddings.padding_idx].normal_(std=0.02)


def write_tiny(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int = 0) -> Path:
    """Writes a small random model of a configuration's architecture, with a tokenizer, as a model folder."""
    torch.manual_seed(seed)
    small = shrink_config(config, len(tokenizer), tokenizer.eos_token_id or 0)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
