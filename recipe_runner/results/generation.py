"""`recipe-run generate`: answers to one prompt or to a file of prompts, beside those of the base if asked."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from recipe_runner.data.images import WRITTEN, Picture, locate, read_picture
from recipe_runner.data.pictures import processor_of
from recipe_runner.data.prompts import Prompt, pose, render
from recipe_runner.data.rendering import find_special_tokens
from recipe_runner.data.turns import MARK, RowError
from recipe_runner.files import read_text, refuse_existing, write_text
from recipe_runner.model.answers import GREEDY, answer_all, answer_prompts, check_prompt, count_context
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.problems.problem import Mark, Problem, as_warning
from recipe_runner.recipe.sections import DatasetSection
from recipe_runner.results.target import Opened, Target, open_target
from recipe_runner.runs.metrics import append_line

NEW_TOKENS = 256  # where nobody says how many
TOLD = ("answer", "tokens", "ended", "base_answer")  # keys of a line of answers


def choose_options(given: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` from those of the command line; a temperature or the like means sampling, 0 does not.

    What is not given is what the model's own generation_config.json says.
    """
    options = {key: value for key, value in given.items() if value is not None}
    if options.get("temperature") == 0:
        options |= GREEDY
    elif "do_sample" not in options and options.keys() & {"temperature", "top_p", "top_k", "min_p"}:
        options["do_sample"] = True
    elif options.get("do_sample") is False:
        options |= GREEDY | ({"num_beams": options["num_beams"]} if "num_beams" in options else {})
    return {"max_new_tokens": NEW_TOKENS} | options


@dataclass(frozen=True)
class Asker:
    """A model that can be asked.

    Attributes:
        opened: Model and tokenizer.
        dataset: How prompts are rendered: the section of the recipe; None for a model without one.
        options: Of `generate`.
        seed: Of sampling.
        dtype: Of the weights, as the person says.
        quantized: Whether the base is quantized as in training.
    """

    opened: Opened
    dataset: DatasetSection | None
    options: dict[str, Any]
    seed: int
    dtype: str | None = None
    quantized: bool = True

    def pose(self, text: str, images: Sequence[Picture] = ()) -> Prompt:
        """What a person asks, as in training: with its system prompt, or in its plain-text template.

        Images stand at the marks in the text, or before it where it has none.
        """
        if images:
            text = text.replace(WRITTEN, MARK) if WRITTEN in text else MARK * len(images) + text
        if self.dataset:
            return replace(pose(text, self.dataset), images=tuple(images))
        turns = [{"role": "user", "content": text}]
        return Prompt(turns if self.opened.tokenizer.chat_template else text, images=tuple(images))

    def render(self, prompt: Prompt, what: str) -> list[int]:
        """The tokens of a prompt. See `look`."""
        return self.look(prompt, what)[0]

    def look(self, prompt: Prompt, what: str) -> tuple[list[int], dict[str, Any] | None]:
        """The tokens of a prompt, checked against the model's context, and what a vision model is given of its images.

        Raises:
            UserError: It is empty, too long, or refused by the chat template; or its images can't be seen.
        """
        content = prompt.content
        told = content if isinstance(content, str) else content[-1]["content"] if content else ""
        if not str(told).strip():
            raise user_error("empty-prompt", f"{what} is empty", "write a prompt")
        try:
            json.dumps(content, ensure_ascii=False).encode()
            check_images(prompt, self.opened.tokenizer, what)
            tokens, seen = render(prompt, self.opened.tokenizer)
        except UnicodeEncodeError as error:
            raise user_error("prompts-unreadable", f"{what} is not valid Unicode", "correct it") from error
        except UserError as error:
            problem = error.problems[0]
            raise user_error(problem.code, f"{what}: {problem.message}", problem.suggestion) from error
        check_prompt(tokens, count_context(self.opened.model), self.options["max_new_tokens"], what)
        return tokens, seen


def check_images(prompt: Prompt, tokenizer: Any, what: str) -> None:
    """Checks that a prompt has an image for each mark, and that the model can see them.

    Raises:
        UserError: It has not, or it can't.
    """
    content = prompt.content
    text = content if isinstance(content, str) else "".join(str(turn["content"]) for turn in content)
    if prompt.images and not processor_of(tokenizer):
        raise user_error("no-processor", f"{what} shows an image, and the model sees none", "take a vision model")
    if (marks := text.count(MARK)) != len(prompt.images):
        message = f"{what} shows {len(prompt.images)} image(s), and has {marks} mark(s) {WRITTEN}"
        raise user_error("prompts-unreadable", message, "write a mark for each, or none: they then stand first")


