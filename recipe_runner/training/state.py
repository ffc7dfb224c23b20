"""What a saved adapter leaves out of a checkpoint: the network behind a prompt, and AdaLoRA's ranks that may return."""

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from recipe_runner.files import read_object
from recipe_runner.recipe.rules.adapter import CONFIG

FILE = "trainable_state.safetensors"  # in a checkpoint
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of AdaLoRA's RankAllocator: how much each number matters


def keep_state(trainer: Any) -> None:
    """Has checkpoints hold everything that is trained, and resumes from that, where PEFT's adapter is not all of it.

    PEFT 0.21 saves the prompt that a network made, not the network (p-tuning, prefix tuning with a projection), which
    its `load_adapter` then takes for the network's input; of AdaLoRA it saves the ranks that are kept at that moment,
    and does not know in a new process that others were dropped. DeepSpeed and FSDP keep everything by themselves.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = model.active_peft_config
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    if config.is_prompt_learning or isinstance(config, AdaLoraConfig):
        trainer.add_callback(_Keeper())
        trainer._load_from_checkpoint = lambda checkpoint, model_=None: _load(model, Path(checkpoint))
        trainer._load_best_model = lambda: _load(model, Path(trainer.state.best_model_checkpoint))


class _Keeper(TrainerCallback):
    """Writes the state into each checkpoint, before it is vouched for."""

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Writes it."""
        if args.process_index == 0:
            tensors = {name: tensor.contiguous() for name, tensor in _collect(model).items()}
            save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)


def _collect(model: Any) -> dict[str, torch.Tensor]:
    """Everything that is trained, and AdaLoRA's scores of it."""
    found = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if allocator := getattr(model.base_model, "rankallocator", None):
        found |= {f"{score}|{name}": tensor for score in SCORES for name, tensor in getattr(allocator, score).items()}
    return found


def _load(model: Any, checkpoint: Path) -> None:
    saved = load_file(checkpoint / FILE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])
    if allocator := getattr(model.base_model, "rankallocator", None):
        for score in SCORES:
            scores = {name.partition("|")[2]: tensor for name, tensor in saved.items() if name.startswith(f"{score}|")}
            place = {name: parameter.device for name, parameter in model.base_model.model.named_parameters()}
            setattr(allocator, score, {name: tensor.to(place[name]) for name, tensor in scores.items()})
        model.active_peft_config.rank_pattern = read_object(checkpoint / CONFIG).get("rank_pattern")
