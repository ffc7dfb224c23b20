"""Checks of prepared rows: token by token what the recipe's raw rows give, by a few lines that are not the runner's."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from trl.chat_template_utils import get_training_chat_template
from trl.data_utils import common_prefix_length

from recipe_runner.data.tables import IGNORED
from recipe_runner.files import read_text
from recipe_runner.smoke.checks.done import Done, Found
from recipe_runner.smoke.shrink import SPLITTING

TEMPLATED = 10  # rows of a source that are rendered by two templates
Sequences = tuple[tuple[int, ...], ...]  # of a row: tokens and labels, or a prompt and its answers
COLUMNS = {
    "tokens": ("input_ids", "labels"),
    "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unpaired": ("prompt_ids", "completion_ids", "label"),
    "scored_pairs": ("chosen_ids", "rejected_ids"),
    "rows": ("prompt_ids",),
}


def check_prepared(done: Done) -> Found:
    """Each prepared row is one of the data, and each row of the data is prepared; the same tokens, the same labels."""
    section, shape, trainer = done.recipe.dataset, done.recipe.stage.shape, done.seen.trainer
    if section.images:  # what TRL's collator makes of them, `check_mask` looks at
        return
    yield from _check_template(done)
    tables = {"train": trainer.train_dataset} | ({"eval": trainer.eval_dataset} if section.has_eval else {})
    for split, table in tables.items():
        packed, wrapped = "seq_lengths" in table.column_names, done.recipe.training["packing_strategy"] == "wrapped"
        if packed != _packs(done, split) and not wrapped:  # what is wrapped is one document
            yield f"rows of the {split} data are {'' if packed else 'not '}packed, and the recipe says otherwise"
        yield from _check_filled(done, split, table)
    yield from (problem.message for problem in done.seen.prepared.warnings if problem.code == "prompt-differs")
    found = {split: list(read_sequences(table, shape)) for split, table in tables.items()}
    wanted: dict[str, list[Sequences]] = {"train": [], "eval": []}
    for of in done.small.wanted:
        rows = (work_out_sequences(raw, section.train_on, done.seen.prepared.tokenizer, shape) for raw in of.rows)
        wanted[of.split] += [row for row in rows if row]
    if section.fraction is None:
        for split in tables:
            yield from _compare(done, found[split], wanted[split], f"{split} data", _splits(done, split))
    elif _splits(done, "train") and not _splits(done, "eval"):  # what is held out is cut, the rest is split
        strange, rest = _take_out(found["eval"], wanted["train"], done.recipe.training["max_length"])
        if strange:
            yield f"{strange} rows that are held out are none of the data's"
        yield from _compare(done, found["train"], rest, "data", True)
    else:  # which rows are held out is the seed's business
        yield from _compare(done, found["train"] + found["eval"], wanted["train"], "data", _splits(done, "train"))


def _check_template(done: Done) -> Found:
    """The chat template renders what it should, and the tokenizer ends texts with the token that it should.

    That is the text of the model's own template, of TRL's training version of it, or of the recipe's file.
    """
    used, own = done.seen.prepared.tokenizer, AutoTokenizer.from_pretrained(done.before or done.small.stand_in.folder)
    training, replaced = done.recipe.training, done.seen.prepared.replaced
    ends = training["eos_token"] or own.eos_token
    if used.eos_token != ends:
        yield f"the tokenizer ends texts with {used.eos_token}, and not with {ends}"
    if file := training["chat_template_path"]:
        own.chat_template = read_text(Path(file))
    if replaced and replaced.known:  # what it changes, a warning of the run says
        own.chat_template = get_training_chat_template(own)
    for row in (row for of in done.small.wanted for row in of.rows[:TEMPLATED]):
        turns = row.get("messages") or [*row.get("prompt", ()), *row.get("completion", row.get("chosen", ()))]
        if not own.chat_template or not turns or isinstance(turns[0], str) or "text" in row:
            return
        wanted, found = (
            str(of.apply_chat_template(place_thoughts(turns, of), tools=row.get("tools"), tokenize=False))
            for of in (own, used)
        )
        if wanted != found:
            yield f"the chat template makes {found[:80]!r} of a row, and the model's own {wanted[:80]!r}"
            return


def _packs(done: Done, split: str) -> bool:
    """Whether the recipe asks for packed rows. The training rows' answer holds for others where none is said."""
    training = done.recipe.training
    asked = training["packing"] if split == "train" or training["eval_packing"] is None else training["eval_packing"]
    return bool(asked)


def _check_filled(done: Done, split: str, table: Any) -> Found:
    """Packed rows are filled up to `max_length`: no two of them would fit into one (best fit, decreasing)."""
    limit = done.recipe.training["max_length"]
    lengths = sorted(len(row) for row in table["input_ids"]) if "seq_lengths" in table.column_names else []
    if len(lengths) > 1 and sum(lengths[:2]) <= limit:
        two = f"{lengths[0]} and {lengths[1]} tokens"
        yield f"two packed rows of the {split} data have {two}: both would fit into one of {limit}"


def _splits(done: Done, split: str) -> bool:
    return _packs(done, split) and done.recipe.training["packing_strategy"] in SPLITTING


def _take_out(held: Sequence[Sequences], rows: Sequence[Sequences], limit: int) -> tuple[int, list[Sequences]]:
    """Takes the rows that are held out, which are cut at a limit, from all rows.

    Returns:
        How many that are held out are no rows of the data; and the rows that are left, whole.
    """
    waiting, rest = Counter(held), []
    for row in rows:
        cut = tuple(part[:limit] for part in row)
        if waiting[cut]:
            waiting[cut] -= 1
        else:
            rest.append(row)
    return sum(waiting.values()), rest


