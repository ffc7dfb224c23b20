"""A recipe's model as training would have it, on the meta device: quantized, with its adapter, in its data types."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.quantizers.base import HfQuantizer

from recipe_runner.model import adapter as adapters
from recipe_runner.model.base import build_empty
from recipe_runner.model.quantization import build_quantization
from recipe_runner.model.unfreeze import freeze_others, select_parameters, train_beside_adapter
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.sections import UpstreamSection

BLOCK, NESTED_BLOCK = 64, 256  # numbers that share a constant: bitsandbytes 0.50, Params4bit and QuantState
TOKENIZED = ("prompt_tuning_init", "prompt_tuning_init_text")  # words that a prompt begins with, for a tokenizer
CODE = 256  # entries of the table that nested constants are looked up in


@dataclass(frozen=True)
class Built:
    """A model without data, ready to be run.

    Attributes:
        model: The model, with its adapter.
        base: The base inside, whose forward pass scores labels as TRL's does.
        constants: Tensors of the quantization that are no parameters.
        dtype: Of the weights.
        number: Of layers.
    """

    model: Any
    base: Any
    constants: list[torch.Tensor]
    dtype: torch.dtype
    number: int

    @cached_property
    def trained(self) -> list[torch.nn.Parameter]:
        """Parameters that get gradients."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def frozen(self) -> Iterator[torch.Tensor]:
        """All other tensors."""
        yield from (parameter for parameter in self.model.parameters() if not parameter.requires_grad)
        yield from self.model.buffers()
        yield from self.constants


def build(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, mixed: bool, continued: bool = False) -> Built:
    """Builds the model of a recipe.

    Args:
        recipe: With its base, quantization, adapter and stage.
        config: Of the base.
        dtype: Of its weights.
        mixed: Whether mixed precision is on.
        continued: Whether the adapter was trained before.

    Raises:
        UserError: transformers or PEFT refuses it.
    """
    scores = recipe.stage.scores
    quantization = build_quantization(recipe.quantization.said)
    constants: list[torch.Tensor] = []

    def start() -> Any:
        empty = build_empty(config, recipe.model.trust_remote_code, scores).to(dtype)
        empty.config.use_cache = False
        if scores and empty.config.get_text_config().pad_token_id is None:
            empty.config.get_text_config().pad_token_id = 0
        return empty

    def finish(empty: Any) -> Any:
        constants[:] = quantize(empty, quantization, dtype) if quantization else []
        if not scores:
            _add_head(empty, recipe.stage.scored)
        return empty

    empty = start()
    said = {key: value for key, value in recipe.peft.said.items() if key not in TOKENIZED}
    asked = adapters.build_peft(said, recipe.stage.task)
    unfrozen = select_parameters(recipe.unfreeze, empty, quantization) if recipe.unfreeze else {}
    if asked and unfrozen:
        train_beside_adapter(asked, unfrozen, empty)
    model = base = finish(empty)
    if asked:
        model = adapters.fit_adapter(asked, empty, lambda: finish(start()), config.model_type).to("meta")
        base = model.get_base_model()
        if continued and recipe.stage.reference:
            model.add_adapter("ref", asked)  # TRL keeps a frozen copy as the reference
            model.set_adapter("default")
    elif unfrozen:
        freeze_others(model, unfrozen)
    if asked or unfrozen:
        if quantization:
            _train_in_bfloat16(model)
        adapters.train_in_full_precision(model, recipe, bool(quantization), mixed)
    if checkpoints(recipe.training):
        kwargs = dict(recipe.training["activation_checkpointing_kwargs"] or {})
        kwargs.setdefault("use_reentrant", False)
        model.activation_checkpointing_enable({**kwargs, "preserve_rng_state": False})
        if asked:
            model.enable_input_require_grads()
    model.train()
    return Built(model, base, constants, dtype, config.get_text_config().num_hidden_layers)


def checkpoints(training: UpstreamSection) -> bool:
    """Whether activations are computed again: TRL 1.16 does so where the recipe says nothing."""
    said = training["activation_checkpointing"]
    return bool(training["gradient_checkpointing"] if said is None else said)


def quantize(model: Any, config: BitsAndBytesConfig, dtype: torch.dtype) -> list[torch.Tensor]:
    """Puts bitsandbytes' layers in the place of linear ones, their weights as many bytes as they take.

    Returns:
        The constants of the quantization.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    skipped = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, skipped, config)
    constants: list[torch.Tensor] = []
    for module in model.modules():
        if hasattr(module, "source_cls"):
            if module.bias is not None:
                module.bias.data = module.bias.data.to(dtype)
            constants += _pack_4bit(module, config, dtype) if config.load_in_4bit else _pack_8bit(module)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = config.load_in_4bit, config.load_in_8bit
    model.is_quantized = True
    return constants


def _pack_4bit(module: Any, config: BitsAndBytesConfig, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two weights a byte, and a constant for each block: in float32, or in 8 bits with constants of its own."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Params4bit

    make_state: Any = QuantState  # which has no types

    def empty(count: int, kind: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    shape, storage = module.weight.shape, config.bnb_4bit_quant_storage
    count, kind = math.prod(shape), config.bnb_4bit_quant_type
    blocks = -(-count // BLOCK)
    absmax, nested, offset = empty(blocks, torch.float32), None, None
    if config.bnb_4bit_use_double_quant:
        absmax, offset = empty(blocks, torch.uint8), torch.empty((), device="meta")
        inner = empty(-(-blocks // NESTED_BLOCK), torch.float32)
        code = empty(CODE, torch.float32)
        nested = make_state(inner, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
    state = make_state(absmax, shape, empty(16, torch.float32), BLOCK, kind, dtype, offset, nested)
    packed = torch.empty((-(-count // 2 // storage.itemsize), 1), dtype=storage, device="meta")
    module.weight = Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, quant_type=kind, bnb_quantized=True
    )
    module.quant_state = state
    found = [absmax, state.code] + ([offset, nested.absmax, nested.code] if nested else [])
    return [tensor for tensor in found if tensor is not None]


def _pack_8bit(module: Any) -> list[torch.Tensor]:
    """A byte a weight, and a constant in float32 for each row."""
    from bitsandbytes.nn.modules import Int8Params

    rows = module.weight.shape[0]
    constants = torch.empty(rows, dtype=torch.float32, device="meta")
    packed = torch.empty(module.weight.shape, dtype=torch.int8, device="meta")
    module.weight = Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=constants)
    return [constants]


def _add_head(model: Any, more: tuple[str, ...]) -> None:
    """TRL's loss, which never holds all logits. Source: trl/trainer/{sft,dpo,kto,grpo,rloo}_trainer.py 1.16."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", *more))


def _train_in_bfloat16(model: Any) -> None:
    """As TRL 1.16 does on a quantized base. Source: trl/trainer/sft_trainer.py, `__init__`."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
