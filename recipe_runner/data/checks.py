"""Checks that the right tokens are learned: on masks, on the chat template, on what the data itself spells."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from recipe_runner.data.accounting import Accounting, Tally
from recipe_runner.data.job import Replaced
from recipe_runner.data.tables import IGNORED
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import Problem, as_warning
from recipe_runner.recipe.sections import DatasetSection

# What a chat template, which is a program, may raise for a row.
REFUSALS = (
    TemplateError,
    RuntimeError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    MemoryError,
)
SHOWN = 60  # characters of a difference between two texts
LOOKED_AT = 20  # turns of each role that are looked for in the rendered text


def check_ends(sample: pa.ChunkedArray, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Checks on real rows that every supervised span ends with a token that ends a turn or a text.

    A template may leave that token out of the assistant's mask, or spell one that the vocabulary lacks: the loss
    looks healthy, and the model never stops. The sample holds labels of rows that are not yet cut.

    Returns:
        The tokens that end the rows, as they are spelt.

    Raises:
        UserError: A supervised span ends with content.
    """
    stops = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    found: set[str] = set()
    for number, labels in enumerate(sample.to_pylist(), 1):
        last: int | None = None
        ends: list[int] = []
        for token in [*labels, IGNORED]:
            if token != IGNORED and (last is None or str(tokenizer.decode([token])).strip()):
                ends = [*ends, token] if token in stops else []
                last = token  # white space after the end of a turn belongs to the template
            elif token == IGNORED and last is not None:
                if last not in stops:
                    raise _masked_end(number, str(tokenizer.decode([t for t in labels if t != IGNORED])), tokenizer)
                last = None
        found.update(str(text) for text in tokenizer.convert_ids_to_tokens(ends))
    return found


def _masked_end(number: int, learned: str, tokenizer: PreTrainedTokenizerBase) -> UserError:
    spelt = re.search(r"<[^<>\s]{1,40}>\s*$", learned)
    if spelt and (token := spelt[0].strip()) not in tokenizer.get_vocab():
        message = f"the chat template ends a turn with {token}, which is not a token of this model's vocabulary"
        fix = "use a template that is made for this tokenizer, or a model that has the token"
        return user_error("template-token-missing", message, fix, path=("training", "chat_template_path"))
    message = f"the supervised text of row {number} ends with {learned[-30:]!r}, not with an end-of-turn token"
    fix = "the model would not learn to stop: put that token inside {% generation %} in the chat template"
    return user_error("end-of-turn-masked", message, fix, path=("dataset", "train_on"))


def turns_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of a normalised row; none for plain text."""
    parts = (row.get(key, []) for key in ("messages", "prompt", "completion", "chosen"))
    return [turn for part in parts if isinstance(part, list) for turn in part]


def count_special_tokens(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows whose text spells a special token: the model would read it as one (a turn that nobody spoke)."""
    begins, spelt = _special_pattern(tokenizer)
    count = 0
    for row in rows:
        texts = [turn["content"] for turn in turns_of(row) + list(row.get("rejected", []))] or [
            v for v in row.values() if isinstance(v, str)
        ]
        count += any(any(begin in text for begin in begins) and spelt.search(text) is not None for text in texts)
    return count


def find_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that a text spells."""
    return _special_pattern(tokenizer)[1].findall(text)


@lru_cache(maxsize=4)
def _special_pattern(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[str], re.Pattern[str]]:
    """First characters of the special tokens (a quick look), and a pattern of all."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted({token for token in added | set(tokenizer.all_special_tokens) if token.strip()})
    return frozenset(token[0] for token in tokens), re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def count_rendered_roles(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tally: Tally) -> None:
    """Counts rows by role, and looks for the text of some turns of each in what the template makes of them."""
    for row in rows:
        turns = turns_of(row)
        roles = list(dict.fromkeys(turn["role"] for turn in turns))  # in their order: the same every time
        tally.roles.update(roles)
        if any(tally.looked_at[role] < LOOKED_AT for role in roles):
            rendered = _render(turns, tokenizer)
            for turn in turns if rendered is not None else []:
                tally.looked_at[turn["role"]] += 1
                text = turn["content"].strip()
                forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])  # `tojson` is usual
                tally.lost_roles[turn["role"]] += not any(form in (rendered or "") for form in forms)


def compare_templates(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, own: str, tally: Tally) -> None:
    """Counts rows whose text is not what the model's own template makes of them, and keeps the first difference."""
    chats = [turns_of(row) for row in rows]
    for before, after in zip(_render_all(chats, tokenizer, own), _render_all(chats, tokenizer), strict=True):
        if change := find_change(before or "", after or ""):
            tally.changed_texts += 1
            tally.change = tally.change or change


def find_change(own: str, other: str) -> str:
    """Where two renderings of a row differ, for a message; empty where they do not."""
    if own == other:
        return ""
    begin = count_common(own, other)
    end = count_common(own[begin:][::-1], other[begin:][::-1])
    before, after = (repr(shorten_middle(text[begin : len(text) - end])) for text in (own, other))
    return f"{after} instead of {before}"


