"""TRL's trainer for a stage, and the three places where it is made to say what upstream keeps to itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from trl import DPOTrainer, SFTTrainer

from recipe_runner.model import base as model
from recipe_runner.model import continuation
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.runs import folder as run_folder
from recipe_runner.training.packing import PackingCheck
from recipe_runner.training.prepare import Prepared


class _PreparedDPOTrainer(DPOTrainer):
    """DPOTrainer on pairs that are tokenized already: TRL 1.16 has an option for that in SFTTrainer only."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps `length`, by which transformers groups rows: pairs have no `input_ids` that it could measure."""
        super()._set_signature_columns_if_needed()
        if "length" not in self._signature_columns:
            self._signature_columns.append("length")


TRAINERS: dict[str, Any] = {"pretrain": SFTTrainer, "sft": SFTTrainer, "dpo": _PreparedDPOTrainer}


def build_trainer(recipe: Recipe, prepared: Prepared) -> SFTTrainer:
    """Hands everything to TRL, which loads the weights, quantizes them and puts the adapter on.

    Raises:
        UserError: The weights can't be loaded.
    """
    adapter, base = prepared.adapter, recipe.values["model"]["name_or_path"]
    try:
        if adapter:
            trained = continuation.load_for_training(recipe, adapter, prepared.config, prepared.peft_config)
        trainer = TRAINERS[recipe.values["stage"]](
            model=trained if adapter else base,
            args=prepared.config,
            train_dataset=prepared.train.dataset,
            eval_dataset=prepared.evaluation.dataset if prepared.evaluation else None,
            processing_class=prepared.tokenizer,
            quantization_config=None if adapter else model.build_quantization(recipe),
            peft_config=None if adapter else prepared.peft_config,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError) as error:
        raise recipe.error("model-not-loaded", first_line(error), "", "model", "name_or_path") from error
    except (ImportError, ValueError, RuntimeError) as error:
        raise recipe.error("training-refused", first_line(error), "", "training") from error
    for name, key in (("create_optimizer", "optim"), ("create_scheduler", "lr_scheduler_type")):
        setattr(trainer, name, _refusing(getattr(trainer, name), recipe, key))
    model.keep_4bit_weights_trainable(trainer.model)
    if "seq_lengths" in prepared.train.dataset.column_names:
        trainer.add_callback(PackingCheck(trainer, recipe))
    return trainer


def _refusing(create: Callable[..., Any], recipe: Recipe, key: str) -> Callable[..., Any]:
    """Says at which key an optimizer or scheduler is refused: transformers makes them when training begins."""

    def create_or_refuse(*args: Any, **kwargs: Any) -> Any:
        try:
            return create(*args, **kwargs)
        except (ImportError, ValueError, TypeError) as error:
            raise recipe.error("training-refused", first_line(error), "", "training", key) from error

    return create_or_refuse


def stop_on_non_finite(trainer: SFTTrainer, folder: Path) -> None:
    """Ends the run before a loss or gradient that is not finite reaches the weights, and so the next checkpoint.

    transformers 5.23 replaces such losses in its log (logging_nan_inf_filter) and trains on. With float16 the gradient
    scaler deals with gradients that overflow, so only the loss is looked at.
    """
    training_step, get_grad_norm = trainer.training_step, trainer._get_grad_norm

    def fail(what: str) -> None:
        checkpoint = run_folder.last_checkpoint(folder)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        fix = "lower training.learning_rate, add training.warmup_steps, or look at the rows of this step"
        raise user_error(
            "non-finite", f"the {what} of step {trainer.state.global_step + 1} is not a finite number; {kept}", fix
        )

    def checked_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            fail("loss")
        return loss

    def checked_norm(*args: Any, **kwargs: Any) -> Any:
        norm = get_grad_norm(*args, **kwargs)
        if norm is not None and not trainer.args.fp16 and not torch.isfinite(torch.as_tensor(norm)).all():
            fail("gradient")
        return norm

    trainer.training_step, trainer._get_grad_norm = checked_step, checked_norm


def keep_dtypes_on_resume(trainer: SFTTrainer) -> None:
    """Keeps the adapter of a quantized base in bfloat16 when a checkpoint is loaded.

    TRL 1.16 trains it in bfloat16; transformers 5.23 resumes through PEFT's load_adapter, which casts it to float32, so
    that a resumed run would go on differently. `test_run.py` holds that it goes on the same.
    """
    load, dtypes = trainer._load_from_checkpoint, {name: p.dtype for name, p in trainer.model.named_parameters()}

    def load_and_cast(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        for name, parameter in trainer.model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])

    trainer._load_from_checkpoint = load_and_cast