def warn_of_special(texts: Sequence[str], tokenizer: Any) -> None:
    """Says so where a prompt spells a special token: the model reads it as one."""
    if found := next((token for text in texts for token in find_special_tokens(text, tokenizer)), ""):
        told = f"a prompt spells {found}, which the model reads as that token"
        print(as_warning(Problem("special-tokens-in-prompt", told)), file=sys.stderr)


def ask(
    asker: Asker, texts: Sequence[str], batch_size: int, compare: bool, images: Sequence[Path] = ()
) -> list[dict[str, str]]:
    """Answers texts, each with the same images; with `compare` also by the base.

    Raises:
        UserError: A prompt can't be asked.
    """
    pictures = [{"path": str(image), "bytes": None} for image in images]
    looked = [asker.look(asker.pose(text, pictures), "the prompt") for text in texts]
    prompts, seen = [tokens for tokens, _ in looked], [shown for _, shown in looked]
    warn_of_special([text.replace(WRITTEN, "") if images else text for text in texts], asker.opened.tokenizer)
    set_seed(asker.seed)
    tuned = answer_all(asker.opened.model, asker.opened.tokenizer, prompts, batch_size, seen=seen, **asker.options)
    found = [{"answer": answer.text} for answer in tuned]
    if compare:
        with asker.opened.model.disable_adapter():
            set_seed(asker.seed)
            base = answer_all(
                asker.opened.model, asker.opened.tokenizer, prompts, batch_size, seen=seen, **asker.options
            )
        found = [row | {"base_answer": answer.text} for row, answer in zip(found, base, strict=True)]
    return found


def check_comparable(target: Target) -> None:
    """Checks that the base is in the result: an adapter can be switched off, a trained model can't.

    Raises:
        UserError: It is not.
    """
    if not target.holds_base:
        message = f"{target.name} is no adapter that can be switched off: its base would be a second model in memory"
        raise user_error(
            "no-adapter", message, "leave out --compare-base; `recipe-run evaluate` compares with the base"
        )


@dataclass(frozen=True)
class Line:
    """A line of a file of prompts."""

    number: int
    prompt: Prompt
    row: dict[str, Any]


def read_prompts(file: Path, asker: Asker) -> list[Line]:
    """The prompts in a jsonl file: `{"prompt": text}`, or `{"messages": [turns]}` that end with the person's turn.

    Raises:
        UserError: A line is none of both.
    """
    found = []
    try:
        lines = read_text(file).split("\n")
    except (OSError, ValueError) as error:
        raise user_error("prompts-unreadable", f"{file} can't be read: {first_line(error)}") from error
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise user_error(
                "prompts-unreadable", f"no JSON: {first_line(error)}", mark=Mark(str(file), number, 1)
            ) from error
        prompt = _read_prompt(row, asker, Mark(str(file), number, 1), file.parent)
        if taken := [key for key in TOLD if key in row]:
            fix = "rename it: the model's answer would take its place"
            raise user_error("prompts-unreadable", f"a line has '{taken[0]}' already", fix, Mark(str(file), number, 1))
        found.append(Line(number, prompt, row))
    if not found:
        raise user_error("prompts-unreadable", f"{file} holds no prompt", 'write lines of {"prompt": "..."}')
    return found


def _read_images(row: Any, place: Mark, folder: Path) -> list[Picture]:
    """The images of a line, by `images` or `image`: paths that begin beside the file."""
    said = (row.get("images") or row.get("image") or []) if isinstance(row, dict) else []
    try:
        pictures = [read_picture(value, "a line") for value in (said if isinstance(said, list) else [said])]
    except RowError as error:
        raise user_error("prompts-unreadable", str(error), mark=place) from error
    return locate(pictures, "", str(folder))


