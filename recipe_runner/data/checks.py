"""Checks that the right tokens are learned: on masks, on the chat template, on what the data itself spells."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from recipe_runner.data.accounting import Accounting, Tally
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
    first, spelt = _special_pattern(tokenizer)
    count = 0
    for row in rows:
        texts = [turn["content"] for turn in turns_of(row) + list(row.get("rejected", []))] or [
            v for v in row.values() if isinstance(v, str)
        ]
        count += any(first.intersection(text) and spelt.search(text) is not None for text in texts)
    return count


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
                tally.lost_roles[turn["role"]] += turn["content"].strip() not in (rendered or "")


def _render(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text that the template makes of turns; None when it refuses them, which `tokens` reports with the row."""
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except REFUSALS:
        return None


def count_common_tokens(
    turns: list[dict[str, str]], input_ids: list[int], tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """How many tokens of a conversation are those of its first turns; None when the template refuses them alone."""
    try:
        alone: Any = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    except REFUSALS:
        return None
    return int(common_prefix_length(alone, input_ids))


def find_problems(
    dataset: DatasetSection, bos_token: str | None, stops: set[str], counted: Accounting, split: str
) -> Iterator[Problem]:
    """What a person should know of a prepared split, as errors and warnings at the recipe's keys.

    `stops` are the tokens at which generation stops.
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
            found = f"the chat template renders nothing of the role '{role}', which {counted.roles[role]:,} rows have"
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
