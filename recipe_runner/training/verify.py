"""Checks that what was saved is what was trained: no run completes with a result that can't be used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import AdaLoraConfig, PeftModel, PveraConfig, RandLoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

from recipe_runner.model.adapter import saves_embeddings
from recipe_runner.problems.errors import user_error
from recipe_runner.recipe.rules.adapter import WEIGHTS

ROWS, TOKENS = 2, 64  # of the training data: enough to go through every adapted layer
ROUNDING, MOST = 100, 0.05  # times the smallest step of the base's dtype, and at most a 20th, of the largest logit
NOISE = 10  # times the largest difference of two passes of the same adapter


def gather_sharded(trainer: Any) -> dict[str, torch.Tensor] | None:
    """What is trained, put together from all processes when it is sharded (ZeRO-3, FSDP); every process has to call it.

    Source: transformers 5.23, Trainer.save_model.
    """
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
        state = trainer.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapter)
    elif trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model)
    else:
        return None
    return state or {}  # the other processes get nothing


def verify_saved(
    trainer: Any,
    folder: Path,
    rows: list[list[int]],
    gathered: dict[str, torch.Tensor] | None = None,
    initial: Path | None = None,
) -> None:
    """Compares a saved adapter or model with the one in memory, tensor by tensor.

    An adapter is then loaded back as a second adapter of the model in memory, so that it costs no second copy of the
    base, and must give the same logits as far as two passes of the trained one do.

    Args:
        trainer: With the trained model.
        folder: Where it was saved.
        rows: Tokens of some rows to try an adapter on.
        gathered: What `gather_sharded` gave.
        initial: The adapter before training, which was subtracted: the saved one is not for the base in memory.

    Raises:
        UserError: They differ.
    """
    trained = trainer.accelerator.unwrap_model(trainer.model)
    adapter = isinstance(trained, PeftModel)
    if adapter:
        state = get_peft_model_state_dict(
            trained, gathered, save_embedding_layers=saves_embeddings(trained.active_peft_config)
        )
    else:
        state = gathered if gathered is not None else trained.state_dict()
        state = revert_weight_conversion(trained, state)  # a mixture's experts are one tensor in memory, many in files
    made = adapter and trained.active_peft_config.is_prompt_learning  # by a network, anew for each saving
    state = _subtract(state, load_file(initial / WEIGHTS)) if initial else state
    difference = _compare_tensors(state, folder, ROUNDING * torch.finfo(torch.float32).eps if made else 0.0)
    for_this_base = adapter and not initial and gathered is None
    if difference == 0 and for_this_base and _takes_a_second(trained.active_peft_config, _is_quantized(trained)):
        difference = _compare_logits(trained, trainer.args.device, rows, folder)
    if difference != 0:  # true for nan, too
        message = f"what was saved in {folder} differs from the trained model (by {difference:g})"
        raise user_error("saved-model-differs", message, "train again; the result and the checkpoints are kept")


def _takes_a_second(config: Any, quantized: bool) -> bool:
    """Whether PEFT 0.21 loads a second adapter beside this one.

    Not where it trains biases, or changes the model; RandLoRA and PVeRA wrap quantized layers a second time.
    """
    if isinstance(config, RandLoraConfig | PveraConfig) and quantized:
        return False
    changes = ("ensure_weight_tying", "layer_replication")
    return getattr(config, "bias", "none") == "none" and not any(getattr(config, name, None) for name in changes)


def _is_quantized(trained: PeftModel) -> bool:
    base = trained.get_base_model()
    return bool(getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False))


def _subtract(state: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`[B | -B0] [A | A0]`, tensor by tensor: what PEFT's conversion should have saved."""
    sides = {"lora_A": (0, 1), "lora_B": (1, -1)}  # part of a name -> dimension of the rank, sign

    def subtract(name: str, tensor: torch.Tensor) -> torch.Tensor:
        dimension, sign = next((found for part, found in sides.items() if part in name), (0, 0))
        return torch.cat([tensor.cpu(), sign * initial[name]], dimension) if sign else tensor

    return {name: subtract(name, tensor) for name, tensor in state.items()}