def _read_prompt(row: Any, asker: Asker, place: Mark, folder: Path) -> Prompt:
    images = _read_images(row, place, folder)
    fix = 'write {"prompt": "..."}, or {"messages": [{"role": "user", "content": "..."}]}'
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return asker.pose(row["prompt"], images)
    turns = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise user_error("prompts-unreadable", "neither a prompt nor messages", fix, place)
    if not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) and turn.get("role") for turn in turns):
        raise user_error("prompts-unreadable", "a turn is no {role, content}", fix, place)
    if turns[-1]["role"] == "assistant":
        raise user_error("prompts-unreadable", "the last turn is an answer already", "end with the user's", place)
    system = asker.dataset.system if asker.dataset and turns[0]["role"] != "system" else None
    if images:
        turns = [turn | {"content": turn["content"].replace(WRITTEN, MARK)} for turn in turns]
    return Prompt([*([{"role": "system", "content": system}] if system else []), *turns], images=tuple(images))


def answer_file(
    asker: Asker, target: Target, file: Path, output: Path, batch_size: int, compare: bool
) -> Iterator[tuple[int, int]]:
    """Answers a file of prompts into a file of answers, which gets its name when it is whole.

    What an interrupted call had answered is kept beside it, and not asked again.

    Yields:
        How many are answered, of how many.

    Raises:
        UserError: The output is there, a prompt can't be asked, or what was begun was begun with other settings.
    """
    refuse_existing(output, "choose another name")
    lines = read_prompts(file, asker)
    looked = [asker.look(line.prompt, f"{file}: the prompt of line {line.number}") for line in lines]
    rendered, seen = [tokens for tokens, _ in looked], [shown for _, shown in looked]
    texts = [json.dumps(line.row, ensure_ascii=False) for line in lines]
    texts = [text.replace(WRITTEN, "") if line.prompt.images else text for text, line in zip(texts, lines, strict=True)]
    warn_of_special(texts, asker.opened.tokenizer)
    settings = {"result": target.result, "options": asker.options, "seed": asker.seed, "compare_base": compare}
    settings |= {"dtype": asker.dtype, "quantized": asker.quantized}
    partial = output.with_name(f"{output.name}.partial")
    done = _read_partial(partial, settings, rendered)
    if not partial.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        append_line(partial, settings)
    left = [place for place in range(len(lines)) if place not in done]
    yield len(done), len(lines)
    set_seed(asker.seed)
    model, tokenizer = asker.opened.model, asker.opened.tokenizer
    asked, shown = [rendered[place] for place in left], [seen[place] for place in left]
    for answers in answer_prompts(model, tokenizer, asked, batch_size, seen=shown, **asker.options):
        base = {}
        if compare:
            with model.disable_adapter():
                prompts, pictures = [asked[place] for place in answers], [shown[place] for place in answers]
                made = answer_all(model, tokenizer, prompts, batch_size, seen=pictures, **asker.options)
                base = dict(zip(answers, made, strict=True))
        for place, answer in answers.items():
            told = {"answer": answer.text, "tokens": len(answer.tokens), "ended": answer.ended}
            told |= {"base_answer": base[place].text} if compare else {}
            done[left[place]] = told
            append_line(partial, {"place": left[place], "prompt_ids": rendered[left[place]], "answer": told})
        yield len(done), len(lines)
    rows = [line.row | done[place] for place, line in enumerate(lines)]
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    partial.unlink()


def _read_partial(partial: Path, settings: dict[str, Any], rendered: list[list[int]]) -> dict[int, dict[str, Any]]:
    """Place of a prompt -> its answer, of those that an interrupted call answered.

    Raises:
        UserError: That call had other prompts or settings.
    """
    if not partial.exists():
        return {}
    begun, *entries = [_parse(line) for line in partial.read_text(encoding="utf-8").split("\n")] or [None]
    fix = "remove that file, or choose another --output"
    if begun != json.loads(json.dumps(settings)):
        raise user_error("other-settings", f"{partial} was begun with other settings", fix)
    done = {}
    for entry in filter(None, entries):
        place = entry.get("place")
        if not isinstance(place, int) or place >= len(rendered) or entry.get("prompt_ids") != rendered[place]:
            raise user_error("other-settings", f"{partial} was begun with other prompts", fix)
        done[place] = dict(entry["answer"])
    return done


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None  # half a line: the call was killed while it wrote


def open_asker(target: Target, dtype: str | None, quantized: bool, given: dict[str, Any], seed: int) -> Asker:
    """Loads a target, ready to be asked.

    Raises:
        UserError: It can't be loaded.
    """
    dataset = target.recipe.dataset if target.recipe else None
    return Asker(open_target(target, dtype, quantized), dataset, choose_options(given), seed, dtype, quantized)
