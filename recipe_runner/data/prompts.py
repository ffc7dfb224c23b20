"""Prompts of rows: what a model is asked, and what it should answer."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from recipe_runner.data.encode import apply_template
from recipe_runner.data.formats import normalise_row
from recipe_runner.data.images import Picture
from recipe_runner.data.job import Job, read_rows
from recipe_runner.data.pictures import see
from recipe_runner.data.prepare import read_answers, shape_of
from recipe_runner.data.rendering import shorten_middle
from recipe_runner.data.thinking import without_thought
from recipe_runner.data.turns import MARK, Turns
from recipe_runner.problems.errors import first_line, user_error
from recipe_runner.recipe.sections import DatasetSection

Orders = Mapping[str, np.ndarray]  # of `order.arrange_rows`
COMPARED = 20  # rows whose prompts are compared
LOOKED_AT = 200  # rows from which prompts are chosen
SYSTEM = "You are a helpful assistant."  # where the data has no system prompt of its own
SHOWN = 8  # tokens of an answer that stands where a prompt goes on
WORDS = 12  # of a raw text, which has no prompt of its own


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        content: Turns, or plain text.
        wanted: The answer in the data; empty where there is none.
        kind: Of golden rows: what is tried with it.
        tools: What the model is offered; None where the data declares none.
        images: What its turns show, in the order of their marks.
    """

    content: Turns | str
    wanted: str = ""
    kind: str = "as in the data"
    tools: Any = None
    images: tuple[Picture, ...] = ()


def split_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, columns: Sequence[str] = ()) -> Prompt | None:
    """The prompt of a row as TRL knows it, and the answer to it; None where the row has none (raw text).

    Of a prompt alone, the answer is what the first of the columns has that rewards are given.
    """
    prompt = _split_turns(row, tokenizer, columns)
    if prompt is None or not row.get("images"):
        return prompt
    shown = sum(turn["content"].count(MARK) for turn in _turns(prompt))
    return replace(prompt, images=tuple(row["images"][:shown]))


def _split_turns(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, columns: Sequence[str]) -> Prompt | None:
    tools = row.get("tools")
    if isinstance(row.get("prompt"), str):
        return Prompt(row["prompt"], row["completion"].strip())
    if "segments" in row:
        return _split_segments(row["segments"], tokenizer)
    if "messages" in row:
        turns = row["messages"]
        last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        return Prompt(turns[:last], _say(turns[last], turns[:last], tools, tokenizer), tools=tools) if last else None
    if not row.get("prompt"):
        return None
    if not row.keys() & {"chosen", "completion"}:
        right = row[columns[0]] if columns else None
        return Prompt(row["prompt"], right.strip() if isinstance(right, str) else "", tools=tools)
    answer = row.get("chosen") or (row["completion"] if row.get("label", True) else [])
    wanted = _say(answer[0], row["prompt"], tools, tokenizer) if answer else ""
    return Prompt(row["prompt"], wanted, tools=tools)


def _split_segments(segments: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    """What stands before the last segments that are labelled, and these without their special tokens."""
    runs = [(label, list(run)) for label, run in itertools.groupby(segments, key=lambda segment: segment["label"])]
    texts = ["".join(segment["text"] for segment in run) for _, run in runs]
    last = max((place for place, (label, _) in enumerate(runs) if label), default=0)
    content = "".join(texts[:last])
    begin = str(tokenizer.bos_token or "")
    if begin and list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]:
        content = content.removeprefix(begin)  # the tokenizer adds it, here and on a server
    if not content:
        return None
    ids = tokenizer(texts[last], add_special_tokens=False)["input_ids"]
    return Prompt(content, str(tokenizer.decode(ids, skip_special_tokens=True)).strip())


def _say(answer: dict[str, Any], before: Turns, tools: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a model says that gives an answer: its text, or of calls what the chat template makes of them."""
    if not answer.get("tool_calls"):
        return without_thought(answer["content"]).strip()
    prompt = render_prompt(before, tokenizer, tools)
    whole: Any = apply_template(tokenizer, [*before, answer], tools, tokenize=True, return_dict=False)
    said = whole[common_prefix_length(prompt, whole) :]
    return without_thought(str(tokenizer.decode(said, skip_special_tokens=True))).strip()


def pose(text: str, dataset: DatasetSection) -> Prompt:
    """What a person asks, as the recipe renders it: with its system prompt, or in its plain-text template."""
    if dataset.format in ("text", "segments"):
        return Prompt(text)
    if dataset.template is not None:
        row = {"instruction": text, "output": "."}
        return Prompt(normalise_row(row, replace(dataset, system=None), "the prompt")["prompt"])
    system = [{"role": "system", "content": dataset.system}] if dataset.system else []
    return Prompt([*system, {"role": "user", "content": text}])


def choose_prompts(job: Job, orders: Orders, number: int) -> list[Prompt]:
    """The prompts of the first rows of the evaluation data, or of the training data where there is none.

    Of raw text, the first words are the prompt.
    """
    return list(itertools.islice(_read_prompts(job, orders.get("eval", orders["train"])), number))


def _read_prompts(job: Job, order: np.ndarray) -> Iterator[Prompt]:
    for row in read_rows(job, order[:LOOKED_AT]):
        if row["dropped"]:
            continue
        if prompt := split_row(row, job.tokenizer, job.dataset.reward_columns):
            yield prompt
        elif "text" in row:
            words = row["text"].split(" ")[:WORDS]
            yield Prompt(" ".join(words))


def render_prompt(
    prompt: Turns | str, tokenizer: PreTrainedTokenizerBase, tools: Any = None, asks: bool = True
) -> list[int]:
    """The tokens that a model sees before it answers: turns by the chat template, plain text as it is.

    A reward model asks for no answer: without `asks`, the turns are whole.

    Raises:
        UserError: The chat template refuses the turns, or there is none.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        fix = "give an instruct model, or the adapter of a run, which has the template of its training"
        raise user_error("no-chat-template", "the tokenizer has no chat template", fix)
    try:
        rendered: Any = apply_template(
            tokenizer, prompt, tools, add_generation_prompt=asks, tokenize=True, return_dict=False
        )
    except TemplateSyntaxError as error:
        raise user_error("template-broken", f"the chat template can't be read: line {error.lineno}: {error}") from error
    except Exception as error:  # a template is a program: anything may come
        raise user_error("row-refused", f"the chat template refuses the prompt: {first_line(error)}") from error
    return list(rendered)


def render(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], dict[str, Any] | None]:
    """The tokens of a prompt, and what a vision model is given of one with images (`pictures.see`).

    Raises:
        UserError: The chat template refuses it, or an image can't be used.
    """
    if not prompt.images:
        return render_prompt(prompt.content, tokenizer, prompt.tools), None
    render_prompt(prompt.content, tokenizer, prompt.tools)  # says what is refused
    text = apply_template(tokenizer, prompt.content, prompt.tools, add_generation_prompt=True, tokenize=False)
    seen = see(tokenizer, text, prompt.images)
    return seen["input_ids"][0].tolist(), seen


