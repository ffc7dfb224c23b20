"""The answers that a model is trained on, with what judged them: kept, line by line, in `completions.jsonl`."""

from pathlib import Path
from typing import Any

from recipe_runner.runs.metrics import COMPLETIONS, append_line
from recipe_runner.training.rewards import text_of


def keep_completions(trainer: Any, folder: Path) -> None:
    """Has every answer written down, of all processes, when it has been judged.

    TRL 1.16 gathers them for its own log (GRPOTrainer._logs), which prints a table, and keeps the last batch only.
    """
    score = trainer._generate_and_score_completions

    def kept(inputs: Any) -> Any:
        made = score(inputs)
        if trainer.is_world_process_zero():
            training = trainer.model.training
            step = trainer.state.global_step + training
            for entry in _last_answers(trainer, len(inputs) * trainer.args.world_size):
                append_line(folder / COMPLETIONS, {"step": step, "split": "train" if training else "eval", **entry})
        return made

    trainer._generate_and_score_completions = kept


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