def count_common(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def shorten_middle(text: str) -> str:
    """A text of at most `SHOWN` characters, its middle left out."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}...{text[-SHOWN // 2 :]}"


def _render(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> str | None:
    """The text that the template makes of turns; None when it refuses them, which `tokens` reports with the row."""
    try:
        return str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False))
    except REFUSALS:
        return None


def _render_all(
    chats: list[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase, template: str | None = None
) -> list[str | None]:
    """`_render` of several conversations at once."""
    try:
        return list(tokenizer.apply_chat_template(chats, chat_template=template, tokenize=False))
    except REFUSALS:
        return [_render(turns, tokenizer, template) for turns in chats]


def find_turn(
    turns: list[dict[str, str]], number: int, input_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Where a turn of a conversation begins, in tokens; None when the template refuses the turns before it alone.

    After as many tokens as the turns before it have alone. A template may render these otherwise when they are alone
    (Qwen3's gives the last answer a `<think>` block): then after the last end of a turn before the turn's own text,
    which begins where another text in its place makes a difference.
    """
    changed = [*turns[:number], turns[number] | {"content": f"#{turns[number]['content']}"}, *turns[number + 1 :]]
    try:
        alone: Any = tokenizer.apply_chat_template(turns[:number], tokenize=True, return_dict=False)
        same = int(common_prefix_length(alone, input_ids))
        if same == len(alone):
            return same
        other: Any = tokenizer.apply_chat_template(changed, tokenize=True, return_dict=False)
    except REFUSALS:
        return None
    text = int(common_prefix_length(other, input_ids))
    ends = [place for place in range(same, text) if input_ids[place] == tokenizer.eos_token_id]
    begin = ends[-1] + 1 if ends else same
    while ends and begin < text and not str(tokenizer.decode(input_ids[begin : begin + 1])).strip():
        begin += 1  # the line break after the end of a turn
    return begin


def find_problems(
    dataset: DatasetSection,
    bos_token: str | None,
    stops: set[str],
    counted: Accounting,
    split: str,
    replaced: Replaced | None = None,
) -> Iterator[Problem]:
    """What a person should know of a prepared split, as errors and warnings at the recipe's keys.

    `stops` are the tokens at which generation stops; `replaced` is the model's own template, where there is another.
    """

    def at(code: str, message: str, suggestion: str, *path: str) -> Problem:
        return Problem(code, message, None, path, suggestion)

    lost = sum(counted.dropped.values())
    if counted.rows_read and lost / counted.rows_read > dataset.max_dropped:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in counted.dropped.items())
        found = f"{lost:,} of {counted.rows_read:,} {split} rows can't be used ({reasons})"
        fix = f"fix the data, or allow it: dataset.max_dropped is {dataset.max_dropped:g}"
        yield at("too-many-dropped", found, fix, "dataset", "max_dropped")
    for role, turns in counted.lost_roles.items():
        if turns and turns == counted.looked_at[role]:
            rows = f"{counted.roles[role]:,} {split} rows"
            found = f"the chat template renders nothing of the role '{role}', which {rows} have"
            if role != "system":
                yield at(
                    "role-not-rendered", found, "use a template that does (training.chat_template_path)", "dataset"
                )
            else:
                problem = at(
                    "system-prompt-lost",
                    found,
                    "put it into the first user turn, or use another template",
                    "dataset",
                    "system",
                )
                yield problem if dataset.system else as_warning(problem)
    if counted.changed_texts and replaced:
        found = (
            f"{replaced.name} stands in for the model's own chat template, to mark the answers, and changes the text of"
        )
        found += f" {counted.changed_texts:,} {split} rows: {counted.change}"
        if replaced.known:
            fix = "the result is saved with it; or set training.chat_template_path"
            yield as_warning(at("template-changes-text", found, fix, "dataset", "train_on"))
        else:
            fix = "set training.chat_template_path to a template with marks, or train_on: completion or all"
            yield at("no-generation-marks", found, fix, "dataset", "train_on")
    if counted.rows_with_special_tokens:
        found = f"{counted.rows_with_special_tokens:,} {split} rows spell special tokens of the tokenizer in their text"
        fix = "the model reads them as the real ones; look at them, and fix or remove the rows"
        yield as_warning(at("special-tokens-in-data", found, fix, "dataset", split))
    if counted.ends and not stops.intersection(counted.ends):
        found = f"turns end with {' '.join(counted.ends)}, but generation stops at {' '.join(sorted(stops))} only"
        fix = f"set training.eos_token: '{counted.ends[0]}', or the trained model will not stop"
        if dataset.train_on:
            yield at("end-of-turn-is-no-end", found, fix, "training", "eos_token")
        else:  # TRL's configurations for preferences have no such key
            yield at("end-of-turn-is-no-end", found, f"train it by stage sft first, and {fix}", "model", "name_or_path")
    if counted.rows_in_train:
        found = f"{counted.rows_in_train:,} of {counted.rows_kept:,} {split} rows are training rows, too"
        fix = "remove them from one of the two: what was trained on can't be held against the model"
        yield as_warning(at("eval-rows-in-train", found, fix, "dataset", split))
    if counted.rows_with_two_bos:
        found = f"{counted.rows_with_two_bos:,} {split} rows begin with two {bos_token} tokens"
        problem = at("doubled-bos", found, "the tokenizer adds one: take it out of the text", "dataset", split)
        yield problem if counted.rows_with_two_bos > counted.rows_kept / 2 else as_warning(problem)
    if counted.rows_truncated > counted.rows_kept / 10:
        found = f"{counted.rows_truncated / counted.rows_kept:.0%} of the {split} rows are cut at max_length"
        fix = "raise training.max_length, or set dataset.on_overlong: they end without an end-of-turn token"
        yield as_warning(at("many-truncated", found, fix, "training", "max_length"))
