"""Checks that the right tokens are learned: on masks, on the chat template, on what the data itself spells."""

import json
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from recipe_runner.data.accounting import Tally
from recipe_runner.data.formats import turns_of
from recipe_runner.data.job import Job
from recipe_runner.data.rendering import find_change, render_turns, special_pattern
from recipe_runner.data.tables import IGNORED
from recipe_runner.data.thinking import EMPTY, thought_of, without_thought
from recipe_runner.data.turns import MARK
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.recipe.sections import DatasetSection

CHECKED_ROWS = 100  # of a split, whose masks are checked token by token
LOOKED_AT = 20  # of each part of rows that are looked for in the rendered text
# Parts of rows beside the turns of each role.
CALLS, TOOLS, BESIDE, THINKING = "calls of tools", "declared tools", "text beside a call", "thinking"
EMPTY_THINKING = "empty thinking"
ENDLESS = f"of the first {CHECKED_ROWS} whose learned text has no end"


def check_ends(sample: pa.ChunkedArray, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Checks on real rows that every supervised span ends with a token that ends a turn or a text.

    A template may leave that token out of the assistant's mask, or spell one that the vocabulary lacks: the loss
    looks healthy, and the model never stops. The sample holds labels of rows that are not yet cut.

    Returns:
        The tokens that end the rows, as they are spelt.

    Raises:
        UserError: A supervised span ends with content.
    """
    stops = _ending_tokens(tokenizer)
    found: set[str] = set()
    for number, labels in enumerate(sample.to_pylist(), 1):
        ends = list(_find_ends(labels, tokenizer, stops))
        if not all(ends):
            raise _masked_end(number, str(tokenizer.decode([t for t in labels if t != IGNORED])), tokenizer)
        found.update(str(text) for text in tokenizer.convert_ids_to_tokens(ends[-1] if ends else []))
    return found


def _find_ends(labels: list[int], tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> Iterator[list[int]]:
    """Of each supervised span, the tokens at its end that end a turn or a text; none where it ends with content."""
    last: int | None = None
    ends: list[int] = []
    for token in [*labels, IGNORED]:
        if token != IGNORED and (last is None or str(tokenizer.decode([token])).strip()):
            ends = [*ends, token] if token in stops else []
            last = token  # white space after the end of a turn belongs to the template
        elif token == IGNORED and last is not None:
            yield ends
            last = None


def _ending_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def count_endless(sample: pa.ChunkedArray, names: list[str], tokenizer: PreTrainedTokenizerBase, tally: Tally) -> None:
    """As `check_ends`, of texts as they are written: rows whose last learned text has no end are counted."""
    stops = _ending_tokens(tokenizer)
    for name, labels in zip(names, sample.to_pylist(), strict=False):
        last = [*_find_ends(labels, tokenizer, stops)][-1:]
        tally.ends.update(str(text) for text in tokenizer.convert_ids_to_tokens(last[0] if last else []))
        if last == [[]]:
            tally.noted[ENDLESS] += 1
            tally.firsts.setdefault(ENDLESS, name)


def _masked_end(number: int, learned: str, tokenizer: PreTrainedTokenizerBase) -> UserError:
    spelt = re.search(r"<[^<>\s]{1,40}>\s*$", learned)
    if spelt and (token := spelt[0].strip()) not in tokenizer.get_vocab():
        message = f"the chat template ends a turn with {token}, which is not a token of this model's vocabulary"
        fix = "use a template that is made for this tokenizer, or a model that has the token"
        return user_error("template-token-missing", message, fix, path=("training", "chat_template_path"))
    message = f"the supervised text of row {number} ends with {learned[-30:]!r}, not with an end-of-turn token"
    fix = "the model would not learn to stop: put that token inside {% generation %} in the chat template"
    return user_error("end-of-turn-masked", message, fix, path=("dataset", "train_on"))


def count_special_tokens(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows whose text spells a special token: the model would read it as one (a turn that nobody spoke)."""
    begins, spelt = special_pattern(tokenizer)
    count = 0
    for row in rows:
        texts = [turn["content"] for turn in turns_of(row) + list(row.get("rejected", []))] or [
            v for v in row.values() if isinstance(v, str)
        ]
        count += any(any(begin in text for begin in begins) and spelt.search(text) is not None for text in texts)
    return count


def count_empty_thoughts(
    sample: pa.ChunkedArray, names: list[str], tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> None:
    """Counts rows that learn an empty block of thinking, which a template writes (Qwen 3), of some labels."""
    for name, labels in zip(names, sample.to_pylist(), strict=False):
        runs = (list(run) for learned, run in groupby(labels, key=lambda label: label != IGNORED) if learned)
        if any(EMPTY.search(str(tokenizer.decode(run))) for run in runs):
            tally.empty_thoughts += 1
            tally.firsts.setdefault(EMPTY_THINKING, name)


def count_rendered_parts(rows: list[dict[str, Any]], names: list[str], job: Job, tally: Tally) -> None:
    """Counts rows by what they are made of, and looks for some of each part in what the template makes of them."""
    for row, name in zip(rows, names, strict=True):
        parts = list(_find_parts(row, job.dataset))
        kinds = list(dict.fromkeys(kind for kind, _ in parts))  # in their order: the same every time
        tally.parts.update(kinds)
        if not any(tally.looked_at[kind] < LOOKED_AT for kind in kinds):
            continue
        rendered = render_turns(turns_of(row), job.tokenizer, row.get("tools"))
        for kind, texts in parts if rendered is not None else []:
            tally.looked_at[kind] += 1
            if not all(any(form in str(rendered) for form in _forms(text)) for text in texts):
                tally.lost_parts[kind] += 1
                tally.firsts.setdefault(kind, name)


def _find_parts(row: dict[str, Any], dataset: DatasetSection) -> Iterator[tuple[str, list[str]]]:
    """What a row is made of: the kind of each part, and texts that must be in the rendered row."""
    turns = turns_of(row)
    for tool in row.get("tools", ()):
        yield TOOLS, [tool["function"]["name"]]
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    muted = {answers[place] for place in row.get("muted", ())}
    learned = set(answers) - muted if "messages" in row else set(answers[-1:])
    for number, turn in enumerate(turns):
        calls = turn.get("tool_calls", ())
        if not calls:
            yield turn["role"], [text.strip() for text in without_thought(turn["content"]).split(MARK)]
        elif turn["content"].strip():
            yield BESIDE, [without_thought(turn["content"]).strip()]
        for call in calls:
            arguments = call["function"]["arguments"].values()
            yield CALLS, [call["function"]["name"], *(value for value in arguments if isinstance(value, str))]
        if number in learned and (thought := thought_of(turn).strip()):
            yield THINKING, [thought]


def _forms(text: str) -> tuple[str, ...]:
    """A text as templates write it: as it is, or by `tojson`."""
    return text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]


def compare_templates(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, own: str, tally: Tally) -> None:
    """Counts rows whose text is not what the model's own template makes of them, and keeps the first difference."""
    chats = [(turns_of(row), row.get("tools")) for row in rows]
    for turns, tools in chats:
        before, after = render_turns(turns, tokenizer, tools, own), render_turns(turns, tokenizer, tools)
        if change := find_change(before or "", after or ""):
            tally.changed_texts += 1
            tally.change = tally.change or change
