"""What a chat template makes of turns, as text: where two texts differ, what of a row is refused, where turns begin."""

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from recipe_runner.data.encode import apply_template
from recipe_runner.data.formats import turns_of
from recipe_runner.data.turns import Turns
from recipe_runner.problems.errors import first_line

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
# How templates spell special tokens.
SPELT = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|<(?:start_of_turn|end_of_turn|sop|bos|eos|/?s)>|\[g?[A-Z_]{3,}\]")
SHOWN = 60  # characters of a difference between two texts


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


def render_turns(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, tools: Any = None, template: str | None = None, asks: bool = False
) -> str | None:
    """The text that the template makes of turns; None when it refuses them, which `tokens` reports with the row."""
    try:
        options = {"chat_template": template, "add_generation_prompt": asks, "tokenize": False}
        return str(apply_template(tokenizer, turns, tools, **options))
    except REFUSALS:
        return None


def find_refused(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, told: str) -> str:
    """What of a row the chat template refuses with some words: a declared tool, or a turn; empty for neither."""

    def refuses(turns: Turns, tools: Any) -> bool:
        try:
            apply_template(tokenizer, turns, tools, tokenize=False)
        except REFUSALS as error:
            return first_line(error) == told
        return False

    tools, turns = row.get("tools") or [], turns_of(row)
    if tools and not refuses(turns, None):
        names = [(number, tool["function"]["name"]) for number, tool in enumerate(tools, 1) if refuses(turns, [tool])]
        if names:
            return "tool {} ('{}')".format(*names[0])
    conversations = [turns, [*row.get("prompt", ()), *row["rejected"]]] if "rejected" in row else [turns]
    for whole in conversations:
        for number, turn in enumerate(whole, 1):
            if refuses(whole[:number], tools):
                calls = [call["function"]["name"] for call in turn.get("tool_calls", ())]
                said = f"calls of {', '.join(calls)}" if calls else repr(shorten_middle(turn["content"]))
                return f"turn {number} ({turn['role']}, {said})"
    return ""


def find_turn(
    turns: Turns, number: int, input_ids: list[int], tokenizer: PreTrainedTokenizerBase, tools: Any = None
) -> int | None:
    """Where a turn of a conversation begins, in tokens; None when the template refuses the turns before it alone.

    After as many tokens as the turns before it have alone. A template may render these otherwise when they are alone
    (Qwen3's gives the last answer a `<think>` block): then after the last end of a turn before the turn's own text,
    which begins where another text in its place makes a difference.
    """
    changed = [*turns[:number], turns[number] | {"content": f"#{turns[number]['content']}"}, *turns[number + 1 :]]
    try:
        alone: Any = apply_template(tokenizer, turns[:number], tools, tokenize=True, return_dict=False)
        same = int(common_prefix_length(alone, input_ids))
        if same == len(alone):
            return same
        other: Any = apply_template(tokenizer, changed, tools, tokenize=True, return_dict=False)
    except REFUSALS:
        return None
    text = int(common_prefix_length(other, input_ids))
    ends = [place for place in range(same, text) if input_ids[place] == tokenizer.eos_token_id]
    begin = ends[-1] + 1 if ends else same
    while ends and begin < text and not str(tokenizer.decode(input_ids[begin : begin + 1])).strip():
        begin += 1  # the line break after the end of a turn
    return begin


def find_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that a text spells."""
    return special_pattern(tokenizer)[1].findall(text)


@lru_cache(maxsize=4)
def special_pattern(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[str], re.Pattern[str]]:
    """First characters of the special tokens (a quick look), and a pattern of all."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted({token for token in added | set(tokenizer.all_special_tokens) if token.strip()})
    return frozenset(token[0] for token in tokens), re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
