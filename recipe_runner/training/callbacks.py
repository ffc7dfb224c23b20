"""What happens beside training: metrics, whole checkpoints, signals."""

import math
import operator
import os
import signal
import sys
import textwrap
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback

from recipe_runner.runs.folder import rotate_checkpoints, vouch_for
from recipe_runner.runs.metrics import append_metrics
from recipe_runner.stages import Stage


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
            vouch_for(checkpoint)
            rotate_checkpoints(self.folder, self.limit, state.best_model_checkpoint)


class Lines(TrainerCallback):
    """Says what is logged in a line of columns, and logs the first and the last step whatever `logging_steps` is.

    Tokens a second are those since the line before, without the time of evaluations; `left` is the time that the steps,
    evaluations and checkpoints to come take, if they take as long as those of this run did.
    """

    COLUMNS: ClassVar = {"step": 8, "loss": 10, "margin": 10, "rate": 11, "tokens/s": 10, "left": 10}

    def __init__(self, stage: Stage) -> None:
        self.measures = stage.measures
        self.shown = stage.shown
        self.evaluated, self.told = 0.0, False
        self.evaluations: list[float] = []  # seconds of each
        self.saves: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to measure."""
        self.began, self.first = time.monotonic(), state.global_step
        self.last, self.tokens = self.began, 0 if not state.global_step else None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Keeps how long it took."""
        self.evaluations.append((metrics or {}).get("eval_runtime", 0.0))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps how long it took: what the end of the step is ago, without the evaluation between."""
        self.saves.append(time.monotonic() - self.ended - sum(self.evaluations[self.before :]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Has the first and the last step logged."""
        self.ended, self.before = time.monotonic(), len(self.evaluations)
        if args.logging_strategy == "steps" and state.global_step in (1, state.max_steps):
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Says it."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._say_step(args, state, logs)
        elif "eval_loss" in logs:
            self.evaluated += logs.get("eval_runtime", 0)
            found = "; ".join(f"{name} {logs[key]:.4g}" for key, name in self.measures.items() if key in logs)
            tqdm.write(textwrap.fill(found, 78, initial_indent=f"{state.global_step:>8}  ", subsequent_indent=" " * 10))
        elif "train_runtime" in logs:
            steps, taken = state.global_step - self.first, timedelta(seconds=round(logs["train_runtime"]))
            tqdm.write(f"  {steps:,} step{'s' * (steps != 1)} in {taken}; mean loss {logs['train_loss']:.4g}")

    def _say_step(self, args: Any, state: Any, logs: dict[str, Any]) -> None:
        now, tokens, done = time.monotonic(), logs.get("num_tokens"), state.global_step - self.first
        cells = {"step": f"{state.global_step:,}", "loss": f"{logs['loss']:.4f}"}
        cells |= {name: f"{logs.get(key) or 0:.4f}" for key, name in self.shown.items()}
        cells["rate"] = f"{logs.get('learning_rate', 0):.2e}"
        speed = ""
        if tokens is not None and self.tokens is not None:
            speed = f"{(tokens - self.tokens) / max(now - self.last - self.evaluated, 1e-3):,.0f}"
        beside = [*self.evaluations, *self.saves]
        left = (now - self.began - sum(beside)) / max(done, 1) * (state.max_steps - state.global_step)
        for taken, strategy, every in (
            (self.evaluations, args.eval_strategy, state.eval_steps),
            (self.saves, args.save_strategy, state.save_steps),
        ):
            left += sum(taken) / max(len(taken), 1) * _count_to_come(state, str(strategy.value), every)
        cells |= {"tokens/s": speed, "left": str(timedelta(seconds=round(left)))}
        if not self.told:
            tqdm.write("".join(f"{name:>{self.COLUMNS.get(name, 10)}}" for name in cells))
        tqdm.write("".join(f"{cell:>{self.COLUMNS.get(name, 10)}}" for name, cell in cells.items()))
        self.told, self.last, self.tokens, self.evaluated = True, now, tokens, 0.0


