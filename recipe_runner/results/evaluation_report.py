"""What an evaluation is of, and where its figures and answers go."""

import dataclasses
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from recipe_runner.data.look import look_at
from recipe_runner.files import refuse_existing, write_json, write_text
from recipe_runner.problems.errors import user_error
from recipe_runner.problems.words import make_visible, suggest
from recipe_runner.recipe.document import dump_values
from recipe_runner.recipe.local import BUILDERS, suffix_of
from recipe_runner.recipe.new import find_columns, guess_format, stage_for
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.recipe.schema import formats_of
from recipe_runner.results import evaluation, tasks
from recipe_runner.results.target import Target
from recipe_runner.stages import FORMATS, STAGES

RESULTS, ANSWERS = "results.json", "answers.jsonl"


def choose_recipe(target: Target, data: str | None, form: str | None, columns: Sequence[str]) -> Recipe:
    """The recipe whose evaluation data is taken: the target's, with `--data` in its place; of a model, one made for it.

    Raises:
        UserError: There is no data, or it is not of the layout.
    """
    form = form or None
    given = dict(text.split("=", 1) for text in columns if "=" in text)
    layout = FORMATS.get(target.recipe.dataset.format if target.recipe else form or "")
    known = layout.roles if layout else ()
    for text in columns:
        role, _, name = text.partition("=")
        if not role or not name:
            raise user_error("unknown-column", f"--column {text}: expected ROLE=NAME", "write --column prompt=question")
        if known and role not in known:
            raise user_error("unknown-column", f"--column {text}: no role of this layout", f"roles: {', '.join(known)}")
    if target.recipe is None:
        return _compose(target, data, form, given)
    if form and form != target.recipe.dataset.format:
        message = f"the recipe's format is {target.recipe.dataset.format}, and masks are made for it"
        raise user_error("format-differs", message, "leave out --data-format, or evaluate the result's folder alone")
    values = target.recipe.values
    if target.is_adapter and target.recipe.model.folder and not target.recipe.model.folder.is_dir():
        values = {**values, "model": {**values["model"], "name_or_path": target.base}}  # it has moved, and was named
    if not data:
        return dataclasses.replace(target.recipe, values=values)
    train = values["dataset"]["train"]
    first = train[0] if isinstance(train, list) else train
    kept = {key: first[key] for key in ("columns", "sample_by", "field", "delimiter", "encoding") if key in first}
    source = {**kept, "source": _locate(data), "split": "train"} | ({"columns": given} if given else {})
    dataset = {**values["dataset"], "eval": source}
    return dataclasses.replace(target.recipe, values={**values, "dataset": dataset})


def _locate(data: str) -> str:
    """A file's whole path; an id of the hub as it is.

    Raises:
        UserError: There is no such file.
    """
    if Path(data).is_file():
        return os.path.abspath(data)
    if suffix_of(data) in BUILDERS or data.startswith((".", "/")):
        raise user_error("data-not-found", f"{data}: there is no such file", "check the name")
    return data


def _compose(target: Target, data: str | None, form: str | None, columns: dict[str, str]) -> Recipe:
    """A recipe for a model that has none: only its data counts."""
    if not data:
        raise user_error("no-evaluation-data", f"{target.name} has no recipe that names data", "name it: --data FILE")
    look = look_at([Path(data)]) if Path(data).is_file() else None
    form = form or (guess_format(look.columns) if look else None)
    if form not in FORMATS:
        what = f"unknown format '{form}'" if form else f"the layout of {data} can't be told by its columns"
        fix = suggest(form or "", FORMATS) or f"--data-format {', '.join(FORMATS)}"
        raise user_error("unknown-format", what, fix)
    source: dict[str, Any] = {"source": _locate(data)}
    if found := find_columns(form, look.columns, columns)[0] if look else columns:
        source["columns"] = found
    stage = stage_for(form)
    if target.scores:
        suiting = [name for name, of in STAGES.items() if of.scores and form in formats_of(name)]
        if not suiting:
            message = f"{target.name} is a reward model, which ranks pairs; {data} has {FORMATS[form].about}"
            raise user_error("reward-model", message, "name pairs of a chosen and a rejected answer")
        stage = suiting[0]
    learned = {"instruction": {"train_on": "completion"}, "chat": {"train_on": "completion"}}.get(form, {})
    values = {
        "schema_version": 1,
        "name": "evaluation",
        "stage": stage,
        "model": {"name_or_path": os.path.abspath(target.base) if Path(target.base).exists() else target.base},
        "dataset": {"format": form, "train": source, "eval": source, **learned},
        "training": {"eval_strategy": "epoch"},
    }
    with tempfile.TemporaryDirectory(prefix="recipe-run-") as folder:
        file = Path(folder) / "evaluation.yaml"
        file.write_text(dump_values(values), encoding="utf-8")
        return load_recipe(str(file))


def new_folder(target: Target, output: Path | None) -> Path:
    """The folder that figures and answers go to: in the run's folder, where there is one.

    Raises:
        UserError: It is there, and not empty.
    """
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
    folder = output or (target.run / "evaluations" / now if target.run else Path("evaluations") / now)
    refuse_existing(folder, "choose another --output")
    return folder


def run_evaluation(target: Target, recipe: Recipe, folder: Path, named: str | None, **options: Any) -> dict[str, Any]:
    """Evaluates, and writes `results.json` and `answers.jsonl` into a folder.

    Args:
        target: What is evaluated.
        recipe: Whose evaluation data is taken.
        folder: A new one.
        named: Tasks of lm-eval.
        options: See `evaluation.evaluate`.

    Raises:
        UserError: Data or model is at fault.
    """
    found: dict[str, Any] = {}
    asked = tasks.find_tasks(named) if named else None

    def run_tasks(name: str, opened: Any) -> None:
        if asked:
            found[name] = tasks.run_tasks(opened, asked, options["batch_size"], options["limit"], options["seed"])

    folder.mkdir(parents=True, exist_ok=True)  # now: what can't be written is said before anything is computed
    try:
        result = evaluation.evaluate(target, recipe, then=run_tasks, **options)
    except BaseException:
        folder.rmdir()
        raise
    sources = [source.source for source in recipe.dataset.eval] or [f"{recipe.dataset.fraction} held out"]
    values = {
        "evaluated": target.name,
        "data": sources,
        "few_shot": [{"prompt": shown.content, "answer": shown.wanted} for shown in result.shots],
        "max_new_tokens": options["new_tokens"],
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "peft", "trl", "torch")},
    } | evaluation.summarize(result)
    if found:
        values["tasks"] = found
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in evaluation.list_answers(result))
    write_text(folder / ANSWERS, "".join(lines))
    write_json(folder / RESULTS, _finite(values), shared=True)  # last: a folder with it is whole
    return values


def _finite(value: Any) -> Any:
    """The same values, null for what is no number (JSON has no nan)."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value


def write_values(values: dict[str, Any], form: str) -> str:
    """The figures as text, or as JSON."""
    if form == "json":
        return json.dumps(_finite(values), ensure_ascii=False, indent=2)
    text = [f"{values['rows']:,} rows of {', '.join(Path(name).name for name in values['data'])}; [95 % interval]"]
    text.append(evaluation.write_table(values))
    if values.get("tasks"):
        text.append(tasks.write_tasks(values["tasks"]))
    return make_visible("\n\n".join(text))
