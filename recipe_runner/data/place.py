"""Where prepared data is kept. Nothing of the training stack is imported."""

from pathlib import Path

from huggingface_hub.constants import HF_HOME

KEYS = (
    "max_length",
    "packing",
    "packing_strategy",
    "eval_packing",
    "truncation_mode",
    "eos_token",
)  # of `training`, that decide what is prepared


def store_folder() -> Path:
    """Where prepared data is kept: beside Hugging Face's own caches, moved with HF_HOME."""
    return Path(HF_HOME) / "recipe-runner" / "prepared"
