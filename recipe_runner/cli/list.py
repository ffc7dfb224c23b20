"""`recipe-run list`: the shipped recipes."""

import json

import click


@click.command(name="list")
@click.argument("words", nargs=-1, metavar="[WORD]...")
@click.option("--model", metavar="TEXT", help="Part of the model's name.")
@click.option("--task", metavar="TEXT", help="What the model learns to do: chat, summarisation, ...")
@click.option("--method", metavar="TEXT", help="full, partial, hybrid, lora, dora, qlora or another method of PEFT.")
@click.option("--stage", metavar="TEXT", help="Training stage.")
@click.option("--max-params", metavar="NUMBER", help="Parameters of the model at most: 3B, 500M.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(
    words: tuple[str, ...],
    model: str | None,
    task: str | None,
    method: str | None,
    stage: str | None,
    max_params: str | None,
    form: str,
) -> None:
    """List the shipped recipes that suit: each WORD must be in one of its words, or nearly."""
    from recipe_runner.problems.errors import user_error
    from recipe_runner.problems.words import align, suggest
    from recipe_runner.recipe.catalogue import choose, read_catalogue, write_count, write_planned
    from recipe_runner.recipe.models import read_count
    from recipe_runner.recipe.schema import load

    try:
        most = read_count(max_params) if max_params is not None else None
    except ValueError as error:
        raise click.UsageError(f"--max-params: {error}") from error
    entries = read_catalogue()
    found = choose(entries, words, most, model=model, task=task, method=method, stage=stage)
    if form == "json":
        click.echo(json.dumps([entry.as_json() for entry in found], indent=2))
        return
    if not found:
        known = {word for entry in entries for word in (*entry.tags, entry.task, entry.method, *entry.name.split("_"))}
        told = [word for word in (*words, *filter(None, (model, task, method, stage))) if word not in known]
        removed = load()["properties"]["stage"]["x-removed-choices"]
        gone = next((f"{word}: {removed[word]}" for word in told if word in removed), None)
        fix = gone or next(filter(None, (suggest(word, known) for word in told)), "`recipe-run list` shows all")
        raise user_error("no-recipes", f"none of {len(entries)} recipes suits", fix)
    rows = [
        [
            entry.name,
            write_count(entry.parameters),
            entry.method,
            write_planned(entry.planned),
            entry.task or entry.stage,
        ]
        for entry in found
    ]
    click.echo("\n".join(align([["name", "model", "method", "planned", "task"], *rows], 80)))
    number = f"{len(found)} recipe{'s' * (len(found) != 1)}"
    click.echo("\nplanned: memory of a device, by `recipe-run plan`, not measured")
    click.echo(f"{number}; recipe-run show NAME prints one, recipe-run copy NAME takes it")
