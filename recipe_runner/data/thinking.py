"""Thinking before an answer: where a chat template takes it, what is left out of the loss, and what it loses.

Thinking is written in the text of an answer, between `<think>` and `</think>`, or in a key of its own
(`reasoning_content`); templates render one of the two, both, or neither.
"""

import re
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from recipe_runner.data.encode import apply_template
from recipe_runner.data.turns import Turns

# How templates mark thinking, as TRL 1.16 stores them: Qwen, DeepSeek, GLM, LFM, Nemotron; Magistral; gpt-oss; Gemma 4.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|channel>thought", "<channel|>"),
)
BLOCK = re.compile("|".join(rf"{re.escape(begin)}.*?{re.escape(end)}\s*" for begin, end in MARKS), re.DOTALL)
# An empty block in what is learned; its beginning may stand in the prompt.
EMPTY = re.compile(
    "|".join(rf"(?:{re.escape(begin)}|\A)\s*{re.escape(end)}" for begin, end in MARKS if end != "<|end|>")
)
SIGN = re.compile("\ufdd0([0-9]+)\ufdd1")  # characters that no text has
# Why a row is dropped.
TANGLED = "with thinking that is no single block before its answer"
TWICE = "with one thought in a key of the turn, and another in its text"
THOUGHT, ANSWER = "zwei mal drei", "sechs"  # what a template is tried with


