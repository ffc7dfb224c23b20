"""A run, from top to bottom: the cheapest failure first, then the weights, then training."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig, SFTTrainer

from recipe_runner import run_folder
from recipe_runner.errors import Interrupted, user_error
from recipe_runner.recipe import Recipe
from recipe_runner.training import card, environment, model, plan, sources, tokens, verify
from recipe_runner.training.environment import Precision
from recipe_runner.training.tokens import PreparedSplit


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before weights are loaded."""

    config: SFTConfig
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    train: PreparedSplit
    evaluation: PreparedSplit | None
    fingerprint: str


def run_recipe(recipe: Recipe, resume: str) -> Path:
    """Trains by a recipe and returns the run folder.

    Args:
        recipe: A resolved recipe.
        resume: `auto`, `never`, or the folder of a run.

    Raises:
        UserError: The recipe, the data or the environment is at fault.
        Interrupted: The user pressed Ctrl-C.
    """
    run_folder.check_writable(recipe)
    found = run_folder.find_resumable(recipe, resume)
    prepared = prepare(recipe)
    config = prepared.config
    folder = _agree(run_folder.create_run_folder(recipe) if config.process_index == 0 and not found else found)
    config.output_dir = str(folder / "checkpoints")
    with _recorded(folder, config):
        _write_status(config, folder, "running")
        trainer = build_trainer(recipe, prepared)
        _stop_on_non_finite(trainer, folder)
        _keep_dtypes_on_resume(trainer)
        interruption = _Interruption()
        trainer.add_callback(interruption)
        if config.process_index == 0:
            trainer.add_callback(_Recorder(folder))
            run_folder.write_json(folder / "environment.json", describe_run(recipe, prepared))
        _say(
            config, plan.describe_plan(recipe, trainer, prepared.precision, prepared.train, prepared.evaluation, folder)
        )
        _train(trainer, folder, interruption, found is not None)
        result = _save(trainer, recipe, folder)
        if config.process_index == 0:
            card.write_card(recipe, folder, result, prepared.train.accounting, trainer.state.log_history)
        _write_status(config, folder, "completed", step=trainer.state.global_step)
        _say(config, f"Completed: {result}")
    return folder


def prepare(recipe: Recipe) -> Prepared:
    """Checks and prepares everything but the weights, the cheapest first.

    Raises:
        UserError: The recipe, the data or the environment is at fault.
    """
    precision = environment.choose_precision(recipe)
    model.find_model(recipe)
    config = build_config(recipe, precision)
    _say(config, f"Preparing {recipe.values['name']} ...")
    rows, eval_rows = sources.load_splits(recipe)
    tokenizer = model.load_tokenizer(recipe)
    train = tokens.prepare_split(rows, recipe, tokenizer, config, config.packing, "train")
    evaluation = None
    if eval_rows is not None:
        packing = config.packing if config.eval_packing is None else config.eval_packing
        evaluation = tokens.prepare_split(eval_rows, recipe, tokenizer, config, packing, "eval")
    model_config = model.load_model_config(recipe)
    if peft_config := model.build_peft(recipe):
        model.check_targets(recipe, peft_config, model_config)
    return Prepared(config, precision, tokenizer, train, evaluation, rows._fingerprint)


def build_trainer(recipe: Recipe, prepared: Prepared) -> SFTTrainer:
    """Hands everything to TRL, which loads the weights, quantizes them and puts the adapter on.

    Raises:
        UserError: The weights can't be loaded.
    """
    try:
        trainer = SFTTrainer(
            model=recipe.values["model"]["name_or_path"],
            args=prepared.config,
            train_dataset=prepared.train.dataset,
            eval_dataset=prepared.evaluation.dataset if prepared.evaluation else None,
            processing_class=prepared.tokenizer,
            quantization_config=model.build_quantization(recipe),
            peft_config=model.build_peft(recipe),
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, SafetensorError) as error:
        raise recipe.error("model-not-loaded", _first_line(error), "", "model", "name_or_path") from error
    except (ImportError, ValueError, RuntimeError) as error:
        raise recipe.error("training-refused", _first_line(error), "", "training") from error
    for name, key in (("create_optimizer", "optim"), ("create_scheduler", "lr_scheduler_type")):
        setattr(trainer, name, _refusing(getattr(trainer, name), recipe, key))
    model.keep_4bit_weights_trainable(trainer.model)
    return trainer


def _refusing(create: Callable[..., Any], recipe: Recipe, key: str) -> Callable[..., Any]:
    """Says at which key an optimizer or scheduler is refused: transformers makes them when training begins."""

    def create_or_refuse(*args: Any, **kwargs: Any) -> Any:
        try:
            return create(*args, **kwargs)
        except (ImportError, ValueError, TypeError) as error:
            raise recipe.error("training-refused", _first_line(error), "", "training", key) from error

    return create_or_refuse


