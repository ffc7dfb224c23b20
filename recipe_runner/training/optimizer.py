"""The optimizer and the schedule of the learning rate, tried before the weights are there.

transformers 5.23 makes both when training begins, and says nothing of options that it does not look at.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from transformers import Trainer, trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_optimizer import _parse_optim_args

from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.problems.words import suggest

TRIED_STEPS = 1000  # of a schedule whose number of steps is not known yet


def forget_modules() -> None:
    """Takes from bitsandbytes the embeddings that it was told to update in 32 bits: it would keep them from run to run.

    bitsandbytes 0.50, optim/optimizer.py: GlobalOptimManager; transformers 5.23 registers them. Of a pipeline on a GPU,
    every stage had the embeddings of those before it in memory.
    """
    if optim := sys.modules.get("bitsandbytes.optim"):
        optim.GlobalOptimManager.get_instance().initialize()


def check_optimizer(config: Any, model: Any) -> None:
    """Makes the optimizer for a single number, and its schedule, as `Trainer.create_optimizer_and_scheduler` does.

    Args:
        config: The trainer's configuration.
        model: The model that is trained, on the meta device: some optimizers look for their modules in it.

    Raises:
        UserError: One of them is refused, or an option of theirs has no effect.
    """
    name, options = config.optim.value, _read_options(config.optim_args)
    try:
        with mock.patch.object(trainer, "_parse_optim_args", return_value=options):
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(config, model)
        if kwargs.keys() & {"params", "model", "optimizer_dict"}:  # made of modules, whose weights are not there yet
            cls, kwargs = torch.optim.SGD, {"lr": config.learning_rate}
        optimizer = cls([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except (ImportError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        key = "optim_args" if config.optim_args and not isinstance(error, ImportError) else "optim"
        raise user_error("training-refused", f"{name}: {first_line(error)}", path=("training", key)) from error
    for option in options.keys() - options.seen - kwargs.keys():
        known = sorted(options.seen)
        fix = suggest(option, known) or f"options: {', '.join(known) or 'none'}"
        raise user_error("training-refused", f"{name} has no option '{option}'", fix, path=("training", "optim_args"))
    _check_schedule(config, optimizer)


def freeze_first_matrices(model: torch.nn.Module) -> None:
    """Freezes what LoRA-FA does not train (peft/optimizers/lorafa.py 0.21.2): for counting, before the weights."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def use_peft_optimizer(trainer: Any, section: Mapping[str, Any], peft: Any) -> None:
    """Has a trainer make an optimizer of PEFT's, for what is trained in its model.

    It is made when training begins: loading a checkpoint of a quantized base puts new parameters in place of the old.

    Args:
        trainer: The trainer.
        section: `training.peft_optimizer`.
        peft: The adapter's configuration.

    Raises:
        UserError: PEFT refuses it, when it is made.
    """

    def create(model: Any = None) -> Any:
        if trainer.optimizer is None:
            trainer.optimizer = _make_peft_optimizer(trainer, section, peft)
        return trainer.optimizer

    trainer.create_optimizer = create


def _make_peft_optimizer(trainer: Any, section: Mapping[str, Any], peft: Any) -> Any:
    """The optimizer."""
    config, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    name, options = section["name"], {key: value for key, value in section.items() if key != "name"}
    try:
        if name == "lorafa":
            rate, decay = config.learning_rate, config.weight_decay
            return create_lorafa_optimizer(model, peft.r, peft.lora_alpha, rate, decay)
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(config, model)
        if name == "loraplus":
            kwargs["loraplus_weight_decay"] = config.weight_decay
            return create_loraplus_optimizer(model, cls, **kwargs, **options)
        kwargs["weight_decay"] = config.weight_decay
        return create_riemannian_optimizer(model, cls, **kwargs, **options)
    except (ValueError, TypeError) as error:
        message = f"{name}: {first_line(error)}"
        raise user_error("training-refused", message, path=("training", "peft_optimizer")) from error


def _read_options(text: str | None) -> "_Options":
    """Options as transformers reads them."""
    try:
        return _Options(_parse_optim_args(text))
    except ValueError as error:
        message = f"expected name=value, name=value, ...; found '{text}'"
        raise user_error("wrong-form", message, path=("training", "optim_args")) from error


def _check_schedule(config: Any, optimizer: torch.optim.Optimizer) -> None:
    """Makes the schedule, and asks it for the rate of its steps."""
    steps = config.max_steps if config.max_steps > 0 else TRIED_STEPS
    warmup = config.get_warmup_steps(steps)
    try:
        schedule = get_scheduler(config.lr_scheduler_type, optimizer, warmup, steps, config.lr_scheduler_kwargs)
        for rate in getattr(schedule, "lr_lambdas", ()):
            for step in {0, warmup, (warmup + steps) // 2, steps - 1}:
                float(rate(step))
    except (ValueError, TypeError, ArithmeticError) as error:
        function: Any = TYPE_TO_SCHEDULER_FUNCTION[config.lr_scheduler_type]
        given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
        takes = ", ".join(name for name in inspect.signature(function).parameters if name not in given)
        fix = f"{config.lr_scheduler_type.value} takes: {takes or 'no options'}"
        raise user_error(
            "training-refused", first_line(error), fix, path=("training", "lr_scheduler_kwargs")
        ) from error


class _Options(dict[str, str]):
    """Options that remember which of them were looked for."""

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__(options)
        self.seen: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> str:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As in a dict."""
        self.seen.add(key)
        return super().get(key, default)

    def pop(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        """As in a dict."""
        self.seen.add(key)
        return super().pop(key, default)
