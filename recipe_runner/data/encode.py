"""Rows in tokens, a batch at a time, as TRL's trainers make them of one row at a time after loading the weights.

Source: `tokenize_fn` and `build_labels` in trl/trainer/{sft,dpo,kto}_trainer.py 1.16.0. `test_equal_to_trl.py` holds
what is made here against TRL's own, for every chat template that TRL has.
"""

import json
from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from recipe_runner.data.images import as_parts
from recipe_runner.data.pictures import processor_of
from recipe_runner.data.tables import IGNORED, NUMBERS
from recipe_runner.data.turns import Turns

Ids = list[list[int]]
ONLY_IDS = {"return_attention_mask": False, "return_token_type_ids": False}


def apply_template(tokenizer: PreTrainedTokenizerBase, chats: Any, tools: Any = None, **options: Any) -> Any:
    """`apply_chat_template` of a conversation, or of several that declare the same tools.

    DeepSeek-V3's template takes the arguments of a call as a text only, all others of TRL's as an object: TRL 1.16's
    `supports_tool_calling` falls back in the same way (transformers#45419). A vision model's takes contents in parts.
    """
    if processor_of(tokenizer):
        several = bool(chats) and isinstance(chats[0], list)
        chats = [as_parts(turns) for turns in chats] if several else as_parts(chats)
    tools = tools or None  # Llama 3.1's template renders its words about tools for an empty list, too
    try:
        return tokenizer.apply_chat_template(chats, tools=tools, **options)
    except TypeError:
        several = bool(chats) and isinstance(chats[0], list)
        spelt = [_spell_arguments(turns) for turns in (chats if several else [chats])]
        if spelt == (chats if several else [chats]):
            raise
        return tokenizer.apply_chat_template(spelt if several else spelt[0], tools=tools, **options)


def _spell_arguments(turns: Turns) -> Turns:
    def spell(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        {**turn, "tool_calls": [spell(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn
        for turn in turns
    ]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    contents: Sequence[Any],
    tools: Sequence[Any] = (),
    *,
    asks: bool = False,
    marks: bool = False,
) -> tuple[Ids, Ids | None]:
    """Conversations, or plain texts, in tokens.

    Args:
        tokenizer: With the chat template.
        contents: Lists of turns, or texts.
        tools: Of each conversation, the tools that it declares; empty where none declares any.
        asks: Whether the conversations end where an answer begins.
        marks: Whether to tell which tokens are the assistant's, by the template's marks.

    Returns:
        The tokens of each; and of each token 1 or 0, if marks were asked for.

    Raises:
        RuntimeError: The template marks nothing of a conversation.
    """
    if isinstance(contents[0], str):
        texts: Any = tokenizer(list(contents), **ONLY_IDS)
        return texts["input_ids"], None
    ids: Ids = []
    masks: Ids = []
    options = {"return_dict": True, "add_generation_prompt": asks, "return_assistant_tokens_mask": marks}
    for offered, group in groupby(range(len(contents)), key=lambda place: tools[place] if tools else None):
        chats = [contents[place] for place in group]
        batch = apply_template(tokenizer, chats, offered, tokenize=True, tokenizer_kwargs=ONLY_IDS, **options)
        ids += batch["input_ids"]
        masks += batch["assistant_masks"] if marks else []
    if any(1 not in mask for mask in masks):
        raise RuntimeError("the chat template marks no token of it as the assistant's ({% generation %})")
    return ids, masks if marks else None


def encode_segments(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]) -> tuple[Ids, Ids]:
    """Rows of segments in tokens, each segment by itself and without tokens that the tokenizer would add.

    So no token is of two segments, and what is in the row is what is written there. TRL has no such layout; axolotl has
    (`input_output`), and does the same: RawInputOutputStrategy in axolotl/prompt_strategies/input_output.py.

    Returns:
        The tokens of each row; and of each token 1 or 0, whether its segment is labelled.
    """
    segments = [segment for row in rows for segment in row["segments"]]
    pieces = iter(
        tokenizer([segment["text"] for segment in segments], add_special_tokens=False, **ONLY_IDS)["input_ids"]
    )
    ids: Ids = []
    masks: Ids = []
    for row in rows:
        parts = [(next(pieces), int(segment["label"])) for segment in row["segments"]]
        ids.append([token for part, _ in parts for token in part])
        masks.append([label for part, label in parts for _ in part])
    return ids, masks


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], answers: tuple[str, ...]
) -> tuple[list[int], dict[str, Ids]]:
    """Rows of a prompt and one or several answers in tokens.

    Returns:
        How many tokens of the prompt alone each row begins with, in all its sequences (some templates render a prompt
        otherwise before an answer); and answer -> whole sequences.
    """
    tools = tools_of(rows)
    prompts, _ = encode(tokenizer, [row["prompt"] for row in rows], tools, asks=True)
    wholes = {
        name: encode(tokenizer, [join(row["prompt"], row[name], tokenizer) for row in rows], tools)[0]
        for name in answers
    }
    shared = [
        min(len(prompt) if prompt == whole[: len(prompt)] else common_prefix_length(prompt, whole) for whole in of_row)
        for prompt, *of_row in zip(prompts, *wholes.values(), strict=True)
    ]
    return shared, wholes


def tools_of(rows: Sequence[dict[str, Any]]) -> list[Any]:
    """What each row declares; empty where none declares any."""
    tools = [row.get("tools") for row in rows]
    return tools if any(tools) else []


def join(prompt: Any, answer: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A prompt and its answer: turns, or texts that end with the end-of-sequence token."""
    end = str(tokenizer.eos_token) if isinstance(answer, str) else ""
    return prompt + answer + end if end and not answer.endswith(end) else prompt + answer


def label(ids: Ids, masks: Ids | None = None, *, begins: Sequence[int] | None = None) -> pa.Table:
    """`input_ids`, and as `labels` those of them that are learned.

    Args:
        ids: Tokens of rows.
        masks: Of each token 1 or 0, where only some are learned.
        begins: Where in each row the learned tokens begin, where the first ones are not.
    """
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=ends[-1])
    learned = np.ones(len(flat), dtype=bool)
    if masks is not None:
        learned &= np.fromiter(chain.from_iterable(masks), dtype=bool, count=ends[-1])
    if begins is not None:
        learned &= np.arange(len(flat)) >= np.repeat(ends[:-1] + np.array(begins), lengths)
    offsets = pa.array(ends.astype(np.int32))
    columns = {"input_ids": flat, "labels": np.where(learned, flat, np.int32(IGNORED))}
    return pa.table({name: pa.ListArray.from_arrays(offsets, values) for name, values in columns.items()})


def split(shared: Sequence[int], wholes: dict[str, Ids]) -> pa.Table:
    """`prompt_ids`, and the tokens of each answer as `<answer>_ids`."""
    first = next(iter(wholes.values()))
    columns = {"prompt_ids": [whole[:length] for whole, length in zip(first, shared, strict=True)]}
    for name, ids in wholes.items():
        columns[f"{name}_ids"] = [whole[length:] for whole, length in zip(ids, shared, strict=True)]
    return pa.table({name: pa.array(ids, NUMBERS) for name, ids in columns.items()})
