"""`recipe-run check-server`: compares a running server with a run."""

import os

import click

from recipe_runner.cli.options import Number, prepare_process


@click.command(name="check-server")
@click.argument("url")
@click.option("--run", "name", required=True, metavar="RUN", help="The run whose result is served.")
@click.option("--model", help="The model's name there, where the server has several.")
@click.option(
    "--api-key-env",
    metavar="VARIABLE",
    default="OPENAI_API_KEY",
    show_default=True,
    help="Environment variable that holds the server's key.",
)
@click.option("--timeout", type=Number(0, min_open=True), default=120, show_default=True, help="Of an answer.")
def command(url: str, name: str, model: str | None, api_key_env: str, timeout: float) -> None:
    """Compare a server with the golden rows of a run: prompt tokens, stop behaviour, greedy text.

    URL is that of any server with OpenAI's interface: vLLM, llama-server, transformers serve, Ollama.
    """
    prepare_process(on_cpu=True)
    from recipe_runner.model.load import find_result, read_tokenizer
    from recipe_runner.problems.errors import UserError, user_error
    from recipe_runner.problems.words import make_visible
    from recipe_runner.results import serving
    from recipe_runner.runs.find import find_run, recipe_of
    from recipe_runner.runs.golden import read_golden

    run = find_run(name)
    rows = read_golden(run)
    if not rows:
        raise user_error("no-golden-rows", f"{run} has no golden.jsonl", "train again: each run writes it")
    tokenizer = read_tokenizer(find_result(run))
    server = serving.connect(url, model, os.environ.get(api_key_env, ""), timeout)
    replies = []
    click.echo(serving.HEAD)
    for number, row in enumerate(rows, 1):
        replies.append(serving.ask_row(server, row))
        click.echo(make_visible(serving.describe_row(number, row, replies[-1])))
    for line in (*serving.describe_limits(replies), *serving.find_hints(rows, replies)):
        click.echo(line)
    if problems := serving.find_causes(rows, replies, tokenizer, recipe_of(run)):
        raise UserError(problems)
    prompts = f"makes the prompts of {run}" if serving.can_tell(replies) else "answers"
    click.echo(f"{server.model} at {server.url} {prompts}, and ends its answers where training did")
