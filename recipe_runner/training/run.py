"""A run, from top to bottom: the cheapest failure first, then the weights, then training."""

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from recipe_runner import run_folder
from recipe_runner.errors import Interrupted, first_line, user_error
from recipe_runner.recipe import Recipe
from recipe_runner.training import card, plan, preparation, trainers, verify


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
    prepared = preparation.prepare(recipe)
    config = prepared.config
    preparation.check_rows(recipe, prepared)
    if found and (note := preparation.check_resumed(recipe, prepared, found)):
        _say(config, note)
    for warning in prepared.warnings if config.process_index == 0 else ():
        print(warning, file=sys.stderr)
    folder = agree(run_folder.create_run_folder(recipe) if config.process_index == 0 and not found else found)
    config.output_dir = str(folder / "checkpoints")
    with _recorded(folder, config):
        if found:
            _write_status(config, folder, "running")
        trainer = trainers.build_trainer(recipe, prepared)
        trainers.stop_on_non_finite(trainer, folder)
        trainers.keep_dtypes_on_resume(trainer)
        interruption = _Interruption(speaks=config.process_index == 0)
        trainer.add_callback(interruption)
        trainer.add_callback(_Recorder(folder, config))
        if config.process_index == 0:
            run_folder.write_json(folder / "environment.json", preparation.describe_run(recipe, prepared))
        _say(config, plan.describe_plan(recipe, trainer, prepared, folder))
        _train(trainer, folder, interruption, found is not None)
        result = _save(trainer, recipe, folder)
        if config.process_index == 0:
            card.write_card(recipe, folder, result, prepared.train.accounting, trainer.state.log_history)
        _write_status(config, folder, "completed", step=trainer.state.global_step)
        _say(config, f"Completed: {result}")
    return folder


class _Recorder(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl, marks checkpoints that are whole, and then deletes old ones.

    A checkpoint is whole once every process has written its part. transformers 5.23 deletes old ones before that can be
    known, so `save_total_limit` is taken from it: a kill at any moment leaves a whole checkpoint.
    """

    def __init__(self, folder: Path, config: SFTConfig) -> None:
        self.folder, self.limit = folder, config.save_total_limit
        config.save_total_limit = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if args.process_index == 0:
            run_folder.append_metrics(self.folder, {"step": state.global_step, **(logs or {})})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone()
        if args.process_index == 0:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / run_folder.COMPLETE).touch()
            rotate_checkpoints(args.output_dir, self.limit, state.best_model_checkpoint)


ECHO_SECONDS = 5  # a launcher passes a signal on within about a second


class _Interruption(TrainerCallback):
    """The first SIGINT (Ctrl-C) or SIGTERM ends the step, saves a checkpoint and stops; the second stops at once.

    Under a launcher the first one comes twice: from whoever sent it to all processes, and from the launcher.
    """

    def __init__(self, speaks: bool) -> None:
        self.requested, self.number, self.speaks, self.since = False, signal.SIGINT, speaks, 0.0

    def __call__(self, number: int, frame: Any) -> None:
        if self.requested:
            if "LOCAL_RANK" in os.environ and time.monotonic() - self.since < ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self.requested, self.number, self.since = True, signal.Signals(number), time.monotonic()
        if self.speaks:
            told = "Interrupted: finishing this step and saving a checkpoint (Ctrl-C again to stop at once)."
            print(f"\n{told}", file=sys.stderr)

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
        run_folder.drop_half_checkpoints(folder)
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
    gathered = verify.gather_sharded(trainer)
    if trainer.is_world_process_zero():
        shutil.rmtree(result / "ref", ignore_errors=True)  # DPO's frozen copy of the adapter it began with
        verify.verify_saved(trainer, result, gathered)
    return result


# What torch 2.13 says when a process of the group does not answer (gloo, NCCL, DeepSpeed over them).
LOST = re.compile(r"timed? ?out|closed by peer|reset by peer|gloo|NCCL|ProcessGroup", re.IGNORECASE)


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
        if config.world_size > 1 and isinstance(error, RuntimeError) and LOST.search(str(error)):
            what = f"another process died, or hung for {config.ddp_timeout:,} s (training.ddp_timeout)"
            fix = "its own message says why; --resume continues the run"
            raise user_error("process-lost", f"{what}: {first_line(error)}", fix) from error
        raise


def _write_status(config: SFTConfig, folder: Path, status: str, **details: Any) -> None:
    if config.process_index == 0:
        checkpoint = run_folder.last_checkpoint(folder)
        run_folder.write_status(folder, status, checkpoint=str(checkpoint) if checkpoint else None, **details)


def agree(folder: Path | None) -> Path:
    """The first process decides on the run folder, all use it."""
    decided = [folder]
    broadcast_object_list(decided)
    assert decided[0] is not None
    return decided[0]


def _say(config: SFTConfig, text: str) -> None:
    if config.process_index == 0:
        print(text, flush=True)
