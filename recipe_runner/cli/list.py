"""`recipe-run list`: the shipped recipes."""

import json
from typing import Any

import click


@click.command(name="list")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(form: str) -> None:
    """List the shipped recipes."""
    click.echo(list_recipes(form))


def list_recipes(form: str) -> str:
    """The shipped recipes, one a line or as JSON."""
    from recipe_runner.recipe.library import shipped_recipes
    from recipe_runner.recipe.resolve import load_recipe

    rows: list[dict[str, Any]] = []
    for file in shipped_recipes():
        recipe = load_recipe(str(file))
        first = (recipe.stages or (recipe,))[0].values
        row = {key: recipe.values.get(key) for key in ("name", "stage", "description")}
        rows.append(row | {"model": first["model"]["name_or_path"], "file": str(file)})
    if form == "json":
        return json.dumps(rows, indent=2)
    names, stages = (max(len(row[key]) for row in rows) for key in ("name", "stage"))
    return "\n".join(f"{row['name']:<{names}}  {row['stage']:<{stages}}  {row['description']}" for row in rows)
