"""Checks that what was saved is what was trained: no run completes with a result that can't be used."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from recipe_runner.problems.errors import user_error

ROWS, TOKENS = 2, 64  # of the training data: enough to go through every adapted layer


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
    trainer: Any, folder: Path, rows: list[list[int]], gathered: dict[str, torch.Tensor] | None = None
) -> None:
    """Compares a saved adapter or model with the one in memory.

    An adapter is loaded back as a second adapter of the model in memory, so that it costs no second copy of the base,
    and must give the same logits. The tensors of a full model are compared one by one.

    Args:
        trainer: With the trained model.
        folder: Where it was saved.
        rows: Tokens of some rows to try an adapter on.
        gathered: What `gather_sharded` gave.

    Raises:
        UserError: They differ.
    """
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if gathered is not None:
        adapter = isinstance(trained, PeftModel)
        difference = _compare_tensors(
            get_peft_model_state_dict(trained, state_dict=gathered) if adapter else gathered, folder
        )
    elif isinstance(trained, PeftModel):
        difference = _compare_logits(trained, trainer.args.device, rows, folder)
    else:
        difference = _compare_tensors(trained.state_dict(), folder)
    if difference != 0:  # true for nan, too
        message = f"what was saved in {folder} differs from the trained model (by {difference:g})"
        raise user_error("saved-model-differs", message, "train again; the checkpoints are kept")


def _compare_logits(trained: PeftModel, place: torch.device, rows: list[list[int]], folder: Path) -> float:
    """Largest difference of logits `(batch, sequence, vocabulary)` between the adapter in memory and the saved one."""
    device = "cpu" if place.type == "cpu" else str(place)  # safetensors knows no cpu:0
    trained.eval()
    active = trained.active_adapter
    loaded = trained.load_adapter(str(folder), adapter_name="saved", torch_device=device)
    try:
        if loaded.missing_keys or loaded.unexpected_keys:  # PEFT only warns, and keeps what it initialised
            return float("nan")
        parameters = dict(trained.named_parameters())
        for name, parameter in parameters.items():  # PEFT loads in float32; on a quantized base TRL trains in bfloat16
            if ".saved" in name:
                parameter.data = parameter.data.to(parameters[name.replace(".saved", f".{active}")].dtype)
        worst = 0.0
        for row in rows:
            batch = torch.tensor([row[:TOKENS]], device=place)
            logits = []
            for adapter in (active, "saved"):
                trained.set_adapter(adapter)
                with torch.no_grad():
                    logits.append(trained(input_ids=batch).logits.float())
            worst = max(worst, float((logits[0] - logits[1]).abs().max()))
    finally:
        trained.set_adapter(active)
        trained.delete_adapter("saved")
    return worst


def _compare_tensors(state: dict[str, torch.Tensor], folder: Path) -> float:
    """Largest difference between the tensors of the saved files and those in memory; nan when a tensor is missing."""
    seen: set[str] = set()
    worst = 0.0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name not in state or list(state[name].shape) != list(tensors.get_slice(name).get_shape()):
                    return float("nan")
                seen.add(name)
                worst = max(worst, float((tensors.get_tensor(name).float() - state[name].cpu().float()).abs().max()))
    addresses = {state[name].data_ptr() for name in seen}  # tied weights are saved once
    return worst if all(state[name].data_ptr() in addresses for name in state) else float("nan")
