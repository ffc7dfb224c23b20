"""A configuration shrunk to a small real model of the same architecture, with random weights: for tests and trials."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

# transformers' common names (an architecture's own are mapped to them) and names that some architectures add.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
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
_PER_LAYER = ("layer_types", "mlp_layer_types")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def shrink_config(config: PretrainedConfig, vocab_size: int, token_id: int = 0) -> PretrainedConfig:
    """A copy of a configuration with two narrow layers; what the architecture is stays as it is.

    Args:
        config: Of a model of any size.
        vocab_size: Tokens of the small model.
        token_id: Its token for beginning, end and padding.
    """
    small = copy.deepcopy(config)
    for part in (small, *(getattr(small, name) for name in small.sub_configs)):
        for name, size in {**SIZES, "vocab_size": vocab_size}.items():
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(size, getattr(part, name)))
        for name in _PER_LAYER:
            if getattr(part, name, None):
                setattr(part, name, getattr(part, name)[: SIZES["num_hidden_layers"]])
        for name in _TOKENS:
            setattr(part, name, token_id)
        rope: Any = getattr(part, "rope_scaling", None) or {}
        for name in ("short_factor", "long_factor"):  # one number for each pair of a head's dimensions
            if name in rope:
                rope[name] = rope[name][: SIZES["head_dim"] // 2]
    return small


def write_tiny(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int = 0) -> Path:
    """Writes a small random model of a configuration's architecture, with a tokenizer, as a model folder."""
    torch.manual_seed(seed)
    small = shrink_config(config, len(tokenizer), tokenizer.eos_token_id or 0)
    AutoModelForCausalLM.from_config(small).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
