"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), where it is installed: their names are passed through."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_runner.files import read_text
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.problems.words import align
from recipe_runner.recipe.rules.packages import is_installed


@dataclass(frozen=True)
class Tasks:
    """Tasks that lm-eval knows, and its manager of them."""

    names: list[str]
    manager: Any


def find_tasks(names: str) -> Tasks:
    """Tasks by their names, or by the paths of their YAML files; with commas between.

    Raises:
        UserError: lm-eval is not installed, or does not know a task.
    """
    if not is_installed("lm_eval"):
        raise user_error("missing-package", "the package lm_eval is not installed", "pip install lm_eval")
    asked = [part.strip() for part in names.split(",") if part.strip()]
    files = [Path(name) for name in asked if Path(name).is_file()]
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=sorted({str(file.parent.resolve()) for file in files}) or None
    )
    found: list[str] = []
    for name in asked:
        own = re.search(r"^task:\s*(\S+)", read_text(Path(name)), re.MULTILINE) if Path(name) in files else None
        matched = manager.match_tasks([own[1] if own else name])
        if not matched:
            raise user_error("unknown-task", f"lm-eval has no task '{name}'", "lm-eval ls tasks lists them")
        found += matched
    return Tasks(found, manager)


def run_tasks(opened: Any, tasks: Tasks, batch_size: int, limit: int | None, seed: int) -> dict[str, Any]:
    """Task -> its measures.

    Raises:
        UserError: lm-eval can't run them.
    """
    lm_eval = importlib.import_module("lm_eval")
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        model = wrapper(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            model=model, tasks=tasks.names, task_manager=tasks.manager, limit=limit, **seeds
        )
    except Exception as error:  # another program's: data that can't be loaded, a broken task
        raise user_error("tasks-failed", f"lm-eval: {type(error).__name__}: {first_line(error)}") from error
    return {
        task: {key: value for key, value in measures.items() if isinstance(value, int | float)}
        for task, measures in found["results"].items()
    }


def write_tasks(tasks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Tasks as text: a line a measure, a column a model."""
    names = list(tasks)
    rows = [["lm-eval", *names]]
    for task in tasks[names[0]]:
        for measure in tasks[names[0]][task]:
            rows.append(
                [f"{task} {measure}", *(f"{tasks[name][task].get(measure, float('nan')):.4f}" for name in names)]
            )
    return "\n".join(align(rows))
