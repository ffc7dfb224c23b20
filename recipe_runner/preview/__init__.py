"""`recipe-run preview`: what the model will see of the data, and which tokens it learns, before any weights are loaded.

The runner's own functions make the tokens; nothing of them is written again here.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from recipe_runner.files import refuse_existing, write_text
from recipe_runner.preview import page, rows, text
from recipe_runner.problems.problem import sort_problems
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.training.prepare import raise_errors


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
        colour: Mark supervised tokens by colour instead of brackets.

    Yields:
        Text, as soon as it is known: rows come before the accounting.

    Raises:
        UserError: The recipe, the data or the environment is at fault.
    """
    if html and not force:
        refuse_existing(html, "choose another name, or --force")
    opened = rows.open_preview(recipe, processes)
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
