"""What happens beside training: metrics, whole checkpoints, signals."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from recipe_runner.runs.folder import rotate_checkpoints, vouch_for
from recipe_runner.runs.metrics import append_metrics


class Finished(Exception):
    """The checkpoint that a run is resumed from was its last."""


class Recorder(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl, marks checkpoints that are whole, and then deletes old ones.

    A checkpoint is whole once every process has written its part. transformers 5.23 deletes old ones before that can be
    known, so `save_total_limit` is taken from it: a kill at any moment leaves a whole checkpoint.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder, self.limit = folder, config.save_total_limit
        config.save_total_limit = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keeps what was logged."""
        if args.process_index == 0:
            append_metrics(self.folder, {"step": state.global_step, **(logs or {})})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends a resumed run that has no step left."""
        if 0 < state.max_steps <= state.global_step:
            raise Finished  # transformers 5.23 would train one step more before it looks

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Marks a whole checkpoint, then deletes old ones."""
        args.distributed_state.wait_for_everyone()
        if args.process_index == 0:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (checkpoint / "README.md").unlink(missing_ok=True)  # PEFT's empty form, with the path of the base
            vouch_for(checkpoint)
            rotate_checkpoints(self.folder, self.limit, state.best_model_checkpoint)


ECHO_SECONDS = 5  # a launcher passes a signal on within about a second


class Interruption(TrainerCallback):
    """The first SIGINT (Ctrl-C) or SIGTERM ends the step, saves a checkpoint and stops; the second stops at once.

    Under a launcher the first one comes twice: from whoever sent it to all processes, and from the launcher.
    """

    def __init__(self, speaks: bool) -> None:
        self.requested, self.number, self.speaks, self.since = False, signal.SIGINT, speaks, 0.0

    def __call__(self, number: int, frame: Any) -> None:
        """Notes a signal."""
        if self.requested:
            if "LOCAL_RANK" in os.environ and time.monotonic() - self.since < ECHO_SECONDS:
                return
            raise KeyboardInterrupt
        self.requested, self.number, self.since = True, signal.Signals(number), time.monotonic()
        if self.speaks:
            told = "Interrupted: finishing this step and saving a checkpoint (Ctrl-C again to stop at once)."
            print(f"\n{told}", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops all processes at the same step."""
        number = torch.tensor(int(self.number) if self.requested else 0, device=args.device)
        if args.world_size > 1:  # it reaches the processes in different steps, or one of them only: they stop together
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        if number:
            self.since = self.since if self.requested else time.monotonic()
            self.number = signal.Signals(int(number))
            self.requested = control.should_training_stop = control.should_save = True
            control.should_evaluate = False  # it would come before the checkpoint