def _compare_logits(trained: PeftModel, place: torch.device, rows: list[list[int]], folder: Path) -> float:
    """A difference of logits `(batch, sequence, vocabulary)` that is more than the noise of two passes; 0 for none."""
    device = "cpu" if place.type == "cpu" else str(place)  # safetensors knows no cpu:0
    base = trained.get_base_model()
    mixed = _is_quantized(trained)
    rounding, sums = 0.0, cast(torch.dtype, base.dtype)
    config = trained.active_peft_config
    # AdaLoRA is saved without what is 0: sums in another order. A prompt may be made by a network, anew in every pass.
    if isinstance(config, AdaLoraConfig) or config.is_prompt_learning:
        rounding = min(ROUNDING * torch.finfo(sums).eps, MOST)
    trained.eval()  # TRL trains whole modules on a quantized base in bfloat16, between layers in float32
    active = trained.active_adapter
    loaded = trained.load_adapter(str(folder), adapter_name="saved", torch_device=device)
    try:
        parameters = dict(trained.named_parameters(remove_duplicate=False))
        if not _took_everything(trained, loaded, parameters):
            return float("nan")
        for name, parameter in parameters.items():  # PEFT loads in float32; on a quantized base TRL trains in bfloat16
            if ".saved" in name:
                parameter.data = parameter.data.to(
                    parameters.get(name.replace(".saved", f".{active}"), parameter).dtype
                )
        for row in rows:
            batch = torch.tensor([row[:TOKENS]], device=place)
            logits = []
            for adapter in (active, active, active, "saved"):
                trained.set_adapter(adapter)
                with torch.no_grad(), torch.autocast(place.type, torch.bfloat16, enabled=mixed):
                    logits.append(trained(input_ids=batch).logits.float())
            differences = [float((logits[0] - other).abs().max()) for other in logits[1:]]
            noise = max(differences[:-1])  # kernels of a GPU may differ in the last bits from pass to pass
            allowed = NOISE * noise + rounding * float(logits[0].abs().max())
            if not differences[-1] <= allowed:  # nan, too
                return differences[-1]
    finally:
        trained.set_adapter(active)
        trained.delete_adapter("saved")
    return 0.0


def _took_everything(trained: PeftModel, loaded: Any, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether PEFT had a place for every saved tensor, and a tensor for every place: it only warns.

    PEFT 0.21 reports references to a matrix of the whole model (VB-LoRA) as missing, and a prompt as unexpected.
    """
    filled = {tensor.data_ptr() for name, tensor in parameters.items() if name not in loaded.missing_keys}
    missing = [name for name in loaded.missing_keys if parameters[name].data_ptr() not in filled]
    prompt = {"prompt_embeddings"} if trained.active_peft_config.is_prompt_learning else set()
    return not missing and not set(loaded.unexpected_keys) - prompt


def _compare_tensors(state: dict[str, torch.Tensor], folder: Path, allowed: float) -> float:
    """A difference between the tensors of the saved files and those in memory; 0 for none, nan for a missing tensor.

    Args:
        state: In memory.
        folder: Of the files.
        allowed: What a number may differ by.
    """
    seen: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name not in state or list(state[name].shape) != list(tensors.get_slice(name).get_shape()):
                    return float("nan")
                seen.add(name)
                distance = (tensors.get_tensor(name).float() - state[name].cpu().float()).abs()
                difference = float(distance.max()) if distance.numel() else 0.0  # of AdaLoRA, a rank may be 0
                if not difference <= allowed:  # nan, too
                    return difference
    addresses = {state[name].data_ptr() for name in seen}  # tied weights are saved once
    return 0.0 if all(state[name].data_ptr() in addresses for name in state) else float("nan")