def _count_to_come(state: Any, strategy: str, every: float | None) -> int:
    """How often something that is done every so many steps, or after each epoch, is still to be done."""
    if strategy == "steps" and every:
        count = int(every if every >= 1 else max(1, math.ceil(every * state.max_steps)))
        return int(state.max_steps // count - state.global_step // count)
    return math.ceil(state.num_train_epochs - (state.epoch or 0)) if strategy == "epoch" else 0


class EarlyStop(EarlyStoppingCallback):
    """transformers' early stopping, which says why, and goes on counting in a run that is resumed."""

    def __init__(self, patience: int, threshold: float) -> None:
        super().__init__(patience, threshold)
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the evaluations before the checkpoint of a resumed run: transformers 5.23 begins anew at 0."""
        super().on_train_begin(args, state, control, **kwargs)
        self.key = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        best, self.early_stopping_patience_counter = None, 0
        for value in (entry[self.key] for entry in state.log_history if self.key in entry):
            better = best is None or (value > best if args.greater_is_better else value < best)
            improved = best is None or (better and abs(value - best) > self.early_stopping_threshold)
            self.early_stopping_patience_counter = 0 if improved else self.early_stopping_patience_counter + 1
            best = value if better else best

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Stops, and says why."""
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop and not self.stopped:
            self.stopped = self.early_stopping_patience_counter >= self.early_stopping_patience
            if self.stopped and state.is_world_process_zero:
                told = f"{self.early_stopping_patience} evaluations without a better {self.key}"
                tqdm.write(f"  Stopped early: {told} than {state.best_metric:.4g}")


class Bar(ProgressCallback):
    """transformers' bar, on a terminal, without its dictionaries."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the bar, which goes when training is over."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.leave = False

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Leaves it to `Lines`."""


def say_progress(trainer: Any, stage: Stage) -> None:
    """Puts `Lines`, and on a terminal `Bar`, in the place of transformers' output."""
    wanted = trainer.pop_callback(ProgressCallback)
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(Lines(stage))
    if wanted and sys.stderr.isatty():
        trainer.add_callback(Bar())


def weigh_batches(trainer: Any) -> None:
    """Makes held-out measures means of rows.

    TRL 1.16 logs the mean of what it found in each batch, in which the rows of a small last batch would count more.
    """
    sizes: list[int] = []
    predict, log = trainer.prediction_step, trainer.log

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]) if isinstance(inputs, Mapping) else len(inputs))
        return predict(model, inputs, *args, **kwargs)

    def weighed(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        if not trainer.model.training and sizes:
            kept = trainer._metrics["eval"]
            for name, values in kept.items():
                if len(values) == len(sizes):
                    kept[name] = [sum(map(operator.mul, values, sizes)) / sum(sizes)]
            sizes.clear()
        return log(logs, *args, **kwargs)

    trainer.prediction_step, trainer.log = counted, weighed


SIGNALLED = "recipe_runner/signal"  # in the store of the processes: the signal, and the last step
ECHO_SECONDS = 5  # a launcher passes a signal on within about a second


class Interruption(TrainerCallback):
    """The first SIGINT (Ctrl-C) or SIGTERM ends the step, saves a checkpoint and stops; the second stops at once.

    Under a launcher the first one comes twice: from whoever sent it to all processes, and from the launcher.
    """

    def __init__(self, speaks: bool) -> None:
        self.requested, self.number, self.speaks, self.since = False, signal.SIGINT, speaks, 0.0
        self.last = 0  # the step after which all processes stop, once they agree on it

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
        if args.world_size > 1:
            self._agree(state.global_step)
            stops = 0 < self.last <= state.global_step  # a signal may have come since they looked
        else:
            stops = self.requested
        if stops:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False  # it would come before the checkpoint

    def _agree(self, step: int) -> None:
        """Agrees with the other processes on the step after which all stop.

        A signal reaches them in different steps, or one of them only. The first one that notices it writes the next
        step into the store by which the processes found each other, and all look there after each of their steps: no
        GPU has to wait. None can end that next step, in which they add their gradients, before it is written.
        """
        store = _get_default_store()
        if self.requested and not self.last:
            said = store.compare_set(SIGNALLED, "", f"{int(self.number)} {step + 1}").decode()
        elif not self.last and store.check([SIGNALLED]):
            said = store.get(SIGNALLED).decode()
        else:
            return
        self.since = self.since if self.requested else time.monotonic()
        number, last = said.split()
        self.requested, self.number, self.last = True, signal.Signals(int(number)), int(last)
