"""`recipe-run preview`: what the model will see of the data, and which tokens it learns, before any weights are loaded.

The runner's own functions make the tokens; nothing of them is written again here.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from recipe_runner.files import refuse_existing, write_text
from recipe_runner.preview import page, rows, text
from recipe_runner.problems.errors import user_error
from recipe_runner.problems.problem import sort_problems
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.runs.ledger import find_worst, read_ledger, summarize
from recipe_runner.training.prepare import raise_errors

SHOWN = 20  # numbers of rows that are named


def preview_recipe(
    recipe: Recipe,
    number: int,
    row: int | None = None,
    form: str = "text",
    html: Path | None = None,
    rows_only: bool = False,
    force: bool = False,
    colour: bool = False,
    processes: int = 1,
    worst: int | None = None,
    run: Path | None = None,
) -> Iterator[str]:
    """Shows rows as the model sees them, then what became of all rows.

    Args:
        recipe: A resolved recipe.
        number: How many rows of the training data to show, in the order they have before the trainer shuffles them.
        row: Show this row of the data as it is in its files instead, counted from 1 through all sources.
        form: `text`, or `json`: a list of rows.
        html: Write a page with everything to this file.
        rows_only: Leave the accounting out, which reads all rows.
        force: Overwrite the page.
        processes: How many a run would have: for the number of steps.
        worst: Show so many rows of the training data instead that `run` learned the least.
        run: Whose ledger says which they are.
        colour: Mark supervised tokens by colour instead of brackets.

    Yields:
        Text, as soon as it is known: rows come before the accounting.

    Raises:
        UserError: The recipe, the data or the environment is at fault.
    """
    if html and not force:
        refuse_existing(html, "choose another name, or --force")
    opened = rows.open_preview(recipe, processes)
    if worst and run:
        yield from _show_worst(opened, worst, run, form, html, colour)
        return
    shown = rows.take_row(opened, row) if row is not None else rows.take_rows(opened, number)
    if form == "json":
        yield json.dumps([rows.as_json(entry) for entry in shown], ensure_ascii=False, indent=1, default=str)
    elif not html:
        yield from (text.write_row(entry, colour) for entry in shown)
    if html or (form == "text" and not rows_only):
        facts = _account(recipe, opened)
        if form == "text":
            yield text.write_facts(facts)
        if html:
            write_text(html, page.write_page(recipe, facts, shown))
            yield f"{html} is written"
        raise_errors(facts.problems)


def _show_worst(
    opened: rows.Opened, number: int, run: Path, form: str, html: Path | None, colour: bool
) -> Iterator[str]:
    """The rows that a run learned the least, with their losses.

    Raises:
        UserError: The run has no ledger, or its data has changed.
    """
    entries = read_ledger(run)
    if html:
        raise user_error("no-ledger", "the page shows the first rows of the data", "leave out --html, or --worst")
    rows.check_unchanged(opened, run)
    worst = find_worst(entries, number)
    shown = [rows.take_place(opened, entry.source, entry.row, entry.label) for entry in worst]
    if form == "json":
        told = [{**asdict(entry), **rows.as_json(row)} for entry, row in zip(worst, shown, strict=True)]
        yield json.dumps(told, ensure_ascii=False, indent=1, default=str)
        return
    for entry, row in zip(worst, shown, strict=True):
        yield f"{entry.describe()}\n{text.write_row(row, colour)}"
    yield summarize(entries)
    known = [entry for entry in entries if entry.split == "train" and "known before" in entry.flags]
    if known:
        names = ", ".join(f"{entry.row:,}" for entry in known[:SHOWN])
        yield f"known before the first step: {len(known):,} rows, among them {names}"


def prepare_recipe(recipe: Recipe) -> Iterator[str]:
    """Prepares all rows into the store and says what became of them.

    Raises:
        UserError: The recipe, the data or the environment is at fault.
    """
    facts = _account(recipe, rows.open_preview(recipe, 1))
    yield text.write_facts(facts)
    raise_errors(facts.problems)


def _account(recipe: Recipe, opened: rows.Opened) -> rows.Facts:
    """What became of all rows, its problems at their places in the recipe."""
    facts = rows.account(opened)
    return replace(facts, problems=sort_problems([recipe.place(problem) for problem in facts.problems]))
