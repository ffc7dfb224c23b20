"""The longest batch, tried before the first step: where memory is short, a run ends in its first minute."""

import contextlib
import copy
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from recipe_runner.data.store import PreparedSplit
from recipe_runner.data.tables import flatten
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.training.failures import MORE_MEMORY, is_out_of_memory

# Optimizers that change the weights within the backward pass: it can't be tried without a step.
STEPPING = ("lomo", "layerwise")


class LongestBatch(TrainerCallback):
    """Trains on the longest rows before the first step, without a step, and leaves no trace of it.

    Weights, gradients, random numbers, the order of the data and what is logged are as before. The memory that the
    optimizer will take with its first step is held meanwhile, and what its step takes for a moment is asked for.
    Every process of a launch does the same.
    """

    def __init__(self, trainer: Any, splits: dict[str, PreparedSplit], sources: Sequence[str]) -> None:
        self.trainer, self.splits, self.sources = trainer, splits, sources

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tries the longest training batch, and the longest evaluation batch where there will be evaluations."""
        if any(word in args.optim for word in STEPPING):
            return
        trainer, began = self.trainer, time.monotonic()
        train, tokens = find_longest(self.splits["train"], args.per_device_train_batch_size)
        with _undone(trainer):
            with self._named("train", train, tokens), _held(trainer):
                inputs = self._collate(trainer.train_dataset, train)
                trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # as in the loop
                type(trainer).training_step(
                    trainer, trainer.model_wrapped, inputs, trainer._get_num_items_in_batch([inputs], args.device)
                )
            if "eval" in self.splits and args.eval_strategy != "no":
                evaluation, length = find_longest(self.splits["eval"], args.per_device_eval_batch_size)
                with self._named("eval", evaluation, length):
                    inputs = self._collate(trainer.eval_dataset, evaluation)
                    trainer.model_wrapped.eval()
                    trainer.prediction_step(trainer.model_wrapped, inputs, prediction_loss_only=True)
        if args.process_index == 0:
            rows = len(train)
            told = f"{rows} row{'s' * (rows > 1)} of up to {tokens:,} tokens, tried in {time.monotonic() - began:.1f} s"
            print(f"  {'longest':<11}{told}", flush=True)

    def _collate(self, dataset: Any, places: np.ndarray) -> Any:
        """The batch of some rows, as the trainer's data loader would give it."""
        trainer = self.trainer
        rows = trainer._remove_unused_columns(dataset.select(places))
        return trainer._prepare_inputs(trainer.data_collator(list(rows)))

    @contextlib.contextmanager
    def _named(self, split: str, places: np.ndarray, tokens: int) -> Iterator[None]:
        """Says which rows are too long, where memory ends."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rows, name = len(places), name_row(self.splits[split], int(places[0]), self.sources)
            message = f"the longest {split} batch, {rows} row{'s' * (rows > 1)} of up to {tokens:,} tokens ({name}),"
            raise user_error("out-of-memory", f"{message} does not fit: {first_line(error)}", MORE_MEMORY) from error


def find_longest(prepared: PreparedSplit, number: int) -> tuple[np.ndarray, int]:
    """Places of the longest rows of a split, the longest first, and its tokens; of a pair, of the longer sequence."""
    table = prepared.dataset.data.table
    values, ends = flatten(table, "seq_lengths" if "seq_lengths" in table.column_names else "document_lengths")
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    lengths = total[ends[1:]] - total[ends[:-1]]
    places = np.argsort(-lengths, kind="stable")[:number]
    return places, int(lengths[places[0]])


def name_row(prepared: PreparedSplit, place: int, sources: Sequence[str]) -> str:
    """Where a row of a split comes from, for a message."""
    documents = prepared.dataset.with_format(None)[place]["documents"]
    source, row = prepared.order[documents[0]]
    more = f" and {len(documents) - 1:,} packed with it" if len(documents) > 1 else ""
    return f"{Path(sources[source]).name} row {row + 1:,}{more}"


@contextlib.contextmanager
def _undone(trainer: Any) -> Iterator[None]:
    """Puts back what a forward and a backward pass change."""
    model, state = trainer.model_wrapped, trainer.accelerator.gradient_state
    metrics, tokens = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    training, synced = model.training, state.sync_gradients
    buffers = {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}
    numbers, arrays = random.getstate(), np.random.get_state()
    device = trainer.args.device
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        state._set_sync_gradients(False)  # it would step
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        yield
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        _forget_gradients(model)
    state._set_sync_gradients(synced)
    model.zero_grad()
    model.train(training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    random.setstate(numbers)
    np.random.set_state(arrays)
    trainer._metrics, trainer._total_train_tokens = metrics, tokens


def _forget_gradients(engine: Any) -> None:
    """Takes away what DeepSpeed 0.19 keeps of gradients until a step that does not come.

    ZeRO 1 and 2 add up parts of a step beside the parameters; ZeRO 3 begins anew with `zero_grad`.
    """
    optimizer = engine.optimizer
    optimizer.zero_grad()
    optimizer.averaged_gradients = {}
    if engine.zero_optimization_stage() < 3:
        optimizer.all_grad_tensors = {}
        optimizer.micro_step_id = -1


@contextlib.contextmanager
def _held(trainer: Any) -> Iterator[None]:
    """Holds the memory that the optimizer's state will take; DeepSpeed has taken it already."""
    device = trainer.args.device
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED or device.type == "cpu":
        yield
        return
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    size = state_bytes(trainer.args.optim, parameters)
    held = torch.empty(size, dtype=torch.uint8, device=device)
    yield  # until the gradients are there
    if trainer.args.optim == "adamw_torch":  # with all weights at once: the roots of the second moments (torch 2.13)
        torch.empty(size // 2, dtype=torch.uint8, device=device)
    del held


def state_bytes(optimizer: str, parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of a GPU that AdamW's two moments take: each as large as the parameters, or of 8 or 4 bits.

    Where they are paged it is 0; other optimizers count as 0, too: they keep less, or nothing.
    """
    if not optimizer.startswith("adamw") or "paged" in optimizer:
        return 0
    total = 0.0
    for parameter in parameters:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        size = 1.0 if "8bit" in optimizer else 0.5 if "4bit" in optimizer else local.element_size()
        total += 2 * size * local.numel()
    return int(total)
