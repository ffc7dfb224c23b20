"""AdaLoRA's ranks: moved after every step to where they matter, as PEFT's documentation asks its users to do."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from recipe_runner.runs.metrics import append_metrics


class Allocation(TrainerCallback):
    """Calls PEFT's `update_and_allocate` after every step of the optimizer, while its gradients are there.

    Ranks go into metrics.jsonl where they have changed since the last line. What the last mask left out is 0 at the
    end, also between two masks (`deltaT`): PEFT saves the rest only.

    Source: Zhang et al. 2023, arXiv 2303.10512; peft/tuners/adalora/model.py 0.21.2, update_and_allocate.
    """

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.accelerator, self.folder = trainer.accelerator, folder
        self.tuner = trainer.accelerator.unwrap_model(trainer.model).base_model
        self.written: dict[str, int] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves ranks; a step that a gradient scaler left out has no gradients to judge by."""
        if not self.accelerator.optimizer_step_was_skipped:
            self.tuner.update_and_allocate(state.global_step + 1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the ranks."""
        ranks = read_ranks(self.tuner.peft_config[self.tuner.trainable_adapter_name].rank_pattern or {})
        if args.process_index == 0 and ranks != self.written:
            append_metrics(self.folder, {"step": state.global_step, "rank_total": sum(ranks.values()), "ranks": ranks})
            self.written = ranks

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves out of the model in memory what is not saved."""
        pattern = self.tuner.peft_config[self.tuner.trainable_adapter_name].rank_pattern
        if pattern:
            self.tuner.rankallocator.mask_using_rank_pattern(self.tuner.model, pattern)


def read_ranks(pattern: Mapping[str, list[bool]]) -> dict[str, int]:
    """Module -> its rank, of AdaLoRA's `rank_pattern`, which says of each part of a module whether it is kept."""
    return {name.partition(".lora_E")[0].removeprefix("model."): sum(kept) for name, kept in pattern.items()}


def allocate_ranks(trainer: Any, folder: Path, continued: bool) -> None:
    """Makes a trainer of an AdaLoRA adapter do what AdaLoRA is: move ranks, and keep its matrices orthogonal.

    PEFT 0.21 adds the orthogonal regularization to the loss that the model returns, and TRL 1.16 makes its own loss of
    the log-probabilities: it would be lost. An adapter that is trained further keeps the ranks that it has.
    """
    warnings.filterwarnings("ignore", message=r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape")  # rank 0
    config = trainer.accelerator.unwrap_model(trainer.model).active_peft_config
    compute_loss = trainer.compute_loss

    def regularized(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        found = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training:
            return found
        loss, *outputs = found if return_outputs else (found,)
        once_a_step = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        steps = trainer.current_gradient_accumulation_steps if once_a_step else 1  # as TRL does with its own addition
        loss = loss + config.orth_reg_weight * measure_orthogonality(trainer.model) / steps
        return (loss, *outputs) if return_outputs else loss

    trainer.compute_loss = regularized
    if not continued:
        trainer.add_callback(Allocation(trainer, folder))


def measure_orthogonality(model: torch.nn.Module) -> torch.Tensor:
    """How far AdaLoRA's matrices are from orthogonal: the mean of `|A A^T - I|` and `|B^T B - I|` over all of them.

    Source: arXiv 2303.10512, equation 4; peft/tuners/adalora/model.py 0.21.2, AdaLoraModel.forward.
    """
    distances = []
    for name, matrix in model.named_parameters():
        if matrix.requires_grad and (".lora_A." in name or ".lora_B." in name):
            square = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
            distances.append(torch.linalg.matrix_norm(square.float() - torch.eye(len(square), device=square.device)))
    return torch.stack(distances).mean()
