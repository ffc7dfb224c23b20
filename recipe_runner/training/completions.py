"""Stages in which the model answers itself: prompts in the order of the run; every answer kept, with its rewards."""

from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import RepeatSampler

from recipe_runner.runs.metrics import COMPLETIONS, append_line
from recipe_runner.training.config import steps_per_epoch
from recipe_runner.training.reward_functions import text_of


class _PromptOrder(RepeatSampler):
    """TRL's sampler, which knows in which epoch it is."""

    trainer: Any

    def __iter__(self) -> Iterator[int]:
        args, shuffled = self.trainer.args, self.generator
        epoch = self.trainer.state.global_step // steps_per_epoch(args, self.num_samples, args.world_size)
        shuffled.manual_seed(args.seed)
        for _ in range(epoch):
            torch.randperm(self.num_samples, generator=shuffled)
        yield from super().__iter__()


def keep_prompt_order(trainer: Any) -> None:
    """Has a resumed run take prompts in the order of a run that was not stopped.

    TRL 1.16's RepeatSampler draws each epoch's order from one generator, which begins anew in a resumed run: a later
    epoch would have the order of the first. `test_rl.py` holds that it goes on the same.
    """
    make = trainer._get_train_sampler

    def ordered(*args: Any) -> Any:
        sampler = make(*args)
        sampler.__class__, sampler.trainer = _PromptOrder, trainer
        return sampler

    trainer._get_train_sampler = ordered


def keep_completions(trainer: Any, folder: Path) -> None:
    """Has every answer written down, of all processes, when it has been judged.

    TRL 1.16 gathers them for its own log (GRPOTrainer._logs), which prints a table, and keeps the last batch only.
    """
    score = trainer._generate_and_score_completions
    _keep_whole_batches(trainer)

    def kept(inputs: Any) -> Any:
        made = score(inputs)
        if trainer.is_world_process_zero():
            training = trainer.model.training
            step = trainer.state.global_step + training
            logged = _last_answers(trainer, len(inputs) * trainer.args.world_size)
            for entry in logged or _read_answers(trainer, inputs, made):
                append_line(folder / COMPLETIONS, {"step": step, "split": "train" if training else "eval", **entry})
        return made

    trainer._generate_and_score_completions = kept


def _keep_whole_batches(trainer: Any) -> None:
    """Makes room in TRL's log for a batch of evaluation, which may have more answers than one of training."""
    args, logs = trainer.args, trainer._logs
    most = max(logs["prompt"].maxlen or 0, args.per_device_eval_batch_size * args.world_size)
    for name in logs.keys() & {"prompt", "completion", "advantages"}:
        logs[name] = deque(maxlen=most)
    if "rewards" in logs:
        logs["rewards"] = defaultdict(lambda: deque(maxlen=most))


def _read_answers(trainer: Any, inputs: Any, made: Any) -> list[dict[str, Any]]:
    """The answers of this process: of distillation, TRL 1.16 gathers them only for its table."""
    texts = []
    for ids, real in zip(made["completion_ids"], made["completion_mask"], strict=True):
        texts.append(trainer.processing_class.decode(ids[real.bool()], skip_special_tokens=True))
    return [{"prompt": text_of(row["prompt"]), "completion": text} for row, text in zip(inputs, texts, strict=True)]


def _last_answers(trainer: Any, number: int) -> list[dict[str, Any]]:
    logs = trainer._logs
    prompts, answers = list(logs["prompt"])[-number:], list(logs["completion"])[-number:]
    entries: list[dict[str, Any]] = [
        {"prompt": text_of(prompt), "completion": text_of(answer)}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for name, values in logs.get("rewards", {}).items():
        for entry, value in zip(entries, list(values)[-number:], strict=True):
            entry.setdefault("rewards", {})[name] = None if value != value else round(value, 6)
    for entry, value in zip(entries, list(logs.get("advantages", ()))[-number:], strict=False):
        entry["advantage"] = round(value, 6)
    return entries
