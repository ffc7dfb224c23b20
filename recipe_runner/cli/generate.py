"""`recipe-run generate`: talks to a model."""

import sys
from pathlib import Path
from typing import Any

import click

from recipe_runner.cli.options import Number, dtype_option, prepare_process, quantized_option, seed_option


@click.command(name="generate")
@click.argument("result", metavar="RUN|MODEL")
@click.option("--prompt", multiple=True, help="Answer this, and end. Repeatable.")
@click.option("--image", multiple=True, type=click.Path(dir_okay=False, exists=True, path_type=Path), help="Show this.")
@click.option("--file", type=click.Path(dir_okay=False, exists=True, path_type=Path), help="Answer a jsonl file.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="With --file: where answers go.")
@click.option("--compare-base", is_flag=True, help="Show the base's answer, too: the adapter switched off.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="The most tokens of an answer (256).")
@click.option("--do-sample/--no-do-sample", default=None, help="Sample, or take the likeliest token.")
@click.option("--temperature", type=Number(0, 1000), help="Sampling: lower is more certain; 0 does not sample.")
@click.option("--top-p", type=Number(0, 1), help="Sampling: the likeliest tokens of this share.")
@click.option("--top-k", type=click.IntRange(0), help="Sampling: the k likeliest tokens.")
@click.option("--min-p", type=Number(0, 1), help="Sampling: tokens of at least this share of the likeliest.")
@click.option("--repetition-penalty", type=Number(0, 100, min_open=True), help="Above 1: repeat less.")
@click.option("--num-beams", type=click.IntRange(1, 64), help="Beams of a beam search.")
@seed_option
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Prompts at a time.")
@dtype_option
@quantized_option
def command(
    result: str,
    prompt: tuple[str, ...],
    image: tuple[Path, ...],
    file: Path | None,
    output: Path | None,
    compare_base: bool,
    seed: int,
    batch_size: int,
    dtype: str | None,
    quantized: bool,
    **options: Any,
) -> None:
    """Talk to a model: in a terminal, or answer --prompt or --file. The chat template and system prompt of training.

    RUN is a run folder, a folder of run folders, or a recipe that has been run; MODEL a folder or an id on the hub.
    """
    if bool(file) != bool(output):
        raise click.UsageError("--file and --output go together")
    if file and prompt:
        raise click.UsageError("--prompt and --file exclude each other")
    if image and not prompt:
        raise click.UsageError('--image goes with --prompt; the lines of a --file name their own: "images": [FILE]')
    prepare_process()
    from recipe_runner.launch.process import without_collector

    with without_collector():
        from recipe_runner.results import generation
        from recipe_runner.results.target import explaining, find_target

    target = find_target(result)
    if compare_base:
        generation.check_comparable(target)
    for text in prompt:
        if not text.strip():
            raise click.UsageError("the prompt is empty")
    talks = not file and not prompt and sys.stdin.isatty()
    if talks and (options["num_beams"] or 1) > 1:
        raise click.UsageError("a beam search has no words to show as they come: give --prompt or --file")
    memory = "lower --batch-size or --max-new-tokens, or take a smaller --dtype"
    with explaining(memory, "run it again: it goes on", output):
        asker = generation.open_asker(target, dtype, quantized, options, seed)
        if file and output:
            for done, of in generation.answer_file(asker, target, file, output, batch_size, compare_base):
                click.echo(f"\r{done} of {of} answered", nl=False, err=True)
            click.echo(f"\n{output} is written", err=True)
        elif not talks:
            texts = prompt or (sys.stdin.read(),)
            _show(generation.ask(asker, texts, batch_size, compare_base, image), texts)
        else:
            from recipe_runner.results.chat import talk

            talk(asker, compare_base, _read_line, click.echo)


def _show(answers: list[dict[str, str]], texts: tuple[str, ...]) -> None:
    from recipe_runner.problems.words import make_visible
    from recipe_runner.results.chat import side_by_side

    for text, answer in zip(texts, answers, strict=True):
        if len(texts) > 1:
            click.echo(make_visible(f"> {text}"))
        if "base_answer" in answer:
            click.echo(side_by_side(answer["base_answer"], answer["answer"]))
        else:
            click.echo(make_visible(answer["answer"]))


def _read_line(prompt: str) -> str:
    import readline  # noqa: F401 (lets input() edit lines, and remember them)

    return input(prompt)
