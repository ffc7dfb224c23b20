"""Quantized base models, and what bitsandbytes needs on a CPU."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig


def build_quantization(section: Mapping[str, Any]) -> BitsAndBytesConfig | None:
    """The BitsAndBytesConfig of what `quantization` says; None when it says nothing."""
    return BitsAndBytesConfig(**section) if section else None


def keep_4bit_weights_trainable(model: torch.nn.Module) -> int:
    """Stops bitsandbytes from repacking 4-bit weights on a CPU, and returns the number of layers.

    On CPUs with AVX512-BF16 the first forward in evaluation mode without gradients repacks the weights, and from then
    on no gradient flows through the layer: training after an evaluation learns nothing, and says nothing.
    Source: bitsandbytes/nn/modules.py 0.50.2, Linear4bit.forward. `test_model.py` tells when it is fixed.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