def _compare(done: Done, found: Sequence[Sequences], wanted: Sequence[Sequences], what: str, splits: bool) -> Found:
    sources, most = done.small.recipe.dataset.sources, done.recipe.training["max_length"]
    limit = most if done.recipe.stage.shape == "tokens" else None
    chosen = any(source.limit for source in sources)
    if most and done.recipe.dataset.on_overlong == "drop":
        wanted = [row for row in wanted if _measure(row, limit) <= most]
    if splits:  # parts of documents: all of their tokens, and no other
        parts, whole = Counter(t for row in found for t in row[0]), Counter(t for row in wanted for t in row[0])
        if parts != whole and not chosen and not any(source.weight is not None for source in sources):
            counts = sum(parts.values()), sum(whole.values())
            yield f"{counts[0]:,} tokens of the {what} are prepared, and its rows have {counts[1]:,}"
        return
    cut = {tuple(part[:limit] for part in row) for row in wanted}
    muted = any(row.get("muted") for of in done.small.wanted for row in of.rows)
    if muted or done.recipe.dataset.thinking == "mask":  # less is learned: the tokens are the same
        cut, found = {row[:1] for row in cut}, [row[:1] for row in found]
    if strange := [row for row in set(found) if row not in cut]:
        yield f"{len(strange)} prepared rows of the {what} are none of its rows"
    taught = {row for row in cut if _teaches(row, limit, most)}
    if not chosen and (missing := taught - set(found)):
        yield f"{len(missing)} rows of the {what} are not prepared"


def _measure(row: Sequences, limit: int | None) -> int:
    """Tokens of a row; of a prompt and its answers, with the longer one."""
    if len(row) == 2 and limit is None:  # two whole sequences
        return max(map(len, row))
    return len(row[0]) if limit is not None else len(row[0]) + max(map(len, row[1:]))


def _teaches(row: Sequences, limit: int | None, most: int | None) -> bool:
    """Whether something is learned of a row within its limit."""
    if limit is None:  # a prompt and its answers, or whole sequences
        return len(row) < 3 or not most or len(row[0]) < most
    return len(row) != 2 or any(label != IGNORED for label in row[1])


def read_sequences(table: Any, shape: str) -> Iterator[Sequences]:
    """The sequences of each document of prepared rows."""
    names = COLUMNS[shape]
    for row in table.with_format(None):
        begin = 0
        for length in row.get("seq_lengths") or [None]:
            end = None if length is None else begin + length
            yield tuple((row[name],) if name == "label" else tuple(row[name][begin:end]) for name in names)
            begin = end or 0


def work_out_sequences(
    row: Mapping[str, Any], train_on: str | None, tokenizer: Any, shape: str = "tokens"
) -> Sequences:
    """Tokens and labels of a row in TRL's layout, or its prompt and answers; of a text that says nothing, none.

    Source: `tokenize_fn` of trl/trainer/{sft,dpo,kto}_trainer.py 1.16.0, a row at a time.
    """
    if shape == "rows":
        return (tuple(_encode(tokenizer, row["prompt"], True, None)),) if row["prompt"] else ()
    answers = [name for name in ("chosen", "rejected") if name in row] or ["completion"] * ("prompt" in row)
    if answers and not (row["prompt"] and all(_says(row[name]) for name in answers)):
        return ()
    if answers == ["chosen", "rejected"] and row["chosen"] == row["rejected"]:
        return ()
    if not answers:
        return _work_out_whole(row, train_on, tokenizer)
    tools = row.get("tools")
    asked = _encode(tokenizer, row["prompt"], True, tools)
    wholes = [_encode(tokenizer, row["prompt"] + row[name], False, tools) for name in answers]
    if shape == "scored_pairs":
        return tuple(map(tuple, wholes))
    begin = min(common_prefix_length(asked, whole) for whole in wholes)
    if answers == ["completion"] and "label" not in row:
        labels = [IGNORED] * begin + wholes[0][begin:] if train_on != "all" else wholes[0]
        return tuple(wholes[0]), tuple(labels)
    label = ((bool(row["label"]),),) if "label" in row else ()
    return (tuple(wholes[0][:begin]), *(tuple(whole[begin:]) for whole in wholes), *label)


def _work_out_whole(row: Mapping[str, Any], train_on: str | None, tokenizer: Any) -> Sequences:
    if "text" in row:
        ids = _encode(tokenizer, row["text"], False, None) if row["text"].strip() else []
        return (tuple(ids), tuple(ids)) if ids else ()
    if "segments" in row:
        parts = [(tokenizer.encode(of["text"], add_special_tokens=False), of["label"]) for of in row["segments"]]
        ids = [token for part, _ in parts for token in part]
        labels = [token if learns or train_on == "all" else IGNORED for part, learns in parts for token in part]
        return (tuple(ids), tuple(labels)) if set(labels) - {IGNORED} else ()
    marks = train_on == "assistant"
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    if not row["messages"] or (marks and not answers) or not all(_says([turn]) for turn in answers):
        return ()
    made = tokenizer.apply_chat_template(
        place_thoughts(row["messages"], tokenizer),
        tools=row.get("tools"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=marks,
    )
    ids, learned = made["input_ids"], made["assistant_masks"] if marks else [1] * len(made["input_ids"])
    return tuple(ids), tuple(token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True))


def _says(answer: Any) -> bool:
    """Whether an answer, a text or turns of which the last is the assistant's, says or calls something."""
    if isinstance(answer, str):
        return bool(answer.strip())
    if not answer or answer[-1]["role"] != "assistant":
        return False
    return bool(answer[-1]["content"].strip() or answer[-1].get("tool_calls"))


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
