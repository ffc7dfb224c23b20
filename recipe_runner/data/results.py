"""Results of tools whose text has the tags that a chat template writes around them itself: Hermes', as Qwen writes."""

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from recipe_runner.data.encode import apply_template
from recipe_runner.data.thinking import is_turns
from recipe_runner.data.turns import UNWRAPPED, Turns

TAG = "<tool_response>"
BLOCK = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)
CALL = {"type": "function", "id": "call00001", "function": {"name": "count", "arguments": {}}}
TALK: Turns = [
    {"role": "user", "content": "Count."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "count", "tool_call_id": "call00001", "content": "one"},
]


def unwrap_results(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row whose results stand between tags once: those of its text are left out where the chat template has some."""
    cells = {key: cell for key, cell in row.items() if is_turns(cell) and any(map(_is_wrapped, cell))}
    if not cells or not _writes_tags(tokenizer, str(tokenizer.chat_template)):
        return row
    bare = {key: [part for turn in cell for part in _unwrap(turn)] for key, cell in cells.items()}
    return {**row, **bare, "noted": [*row.get("noted", ()), UNWRAPPED]}


def _is_wrapped(turn: dict[str, Any]) -> bool:
    """Whether a turn is a result, or several, and nothing beside their tags."""
    return turn["role"] == "tool" and TAG in turn["content"] and not BLOCK.sub("", turn["content"]).strip()


def _unwrap(turn: dict[str, Any]) -> Turns:
    return [{**turn, "content": text} for text in BLOCK.findall(turn["content"])] if _is_wrapped(turn) else [turn]


@lru_cache(maxsize=8)
def _writes_tags(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether the chat template writes the tags around a result."""
    try:
        return TAG in str(apply_template(tokenizer, TALK, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return False
