"""Checks of prepared rows: token by token what the recipe's raw rows give, by a few lines that are not the runner's."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from recipe_runner.data.tables import IGNORED
from recipe_runner.files import read_text
from recipe_runner.smoke.checks.done import Done, Found
from recipe_runner.smoke.shrink import SPLITTING

TEMPLATED = 10  # rows of a source that are rendered by two templates
EMPTY_BLOCK = re.compile(r"<think>\s*</think>\s*")
Sequences = tuple[tuple[int, ...], ...]  # of a row: tokens and labels, or a prompt and its answers
COLUMNS = {
    "tokens": ("input_ids", "labels"),
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unpaired": ("prompt_ids", "completion_ids"),
}


def check_prepared(done: Done) -> Found:
    """Each prepared row is one of the data, and each row of the data is prepared; the same tokens, the same labels."""
    section, shape = done.recipe.dataset, done.recipe.stage.shape
    if shape not in COLUMNS:
        return
    tokenizer = done.seen.prepared.tokenizer
    yield from _check_tokenizer(done)
    trainer = done.seen.trainer
    tables = {"train": trainer.train_dataset} | ({"eval": trainer.eval_dataset} if section.has_eval else {})
    wanted: dict[str, list[Sequences]] = {"train": [], "eval": []}
    for of in done.small.wanted:
        wanted[of.split] += [row for raw in of.rows if (row := work_out_sequences(raw, section.train_on, tokenizer))]
    if section.fraction is not None:  # which rows are held out is the seed's business
        held = list(read_sequences(trainer.eval_dataset, shape))
        if _splits(done, "train") and not _splits(done, "eval"):  # what is held out is cut, the rest is split
            limit, waiting = done.recipe.training["max_length"], Counter(held)
            rest = []
            for row in wanted["train"]:
                cut = tuple(part[:limit] for part in row)
                if waiting[cut]:
                    waiting[cut] -= 1
                else:
                    rest.append(row)
            if strange := sum(waiting.values()):
                yield f"{strange} rows that are held out are none of the data's"
            held, wanted["train"] = [], rest
        found = [*read_sequences(trainer.train_dataset, shape), *held]
        yield from _compare(done, found, wanted["train"], "data", _splits(done, "train"))
    else:
        for split, table in tables.items():
            rows = list(read_sequences(table, shape))
            yield from _compare(done, rows, wanted[split], f"{split} data", _splits(done, split))
    for split, table in tables.items():
        packed = "seq_lengths" in table.column_names
        training = done.recipe.training
        asked = (
            training["packing"] if split == "train" or training["eval_packing"] is None else training["eval_packing"]
        )
        if packed and not asked:
            yield f"rows of the {split} data are packed, and the recipe says that they are not"


def _check_tokenizer(done: Done) -> Found:
    """The chat template renders the text of the model's own, or of the recipe's file; the tokenizer ends as it should.

    TRL's training versions of reasoning templates write an empty block of thinking before answers.
    """
    used, own = done.seen.prepared.tokenizer, AutoTokenizer.from_pretrained(done.before or done.small.stand_in.folder)
    training = done.recipe.training
    ends = training["eos_token"] or own.eos_token
    if used.eos_token != ends:
        yield f"the tokenizer ends texts with {used.eos_token}, and not with {ends}"
    if file := training["chat_template_path"]:
        own.chat_template = read_text(Path(file))
    for row in (row for of in done.small.wanted for row in of.rows[:TEMPLATED]):
        turns = row.get("messages") or [*row.get("prompt", ()), *row.get("completion", row.get("chosen", ()))]
        if not own.chat_template or not turns or isinstance(turns[0], str) or "text" in row:
            return
        wanted, found = (
            str(of.apply_chat_template(place_thoughts(turns, of), tools=row.get("tools"), tokenize=False))
            for of in (own, used)
        )
        if EMPTY_BLOCK.sub("", wanted) != EMPTY_BLOCK.sub("", found):
            yield f"the chat template makes {found[:80]!r} of a row, and the model's own {wanted[:80]!r}"
            return


def _splits(done: Done, split: str) -> bool:
    training = done.recipe.training
    packed = training["packing"] if split == "train" or training["eval_packing"] is None else training["eval_packing"]
    return bool(packed) and training["packing_strategy"] in SPLITTING


def _compare(done: Done, found: Sequence[Sequences], wanted: Sequence[Sequences], what: str, splits: bool) -> Found:
    limit = done.recipe.training["max_length"] if done.recipe.stage.shape == "tokens" else None
    chosen = any(source.limit for source in done.recipe.dataset.sources)
    if splits and not chosen:  # parts of documents: all of their tokens, and no other
        parts, whole = Counter(t for row in found for t in row[0]), Counter(t for row in wanted for t in row[0])
        if parts != whole:
            counts = sum(parts.values()), sum(whole.values())
            yield f"{counts[0]:,} tokens of the {what} are prepared, and its rows have {counts[1]:,}"
    if splits:
        return
    drops = limit is not None and done.recipe.dataset.on_overlong == "drop"
    cut = {tuple(part[:limit] for part in row) for row in wanted if not (drops and limit and len(row[0]) > limit)}
    if done.recipe.dataset.thinking == "mask":  # what is learned of a row is less; the tokens are the same
        cut, found = {row[:1] for row in cut}, [row[:1] for row in found]
    if strange := [row for row in set(found) if row not in cut]:
        yield f"{len(strange)} prepared rows of the {what} are none of its rows"
    taught = {row for row in cut if len(row) != 2 or limit is None or any(label != IGNORED for label in row[1])}
    if not chosen and (missing := taught - set(found)):
        yield f"{len(missing)} rows of the {what} are not prepared"


def read_sequences(table: Any, shape: str) -> Iterator[Sequences]:
    """The sequences of each document of prepared rows."""
    names = COLUMNS[shape]
    for row in table:
        begin = 0
        for length in row.get("seq_lengths") or [None]:
            end = None if length is None else begin + length
            yield tuple(tuple(row[name][begin:end]) for name in names)
            begin = end or 0


def work_out_sequences(row: Mapping[str, Any], train_on: str | None, tokenizer: Any) -> Sequences:
    """Tokens and labels of a row in TRL's layout, or its prompt and answers; of a text that says nothing, none.

    Source: `tokenize_fn` of trl/trainer/{sft,dpo,kto}_trainer.py 1.16.0, a row at a time.
    """
    answers = [name for name in ("chosen", "rejected") if name in row] or ["completion"] * ("prompt" in row)
    if answers and not all(row[name] for name in answers):
        return ()
    if not answers:
        return _work_out_whole(row, train_on, tokenizer)
    tools = row.get("tools")
    asked = _encode(tokenizer, row["prompt"], True, tools)
    wholes = [_encode(tokenizer, row["prompt"] + row[name], False, tools) for name in answers]
    begin = min(_count_same(asked, whole) for whole in wholes)
    if answers == ["completion"] and "label" not in row:
        labels = [IGNORED] * begin + wholes[0][begin:] if train_on != "all" else wholes[0]
        return tuple(wholes[0]), tuple(labels)
    return (tuple(wholes[0][:begin]), *(tuple(whole[begin:]) for whole in wholes))


def _work_out_whole(row: Mapping[str, Any], train_on: str | None, tokenizer: Any) -> Sequences:
    if "text" in row:
        ids = _encode(tokenizer, row["text"], False, None) if row["text"].strip() else []
        return (tuple(ids), tuple(ids)) if ids else ()
    if not any(turn["role"] == "assistant" for turn in row["messages"]):
        return ()
    marks = train_on == "assistant"
    made = tokenizer.apply_chat_template(
        place_thoughts(row["messages"], tokenizer),
        tools=row.get("tools"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=marks,
    )
    ids, learned = made["input_ids"], made["assistant_masks"] if marks else [1] * len(made["input_ids"])
    return tuple(ids), tuple(token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True))


def _encode(tokenizer: Any, content: Any, asks: bool, tools: Any) -> list[int]:
    """Turns by the chat template; a text as it is, with its end where it is not a prompt."""
    if isinstance(content, str):
        ends = asks or content.endswith(tokenizer.eos_token)
        return list(tokenizer(content if ends else content + tokenizer.eos_token)["input_ids"])
    options = {"tools": tools, "tokenize": True, "add_generation_prompt": asks, "return_dict": False}
    return list(tokenizer.apply_chat_template(place_thoughts(content, tokenizer), **options))


def place_thoughts(turns: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Turns whose thinking is written into their text, where the chat template does not know the key."""
    thoughts = [turn["reasoning_content"] for turn in turns if turn.get("reasoning_content")]
    if not thoughts or thoughts[-1] in str(tokenizer.apply_chat_template(turns, tokenize=False)):
        return turns
    return [
        {"role": turn["role"], "content": f"<think>\n{turn['reasoning_content']}\n</think>\n\n{turn['content']}"}
        if turn.get("reasoning_content")
        else turn
        for turn in turns
    ]


def _count_same(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