def describe_run(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """What `environment.json` holds: versions and hardware, precision, what became of the data."""
    splits = {"train": prepared.train, "eval": prepared.evaluation}
    return environment.describe_environment(recipe) | {
        "precision": str(prepared.precision),
        "data": {name: asdict(split.accounting) for name, split in splits.items() if split},
        "dataset_fingerprint": prepared.fingerprint,
    }


def build_config(recipe: Recipe, precision: Precision) -> SFTConfig:
    """The trainer's configuration: the recipe's `training` section, and what other sections own.

    Raises:
        UserError: TRL or transformers refuses the combination of fields.
    """
    section, base = recipe.section("training"), recipe.values["model"]
    section.pop("chat_template_path", None)  # set on the tokenizer already
    init = {key: base[key] for key in ("revision", "attn_implementation", "use_safetensors") if key in base}
    owned = {
        "output_dir": os.devnull,  # replaced once the run folder exists
        "seed": recipe.values["run"]["seed"],
        "data_seed": recipe.values["run"]["seed"],
        "bf16": precision.bf16,
        "fp16": precision.fp16,
        "trust_remote_code": base["trust_remote_code"],
        "model_init_kwargs": init | {"dtype": precision.dtype},
        "dataset_kwargs": {"skip_prepare_dataset": True},  # prepared before the weights are loaded
    }
    try:
        config = SFTConfig(**{**section, **owned})
    except (ValueError, ImportError, TypeError) as error:
        raise recipe.error("training-refused", _first_line(error), "", "training") from error
    trackers = get_available_reporting_integrations()
    for tracker in set(config.report_to) - set(trackers):
        known = f"installed trackers: {', '.join(sorted(trackers)) or 'none'}"
        raise recipe.error("tracker-missing", f"'{tracker}' is not installed", known, "training", "report_to")
    return config


class _Recorder(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl, and marks checkpoints that were written whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        run_folder.append_metrics(self.folder, {"step": state.global_step, **(logs or {})})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / run_folder.COMPLETE).touch()


class _Interruption(TrainerCallback):
    """The first SIGINT (Ctrl-C) or SIGTERM ends the step, saves a checkpoint and stops; the second stops at once."""

    def __init__(self) -> None:
        self.requested, self.number = False, signal.SIGINT

    def __call__(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.number = True, signal.Signals(number)
        print(
            "\nInterrupted: finishing this step and saving a checkpoint (Ctrl-C again to stop at once).",
            file=sys.stderr,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        requested = torch.tensor(self.requested, device=args.device)
        if args.world_size > 1:  # the signal reaches the processes in different steps: they stop together
            requested = requested.int()
            torch.distributed.all_reduce(requested, torch.distributed.ReduceOp.MAX)
        if requested:
            self.requested = control.should_training_stop = control.should_save = True


def _train(trainer: SFTTrainer, folder: Path, interruption: _Interruption, resumed: bool) -> None:
    """Trains, from the last checkpoint of a resumed run."""
    checkpoint = run_folder.last_checkpoint(folder) if resumed else None
    if checkpoint and trainer.is_world_process_zero():
        run_folder.drop_metrics_after(folder, int(checkpoint.name.rpartition("-")[2]))
    before = {number: signal.signal(number, interruption) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interruption.requested and trainer.state.global_step < trainer.state.max_steps:
        message = f"Interrupted at step {trainer.state.global_step}; continue with: --resume {folder}"
        raise Interrupted(message, interruption.number)


def _save(trainer: SFTTrainer, recipe: Recipe, folder: Path) -> Path:
    """Saves the adapter or the model, with tokenizer and chat template, and checks that it can be used."""
    result = folder / ("adapter" if recipe.values.get("peft") else "model")
    trainer.save_model(str(result))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        verify.verify_saved(trainer, result)
    return result


def _stop_on_non_finite(trainer: SFTTrainer, folder: Path) -> None:
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


def _keep_dtypes_on_resume(trainer: SFTTrainer) -> None:
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


@contextlib.contextmanager
def _recorded(folder: Path, config: SFTConfig) -> Iterator[None]:
    """Leaves the right status in the run folder, whatever happens."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        _write_status(config, folder, "interrupted")
        raise
    except BaseException as error:
        _write_status(config, folder, "failed", error=str(error) or type(error).__name__)
        if isinstance(error, torch.OutOfMemoryError):
            fix = "lower per_device_train_batch_size (and raise gradient_accumulation_steps), or max_length"
            raise user_error("out-of-memory", str(error).splitlines()[0], fix) from error
        if isinstance(error, OSError):
            raise user_error("input-output", str(error), "check the disk; --resume continues the run") from error
        raise


def _write_status(config: SFTConfig, folder: Path, status: str, **details: Any) -> None:
    if config.process_index == 0:
        checkpoint = run_folder.last_checkpoint(folder)
        run_folder.write_status(folder, status, checkpoint=str(checkpoint) if checkpoint else None, **details)


def _agree(folder: Path | None) -> Path:
    """The first process decides on the run folder, all use it."""
    decided = [folder]
    broadcast_object_list(decided)
    assert decided[0] is not None
    return decided[0]


def _say(config: SFTConfig, text: str) -> None:
    if config.process_index == 0:
        print(text, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