def fit_thoughts(row: dict[str, Any], thinking: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row whose thinking stands where the chat template renders it, or, with `drop`, without.

    A row is dropped, with the reason, where thinking can't be told from the answer, or where there is nothing else.
    """
    answers = [turn for cell in row.values() if is_turns(cell) for turn in cell if turn["role"] == "assistant"]
    if not any("reasoning_content" in turn or "think>" in turn["content"] for turn in answers):
        return row
    reason = next(filter(None, (_find_fault(turn, thinking) for turn in answers)), "")
    if reason or row.get("dropped"):
        return row | {"dropped": row.get("dropped") or reason}
    place = "" if thinking == "drop" else find_place(tokenizer)
    return {
        key: [_fit_turn(turn, thinking, place) for turn in cell] if is_turns(cell) else cell
        for key, cell in row.items()
    }


def is_turns(cell: Any) -> bool:
    """Whether a cell of a row is a list of turns."""
    return isinstance(cell, list) and all(isinstance(turn, dict) and "role" in turn for turn in cell)


def split_thought(text: str) -> tuple[str, str] | None:
    """The thinking before an answer, and the answer; None where it is no single block at the beginning.

    Its first tag may be missing: some templates write it into the prompt.
    """
    head, mark, answer = text.rpartition("</think>")
    thought = head.lstrip().removeprefix("<think>")
    if "think>" in thought or "<think>" in answer:
        return None
    return (thought, answer.lstrip()) if mark else ("", text)


def _find_fault(turn: dict[str, Any], thinking: str) -> str:
    """Why a turn of the assistant's can't be used; empty where it can."""
    found = split_thought(turn["content"])
    if found is None:  # several blocks may be kept as they are; one without an end may not
        whole = turn["content"].count("<think>") <= turn["content"].count("</think>")
        return "" if thinking == "keep" and whole else TANGLED
    thought, answer = (of.strip() for of in found)
    if thought and turn.get("reasoning_content", thought).strip() != thought:
        return TWICE
    return "" if answer or turn.get("tool_calls") else "with an empty answer"


def thought_of(turn: dict[str, Any]) -> str:
    """The thinking of an assistant turn; empty where it has none. Where it is no single block, all of its text."""
    if "reasoning_content" in turn:
        return str(turn["reasoning_content"])
    found = split_thought(turn["content"])
    return found[0] if found else str(turn["content"])


def without_thought(text: str) -> str:
    """The text of an answer without the thinking before it, also where only the end of that is there."""
    head, mark, rest = text.rpartition("</think>")
    return rest.lstrip() if mark else head + rest


def _fit_turn(turn: dict[str, Any], thinking: str, place: str) -> dict[str, Any]:
    found = split_thought(turn["content"]) if turn["role"] == "assistant" else None
    if found is None or not ("reasoning_content" in turn or found[0].strip()):
        return turn
    thought = str(turn.get("reasoning_content", found[0])).strip()
    bare = {key: value for key, value in turn.items() if key != "reasoning_content"} | {"content": found[1]}
    if thinking == "drop":
        return bare
    if place == "key":
        return bare | {"reasoning_content": thought}
    if place == "text" and ("reasoning_content" in turn or not turn["content"].lstrip().startswith("<think>")):
        return bare | {"content": f"<think>\n{thought}\n</think>\n\n{bare['content']}"}
    return turn


def find_place(tokenizer: PreTrainedTokenizerBase) -> str:
    """Where thinking has to stand for the chat template to render it: `key`, `text`, or empty for nowhere."""
    return _find_place(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _find_place(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    question = {"role": "user", "content": "2 * 3?"}
    ways = {
        "key": {"content": ANSWER, "reasoning_content": THOUGHT},
        "text": {"content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"},
    }
    for place, answer in ways.items():
        try:
            turns = [question, {"role": "assistant", **answer}]
            if THOUGHT in str(apply_template(tokenizer, turns, tokenize=False)):
                return place
        except (TemplateError, TypeError, ValueError):
            continue
    return ""


def mask_thoughts(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, tools: Any, input_ids: list[int], labels: np.ndarray, ignored: int
) -> np.ndarray:
    """Labels of a conversation without those of its thinking, and of empty blocks that the template writes.

    Args:
        tokenizer: A fast one, with the chat template.
        turns: All of the conversation.
        tools: What it declares.
        input_ids: Its tokens.
        labels: Array `(tokens,)`.
        ignored: The label of a token that is not learned.

    Raises:
        ValueError: Thinking can't be told from the answer.
    """
    text = str(apply_template(tokenizer, turns, tools, tokenize=False))
    found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if found["input_ids"] != input_ids:
        raise ValueError("its tokens are not those of its text: thinking can't be told from the answer")
    begins, ends = np.array(found["offset_mapping"]).T
    labels = labels.copy()
    for begin, end in _find_blocks(tokenizer, turns, tools, text):
        begin = len(text[:begin].rstrip())  # the line break before the block is no answer either
        # A token that goes on after the block, as " Yes" may, is the answer's.
        labels[(begins >= begin) & (ends <= end)] = ignored
    return labels


def _find_blocks(tokenizer: PreTrainedTokenizerBase, turns: Turns, tools: Any, text: str) -> list[tuple[int, int]]:
    """Where blocks of thinking begin and end in the text of a conversation.

    An answer may repeat its thought, and a question may spell a block. So the conversation is rendered once more, with
    a sign in place of each thought, and with tags that mean nothing in place of those that others spell.

    Raises:
        ValueError: The template makes something else of the signs than of the thoughts.
    """
    thoughts: list[str] = []
    signed = [_sign_thought(turn, thoughts) for turn in turns]
    other = str(apply_template(tokenizer, signed, tools, tokenize=False))
    signs = list(SIGN.finditer(other))
    if _blunt(SIGN.sub(lambda sign: thoughts[int(sign[1])], other)) != _blunt(text):
        raise ValueError("the chat template changes its thinking, which can't be told from the answer")

    def place(at: int) -> int:
        return at + sum(len(thoughts[int(sign[1])]) - len(sign[0]) for sign in signs if sign.end() <= at)

    spans = [match.span() for match in (*BLOCK.finditer(other), *signs)]
    return [(place(begin), place(end)) for begin, end in spans]


def _sign_thought(turn: dict[str, Any], thoughts: list[str]) -> dict[str, Any]:
    """A turn with a sign in place of its thought, which is put to the others."""
    if turn["role"] != "assistant":
        return {key: value if key == "role" else _blunt(value) for key, value in turn.items()}
    signed = {key: _blunt(value) if key == "tool_calls" else value for key, value in turn.items()}
    thought, sign = thought_of(turn).strip(), f"\ufdd0{len(thoughts)}\ufdd1"
    if not thought:
        return signed
    thoughts.append(thought)
    if "reasoning_content" in turn:
        return signed | {"reasoning_content": sign}
    head, mark, answer = turn["content"].rpartition("</think>")
    before = head[: len(head.rstrip()) - len(thought)]
    return signed | {"content": f"{before}{sign}{head[len(before) + len(thought) :]}{mark}{answer}"}


def _blunt(value: Any) -> Any:
    """A value whose texts have tags of thinking that no template knows, as long as they were."""
    if isinstance(value, dict):
        return {key: _blunt(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_blunt(entry) for entry in value]
    return value.replace("think>", "think.") if isinstance(value, str) else value
