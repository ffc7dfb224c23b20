"""From data sources to tokens and labels, by the recipe; no weights are needed.

Rows pass through three stages: loaded (as they are in the source), normalised to a layout that TRL knows (`messages`,
`prompt` and `completion`, or `text`), and tokenized by TRL's own code, with labels that are -100 where nothing is learned.
"""

import copy
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, disable_progress_bars, interleave_datasets, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from recipe_runner.errors import UserError, user_error
from recipe_runner.recipe import Recipe
from recipe_runner.validate import suggest

IGNORED = -100  # label of a token that is not in the loss (torch.nn.CrossEntropyLoss's ignore_index)
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
COLUMNS = {"instruction": ("instruction", "output"), "chat": ("messages",), "text": ("text",)}
CLASSIC = {
    "with_input": "Instruction:\n{instruction}\n\nInput:\n{input}\n\nOutput:\n{output}",
    "without_input": "Instruction:\n{instruction}\n\nOutput:\n{output}",
}
# ShareGPT's names of roles, as its exports and their descendants write them -> the names chat templates know.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
}
KNOWN_ROLES = ("system", "user", "assistant", "tool", *ROLES)
# datasets' cache tells functions of a module by their names alone: without this it would serve rows made by older code.
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
CHECKED_ROWS = 100  # rows whose masks are checked before the weights are loaded


@dataclass(frozen=True)
class Accounting:
    """What became of the rows of one split.

    Attributes:
        rows_read: Rows in the source, after `limit` and the evaluation split.
        rows_kept: Rows that are trained on, before packing.
        dropped: Reason -> number of rows.
        rows_truncated: Rows cut at `max_length`.
        tokens_truncated: Tokens cut off.
        tokens: Tokens in the kept rows.
        supervised_tokens: Those of them that are in the loss.
    """

    rows_read: int
    rows_kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    rows_truncated: int = 0
    tokens_truncated: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def __str__(self) -> str:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        dropped = f"{sum(self.dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")
        cut = f"{self.rows_truncated:,} truncated" + (
            f" ({self.tokens_truncated:,} tokens lost)" if self.rows_truncated else ""
        )
        share = self.supervised_tokens / max(self.tokens, 1)
        tokens = f"{self.tokens:,} tokens, {self.supervised_tokens:,} supervised ({share:.0%})"
        return f"{self.rows_read:,} rows: {self.rows_kept:,} kept, {dropped}, {cut}; {tokens}"


@dataclass(frozen=True)
class PreparedSplit:
    """A split ready for the trainer.

    Attributes:
        dataset: Rows with `input_ids`, `labels` and, when packed, `seq_lengths`.
        accounting: What became of its rows.
    """

    dataset: Dataset
    accounting: Accounting