def find_split_prompts(job: Job, orders: Orders) -> tuple[int, int, str]:
    """Of some rows, how many begin with other tokens than their prompt alone has; how many were looked at; the first.

    What a server asks is the prompt alone. A template whose prompt ends with a space (`Answer: {output}`) lets the
    tokenizer join it to the answer; a chat template may render a last turn in its own way.
    """
    first = orders["train"][:COMPARED]
    rows = [row for row in read_answers(job, first) if not row.pop("dropped")]
    shape = shape_of(job.stage)
    asked = [split_row(row, job.tokenizer, job.dataset.reward_columns) for row in rows]
    if not rows or not all(asked):
        return 0, 0, ""
    found, change = 0, ""
    for prompt, entry in zip(asked, shape.tokenize(job, rows).to_pylist(), strict=True):
        alone = render(prompt, job.tokenizer)[0] if prompt else []
        whole = [token for name in shape.FIRST for token in entry[name]]
        if whole[: len(alone)] != alone:
            found += 1
            same = common_prefix_length(alone, whole)
            texts = (shorten_middle(str(job.tokenizer.decode(of))) for of in (alone[same:], whole[same : same + SHOWN]))
            change = change or "it goes on with {!r}, and the row with {!r}".format(*texts)
    return found, len(rows), change


def choose_golden(job: Job, orders: Orders, number: int) -> list[Prompt]:
    """Prompts by which a served model is compared with the trained one: as in the data, and in forms people ask in.

    Conversations are also asked with a system prompt, without one, and in several turns, made of the data's own rows
    where it has none such.
    """
    found = [_blind(prompt) for prompt in choose_prompts(job, orders, number)]
    if not found or any(isinstance(prompt.content, str) for prompt in found):
        return found
    own = next((turn["content"] for prompt in found for turn in _turns(prompt) if turn["role"] == "system"), SYSTEM)
    pairs = list(zip(found, [*found[1:], found[0]], strict=True))
    kinds = (
        [_with_system(prompt, own) for prompt in found],
        [replace(prompt, content=_talk(prompt), kind="without a system prompt") for prompt in found],
        [_join(first, second) for first, second in pairs],
    )
    made = [prompt for group in zip(*kinds, strict=True) for prompt in group if prompt.content]
    rest = [prompt for prompt in made if prompt.content not in [other.content for other in found[:4]]]
    return [*found[:4], *rest][:number]


def _blind(prompt: Prompt) -> Prompt:
    """A prompt without its images, of which a golden row keeps none."""
    if not prompt.images:
        return prompt
    turns = [turn | {"content": turn["content"].replace(MARK, "").strip()} for turn in _turns(prompt)]
    return replace(prompt, content=turns, images=(), kind="without its images")


def _turns(prompt: Prompt) -> Turns:
    return prompt.content if isinstance(prompt.content, list) else []


def _talk(prompt: Prompt) -> Turns:
    return [turn for turn in _turns(prompt) if turn["role"] != "system"]


def _with_system(prompt: Prompt, text: str) -> Prompt:
    content = [{"role": "system", "content": text}, *_talk(prompt)]
    return replace(prompt, content=content, kind="with a system prompt")


def _join(first: Prompt, second: Prompt) -> Prompt:
    answer = {"role": "assistant", "content": first.wanted or "Yes."}
    return replace(second, content=[*_turns(first), answer, *_talk(second)], kind="several turns")


def few_shot(examples: Sequence[Prompt], prompt: Prompt) -> Turns | str:
    """A prompt with examples before it: as turns after its system prompt, or as plain text, an empty line between."""
    if isinstance(prompt.content, str):
        return "\n\n".join([*(f"{shown.content}{shown.wanted}" for shown in examples), prompt.content])
    begin = [turn for turn in prompt.content[:1] if turn["role"] == "system"]
    shown = [
        turn for example in examples for turn in (*_talk(example), {"role": "assistant", "content": example.wanted})
    ]
    return [*begin, *shown, *prompt.content[len(begin) :]]
