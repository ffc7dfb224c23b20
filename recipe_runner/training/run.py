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
from trl import SFTConfig, SFTTrainer

from recipe_runner.problems.errors import Interrupted, first_line, user_error
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.runs import folder as run_folder
from recipe_runner.training import card, trainers, verify
from recipe_runner.training import prepare as preparation
from recipe_runner.training import summary as plan


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
    found = agree(found)
    preparation.check_rows(recipe, prepared)
    if found and (note := preparation.check_resumed(recipe, prepared, found)):
        _say(config, note)
    for warning in prepared.warnings if config.process_index == 0 else ():
        print(warning, file=sys.stderr)
    folder = found or agree(run_folder.create_run_folder(recipe) if config.process_index == 0 else None)
    assert folder is not None
    config.output_dir = str(folder / "checkpoints")
    lock = run_folder.lock_run(folder) if config.process_index == 0 else contextlib.nullcontext()
    with lock, _recorded(folder, config):
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


class _Finished(Exception):
    """The checkpoint that a run is resumed from was its last."""


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if 0 < state.max_steps <= state.global_step:
            raise _Finished  # transformers 5.23 would train one step more before it looks

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone()
        if args.process_index == 0:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / run_folder.COMPLETE).touch()
            run_folder.rotate_checkpoints(self.folder, self.limit, state.best_model_checkpoint)


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
        number = torch.tensor(int(self.number) if self.requested else 0, device=args.device)
        if args.world_size > 1:  # it reaches the processes in different steps, or one of them only: they stop together
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        if number:
            self.since = self.since if self.requested else time.monotonic()
            self.number = signal.Signals(int(number))
            self.requested = control.should_training_stop = control.should_save = True
            control.should_evaluate = False  # it would come before the checkpoint


def _train(trainer: SFTTrainer, folder: Path, interruption: _Interruption, resumed: bool) -> None:
    """Trains, from the last checkpoint of a resumed run."""
    checkpoint = agree(run_folder.last_checkpoint(folder) if resumed else None)
    if checkpoint and trainer.is_world_process_zero():
        run_folder.drop_metrics_after(folder, int(checkpoint.name.rpartition("-")[2]))
        run_folder.drop_half_checkpoints(folder)
    before = {number: signal.signal(number, interruption) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except _Finished:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
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


def agree(path: Path | None) -> Path | None:
    """The first process decides on a folder or a checkpoint: disks don't show the same to all at the same time."""
    decided = [path]
    broadcast_object_list(decided)
    return decided[0]


def _say(config: SFTConfig, text: str) -> None:
    if config.process_index == 0:
        print(text, flush=True)