def load_splits(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """Loads, normalises, splits and mixes the sources of a recipe, by its seed.

    Returns:
        Training and evaluation rows: `messages: list[{role, content}]`, or `prompt` and `completion` (both strings, or both
        lists of messages), or `text`; and `dropped`, the reason why a row can't be trained on, or ''.

    Raises:
        UserError: A source cannot be read, lacks a column, or has a row of the wrong shape.
    """
    disable_progress_bars()
    dataset, seed = recipe.values["dataset"], recipe.values["run"]["seed"]
    held_out = dataset.get("eval") or {}
    train, evaluation = [], []
    entries = dataset["train"] if isinstance(dataset["train"], list) else [dataset["train"]]
    for index, source in enumerate(entries):
        path = ("dataset", "train", index) if isinstance(dataset["train"], list) else ("dataset", "train")
        rows = load_source(recipe, source, path)
        # Each source is split before the sources are mixed: mixing repeats rows, and a repeated row may not be on both sides.
        if "fraction" in held_out:
            if len(rows) < 2:
                raise user_error(
                    "empty-dataset",
                    f"{source['source']} has too few rows to hold some out",
                    "use a source of its own for eval",
                    recipe.mark("dataset", "eval"),
                    "dataset.eval",
                )
            parts = rows.train_test_split(
                test_size=max(1, round(len(rows) * held_out["fraction"])), seed=seed
            )
            rows, part = parts["train"], parts["test"]
            evaluation.append(part)
        train.append(rows)
    if held_out and "fraction" not in held_out:
        entries_eval = held_out if isinstance(held_out, list) else [held_out]
        for index, source in enumerate(entries_eval):
            path = ("dataset", "eval", index) if isinstance(held_out, list) else ("dataset", "eval")
            evaluation.append(load_source(recipe, source, path))
    weights = [source.get("weight") for source in entries]
    if len(train) > 1 and None not in weights:
        shares = [weight / sum(weights) for weight in weights]
        mixed = interleave_datasets(train, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        mixed = concatenate_datasets(train)
    return mixed, concatenate_datasets(evaluation) if evaluation else None


def load_source(recipe: Recipe, source: dict[str, Any], path: tuple[str | int, ...]) -> Dataset:
    """Loads one source and normalises its rows."""
    mark, key = recipe.mark(*path, "source"), ".".join(map(str, path))
    name = source["source"]
    suffix = Path(name).suffix
    try:
        if suffix in BUILDERS:
            options: dict[str, Any] = (
                {"sample_by": source.get("sample_by", "line")} if suffix == ".txt" else {}
            )
            rows = load_dataset(BUILDERS[suffix], data_files=name, split="train", **options)
        else:
            rows = load_dataset(
                name,
                source.get("subset"),
                split=source.get("split", "train"),
                revision=source.get("revision"),
            )
    except (DatasetsError, OSError, ValueError, KeyError) as error:
        raise _explain_load_error(error, name, suffix, recipe, path) from error
    if not len(rows):
        raise user_error("empty-dataset", f"{name} has no rows", "", mark, key)
    columns = choose_columns(recipe, source, rows.column_names, path)
    if "limit" in source:
        rows = rows.shuffle(seed=recipe.values["run"]["seed"]).select(range(min(source["limit"], len(rows))))
    rows = rows.select_columns(list(columns.values())).flatten_indices()
    normalise = partial(
        normalise_batch, dataset=dict(recipe.values["dataset"]), columns=columns, name=name, code=CODE
    )
    try:
        return rows.map(normalise, batched=True, with_indices=True, remove_columns=rows.column_names)
    except RowError as error:
        raise user_error("wrong-row-shape", str(error), "", mark, key) from error


def choose_columns(
    recipe: Recipe, source: dict[str, Any], available: list[str], path: tuple[str | int, ...]
) -> dict[str, str]:
    """Maps each role of the format to a column that the data has.

    Raises:
        UserError: A column is missing; the message lists those there are.
    """
    form, given = recipe.values["dataset"]["format"], source.get("columns", {})
    columns = {role: given.get(role, role) for role in COLUMNS[form]}
    if (
        form == "chat"
        and "messages" not in given
        and "messages" not in available
        and "conversations" in available
    ):
        columns["messages"] = "conversations"  # ShareGPT's name
    if form == "instruction" and given.get("input", "input" if "input" in available else None):
        columns["input"] = given.get("input", "input")
    for role, column in columns.items():
        if column not in available:
            place = recipe.mark(*path, "columns", role)
            message = f"{source['source']} has no column '{column}' for the role '{role}'; its columns: {', '.join(available)}"
            hint = suggest(column, available) or f"set columns: {{{role}: NAME}}"
            raise user_error(
                "missing-column", message, hint, place, ".".join(map(str, (*path, "columns", role)))
            )
    return columns


class RowError(Exception):
    """A row has the wrong shape. Raised inside `Dataset.map`, which runs in this process."""


def normalise_batch(
    batch: dict[str, list],
    indices: list[int],
    dataset: dict[str, Any],
    columns: dict[str, str],
    name: str,
    code: str,
) -> dict[str, list]:
    """Normalises rows to a layout of TRL's, as `Dataset.map` wants it: columns in, columns out.

    `code` is not used: it makes the cache of `Dataset.map` notice a changed version of this file.
    """
    normalise = {"instruction": _instruction_row, "chat": _chat_row, "text": _text_row}[dataset["format"]]
    rows = []
    for position, index in enumerate(indices):
        row = {role: batch[column][position] for role, column in columns.items()}
        rows.append(normalise(row, dataset, f"{name}: row {index + 1}"))
    return {key: [row[key] for row in rows] for key in rows[0]}


def _instruction_row(row: dict[str, Any], dataset: dict[str, Any], where: str) -> dict[str, Any]:
    values = {
        role: _text(row.get(role), f"{where}: column '{role}'") for role in ("instruction", "input", "output")
    }
    dropped = next(
        (f"with an empty {role}" for role in ("instruction", "output") if not values[role].strip()), ""
    )
    if "template" in dataset:
        prompt, completion = _fill_template(dataset["template"], values, where)
        return {"prompt": prompt, "completion": completion, "dropped": dropped}
    question = "\n\n".join(text for text in (values["instruction"], values["input"]) if text.strip())
    system = [{"role": "system", "content": dataset["system"]}] if "system" in dataset else []
    return {
        "prompt": [*system, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": values["output"]}],
        "dropped": dropped,
    }


def _fill_template(template: str | dict[str, str], values: dict[str, str], where: str) -> tuple[str, str]:
    """Fills a plain-text template; the prompt ends where `{output}` begins."""
    if template == "classic":
        template = CLASSIC
    if isinstance(template, dict):
        template = template["with_input" if values["input"].strip() else "without_input"]
    elif "{input}" not in template and values["input"].strip():
        raise RowError(f"{where} has an input, but dataset.template has no {{input}}: it would be lost")
    prompt, completion = template.split("{output}", 1)
    fill = partial(re.sub, r"\{(instruction|input|output)\}", lambda match: values[match[1]])
    return fill(prompt), fill("{output}" + completion)


def _chat_row(row: dict[str, Any], dataset: dict[str, Any], where: str) -> dict[str, Any]:
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(
            f"{where}: expected a list of turns {{role, content}} or {{from, value}}, found {_kind(turns)}"
        )
    messages = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    if "system" in dataset and not any(message["role"] == "system" for message in messages[:1]):
        messages = [{"role": "system", "content": dataset["system"]}, *messages]
    dropped = ""
    if not turns:
        dropped = "without turns"
    elif dataset["train_on"] == "completion" and messages[-1]["role"] != "assistant":
        dropped = "that do not end with an assistant turn"
    elif dataset["train_on"] == "assistant" and not any(
        message["role"] == "assistant" for message in messages
    ):
        dropped = "without an assistant turn"
    if dataset["train_on"] == "completion":
        return {"prompt": messages[:-1], "completion": messages[-1:], "dropped": dropped}
    return {"messages": messages, "dropped": dropped}


def _turn(turn: dict[str, Any], where: str) -> dict[str, str]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in KNOWN_ROLES:
        hint = suggest(str(role), list(KNOWN_ROLES)) or f"known roles: {', '.join(KNOWN_ROLES)}"
        raise RowError(
            f"{where}: {'no role' if role is None else f'unknown role {role!r}'} (keys: {', '.join(turn)}); {hint}"
        )
    if not isinstance(content, str):
        raise RowError(f"{where}: expected a text as content, found {_kind(content)}")
    return {"role": ROLES.get(role, role), "content": content}


def _text_row(row: dict[str, Any], dataset: dict[str, Any], where: str) -> dict[str, Any]:
    text = _text(row["text"], f"{where}: column 'text'")
    return {"text": text, "dropped": "" if text.strip() else "with an empty text"}


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int | float):
        return str(value)
    raise RowError(f"{where}: expected a text, found {_kind(value)}")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def prepare_split(
    rows: Dataset,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: SFTConfig,
    packing: bool,
    name: str,
) -> PreparedSplit:
    """Tokenizes rows, builds labels, truncates or packs: TRL's own preparation, with every lost row and token counted.

    Args:
        rows: Normalised rows, from `load_splits`.
        recipe: The recipe.
        tokenizer: With the chat template that is trained with.
        config: The trainer's configuration.
        packing: Whether to pack rows up to `config.max_length`.
        name: `train` or `eval`, for messages.

    Raises:
        UserError: No row is left, or the masks of the rows are wrong.
    """
    reasons = Counter(reason for reason in rows["dropped"] if reason)
    kept = [index for index, reason in enumerate(rows["dropped"]) if not reason]
    usable = rows.select(kept).remove_columns("dropped") if reasons else rows.remove_columns("dropped")
    if not kept:
        raise _nothing_left(recipe, name, dict(reasons))
    tokenized = _tokenize(usable, recipe, tokenizer, config)
    check_masks(tokenized.select(range(min(CHECKED_ROWS, len(tokenized)))), recipe, tokenizer)

    cuts = config.max_length is not None and not (packing and config.packing_strategy != "bfd")
    limit = config.max_length if cuts else None
    lengths, supervised = measure_rows(tokenized, limit)
    learnable = np.flatnonzero(supervised)
    if lost := len(lengths) - len(learnable):
        reasons[f"without a supervised token within max_length ({limit})"] += lost
        tokenized = tokenized.select(learnable).flatten_indices()
        lengths, supervised = lengths[learnable], supervised[learnable]
    if not len(learnable):
        raise _nothing_left(recipe, name, dict(reasons))
    over = np.maximum(lengths - limit, 0) if limit else np.zeros_like(lengths)
    accounting = Accounting(
        rows_read=len(rows),
        rows_kept=len(lengths),
        dropped=dict(reasons),
        rows_truncated=int((over > 0).sum()),
        tokens_truncated=int(over.sum()),
        tokens=int((lengths - over).sum()),
        supervised_tokens=int(supervised.sum()),
    )
    if packing or over.any():
        tokenized = _upstream_preparation(tokenized, recipe, tokenizer, config, packing)
    return PreparedSplit(tokenized, accounting)


def _tokenize(
    rows: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: SFTConfig
) -> Dataset:
    """Tokens and labels of whole rows, neither truncated nor packed."""
    whole = copy.copy(config)
    whole.max_length = None
    whole.assistant_only_loss = recipe.values["dataset"]["train_on"] == "assistant"
    tokenized = _upstream_preparation(rows, recipe, tokenizer, whole, packing=False)
    return tokenized.select_columns(["input_ids", "labels"])


def _upstream_preparation(
    rows: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: SFTConfig, packing: bool
) -> Dataset:
    """Calls `SFTTrainer._prepare_dataset` without a trainer, because a trainer would load the weights first.

    Source: trl/trainer/sft_trainer.py 1.16.0; of `self` the method reads only the three attributes given here, which
    `test_data.py` holds against a real trainer.
    """
    stand_in = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None,  # the tokenizer already has the training template: see `model.load_tokenizer`
        completion_only_loss=recipe.values["dataset"]["train_on"] == "completion",
    )
    prepare: Any = SFTTrainer._prepare_dataset
    return prepare(stand_in, rows, tokenizer, config, packing, None, "")


def measure_rows(tokenized: Dataset, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of rows, and how many supervised tokens each has within the first `limit` tokens: two arrays `(rows,)`."""
    lengths, supervised = [], []
    for batch in tokenized.select_columns(["labels"]).with_format("arrow").iter(batch_size=10_000):
        column = batch.column("labels").combine_chunks()
        offsets = column.offsets.to_numpy()
        learned = np.concatenate([[0], np.cumsum(column.values.to_numpy() != IGNORED)])
        ends = offsets[1:] if limit is None else np.minimum(offsets[1:], offsets[:-1] + limit)
        lengths.append(np.diff(offsets))
        supervised.append(learned[ends] - learned[offsets[:-1]])
    return np.concatenate(lengths), np.concatenate(supervised)


def check_masks(sample: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks on real rows that every supervised span ends with a token that ends a turn or a text.

    A template may leave that token out of the assistant's mask: the loss looks healthy, and the model never stops.

    Args:
        sample: Tokenized rows, not yet truncated.
        recipe: The recipe.
        tokenizer: With the chat template that is trained with.

    Raises:
        UserError: A supervised span ends with content.
    """
    stops = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    for number, row in enumerate(sample, 1):
        labels = [*row["labels"], IGNORED]
        last = None
        for token in labels:
            if token != IGNORED and (last is None or tokenizer.decode([token]).strip()):
                last = token  # white space after the end of a turn belongs to the template
            elif token == IGNORED and last is not None:
                if last not in stops:
                    text = tokenizer.decode([token for token in row["labels"] if token != IGNORED])
                    message = f"the end-of-turn token is not learned: the supervised text of row {number} ends with {text[-40:]!r}, so the model would not learn to stop"
                    fix = "put the end-of-turn token inside {% generation %} ... {% endgeneration %} in the chat template (training.chat_template_path)"
                    raise user_error(
                        "end-of-turn-masked",
                        message,
                        fix,
                        recipe.mark("dataset", "train_on"),
                        "dataset.train_on",
                    )
                last = None


def _nothing_left(recipe: Recipe, name: str, reasons: dict[str, int]) -> UserError:
    told = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    key = "train" if name == "train" else "eval"
    return user_error(
        "empty-dataset",
        f"no row of the {name} data can be used: {told}",
        "",
        recipe.mark("dataset", key),
        f"dataset.{key}",
    )


def _explain_load_error(
    error: Exception, name: str, suffix: str, recipe: Recipe, path: tuple[str | int, ...]
) -> UserError:
    """Says which line of a local file is at fault, or why a hub dataset can't be had."""
    mark, key = recipe.mark(*path, "source"), ".".join(map(str, path))
    if suffix in (".json", ".jsonl") and (found := _find_bad_json(Path(name), suffix)):
        return user_error("unreadable-data", found, "mend the file", mark, key)
    if suffix in BUILDERS and not Path(name).stat().st_size:
        return user_error("empty-dataset", f"{name} is empty", "", mark, key)
    root: BaseException = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__  # type: ignore[assignment]
    told = str(error if suffix not in BUILDERS else root).strip().splitlines()
    what = told[0] if told else type(root).__name__
    if suffix in BUILDERS:
        return user_error("unreadable-data", f"cannot read {name}: {what}", "", mark, key)
    hint = "check the id, subset and split, and the network; or use a local file"
    return user_error("dataset-unavailable", f"cannot load the dataset '{name}': {what}", hint, mark, key)


def _find_bad_json(file: Path, suffix: str) -> str:
    """Where a JSON or JSON-lines file stops being one; empty when every row is an object."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        first = stream.read(1)
        stream.seek(0)
        try:
            if suffix == ".json" and first == "[":
                rows = json.load(stream)
                wrong = next((index for index, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
                return f"{file}: item {wrong} is no JSON object" if wrong else ""
            for number, line in enumerate(stream, 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"{file}: line {number} is no JSON object"
        except json.JSONDecodeError as error:
            line_number = error.lineno if suffix == ".json" and first == "[" else number
            return f"{file}: line {line_number}, column {error.colno}: {error.msg}"
    return ""
