"""Quantized base models, and what bitsandbytes has to be kept from."""

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from recipe_runner.problems.errors import user_error


def build_quantization(section: Mapping[str, Any]) -> BitsAndBytesConfig | None:
    """The BitsAndBytesConfig of what `quantization` says; None when it says nothing."""
    return BitsAndBytesConfig(**section) if section else None


def check_published(published: Mapping[str, Any] | None, section: Mapping[str, Any]) -> None:
    """Checks what the recipe says of weights that were published quantized: transformers ignores it.

    Args:
        published: `quantization_config` of the model's configuration, if it has one.
        section: `quantization` of the recipe.

    Raises:
        UserError: The weights are quantized otherwise.
    """
    if not published or not section:
        return
    asked = BitsAndBytesConfig(**section).to_dict()
    keys = ["load_in_4bit", "load_in_8bit"]
    keys += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant"] if asked["load_in_4bit"] else []
    for key in keys:
        if published.get(key) != asked[key]:
            message = f"the weights are quantized already, with {key}: {json.dumps(published.get(key))}"
            fix = "remove `quantization`, or take weights that are not quantized"
            raise user_error("quantized-already", message, fix, path=("quantization", key))


def describe_published(published: Mapping[str, Any] | None) -> str:
    """How the published weights are quantized, in a few words; empty when they are not."""
    if not published:
        return ""
    bits = "4-bit " if published.get("load_in_4bit") else "8-bit " if published.get("load_in_8bit") else ""
    return f"{bits}{published.get('quant_method', 'quantized')}"


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


def forget_8bit_inputs() -> None:
    """Stops bitsandbytes from keeping what 8-bit layers were given, which their backward pass does not read.

    It keeps them beside what autograd saves, so that activation checkpointing frees none of them: LoRA on 8 bits of
    Llama-3.2-1B took 2.98 GiB with 2,048 tokens where 2.01 are enough.
    Source: bitsandbytes/autograd/_functions.py 0.50.2, MatMul8bitLt and MatMul8bitFp. `test_model.py` tells when it is
    fixed.
    """
    from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt

    functions: tuple[Any, ...] = (MatMul8bitLt, MatMul8bitFp)
    for function in functions:
        if not hasattr(function.forward, "__wrapped__"):
            function.forward = staticmethod(_forgetting(function.forward))


def _forgetting(forward: Any) -> Any:
    """A forward pass that keeps no inputs, where the weights are not trained."""

    @functools.wraps(forward)
    def wrapped(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        made = forward(ctx, *args, **kwargs)
        if not ctx.needs_input_grad[1]:
            ctx.tensors, ctx.A = (None, None, None), None
        return made

    return wrapped
