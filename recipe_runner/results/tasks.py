"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), where it is installed: their names are passed through."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.rules.packages import is_installed


def find_tasks(names: str) -> list[Any]:
    """Tasks by their names, or by the paths of their YAML files.

    Raises:
        UserError: lm-eval is not installed, or does not know a task.
    """
    if not is_installed("lm_eval"):
        raise user_error("missing-package", "the package lm_eval is not installed", "pip install lm_eval")
    manager = importlib.import_module("lm_eval.tasks").TaskManager()
    load: Any = importlib.import_module("lm_eval.utils").load_yaml_config
    found: list[Any] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if Path(name).is_file():
            found.append(load(yaml_path=name) if "yaml_path" in load.__code__.co_varnames else load(name))
        elif matched := manager.match_tasks([name]):
            found += matched
        else:
            raise user_error("unknown-task", f"lm-eval has no task '{name}'", "lm_eval ls tasks lists them")
    return found


def run_tasks(opened: Any, names: list[Any], batch_size: int, limit: int | None, seed: int) -> dict[str, Any]:
    """Task -> its measures.

    Raises:
        UserError: lm-eval can't run them.
    """
    lm_eval = importlib.import_module("lm_eval")
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    model = wrapper(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=names, limit=limit, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed
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
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
