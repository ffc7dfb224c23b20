"""Rows that stand in for a recipe's data, in the layout of the data; and what each of them should teach, by itself.

What is expected of a row is worked out here from the raw row, apart from the code that trains.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe_runner.data.columns import choose_columns
from recipe_runner.data.images import WRITTEN
from recipe_runner.data.look import iterate_rows
from recipe_runner.data.turns import CALLS, SHAREGPT_ROLES, SWITCHES, THOUGHTS
from recipe_runner.files import read_text, write_text
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.recipe.local import BUILDERS, is_file_source, is_saved, list_files, suffix_of
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.sections import DatasetSection, SourceSection
from recipe_runner.stages import FORMATS

MOST = 20_000  # rows of a file of the recipe's own
SAMPLE = ("metadata", "sample")
WORDS = (
    *("river", "stone", "paper", "window", "garden", "number", "letter", "winter", "silver", "market", "bridge"),
    *("corner", "summer", "picture", "engine", "doctor", "ticket", "copper", "harbour", "lantern"),
)


@dataclass(frozen=True)
class Rows:
    """Rows of one source.

    Attributes:
        entries: As they are in the data: column -> cell.
        told: Where they come from, for people.
    """

    entries: list[dict[str, Any]]
    told: str


def find_rows(recipe: Recipe, source: SourceSection, number: int) -> Rows:
    """Rows for a source: of its own file, of the recipe's `metadata.sample`, or made up for its columns.

    Args:
        recipe: A resolved recipe.
        source: Of its data.
        number: How many are wanted; a file of the recipe's own gives all it has, up to `MOST`.

    Raises:
        UserError: A file can't be read.
    """
    dataset = recipe.dataset.of(source)
    if is_local(source):
        return Rows(read_files(source), Path(source.source).name)
    if sample := find_sample(recipe, source.source):
        rows = read_file(sample, source)
        _check_layout(sample, rows, dataset, source)
        return Rows([rows[place % len(rows)] for place in range(number)], f"{len(rows)} sample rows")
    return Rows([make_row(dataset, source, place) for place in range(number)], "made-up rows")


def lengthen(source: SourceSection, form: str, rows: Rows, least: int) -> Rows:
    """Rows of which the last has a text or an answer of at least so many characters: it is longer than a row may be.

    A file of the recipe's own is as it is.
    """
    if is_local(source):
        return rows
    last = dict(rows.entries[-1])
    for role in ("text", "output", "completion", "messages", "segments", "chosen", "rejected"):
        column = source.columns.get(role) or ("conversations" if role == "messages" and role not in last else role)
        if role in FORMATS[form].roles and last.get(column):
            last[column] = _repeat(last[column], least)
    return Rows([*rows.entries[:-1], last], rows.told)


def _repeat(cell: Any, least: int) -> Any:
    """A text, or the last turn of some, as often as it takes."""
    if isinstance(cell, list):
        return [*cell[:-1], _repeat(cell[-1], least)]
    if isinstance(cell, dict):
        key = next(key for key in ("content", "value", "text") if key in cell)
        return {**cell, key: _repeat(cell[key], least)}
    return "\n".join([cell] * (least // len(cell) + 1)) if isinstance(cell, str) else cell


def find_sample(recipe: Recipe, source: str) -> Path | None:
    """The file of sample rows that a recipe names for a source; None where it names none."""
    named = (recipe.values.get("metadata") or {}).get("sample")
    name = named.get(source) if isinstance(named, dict) else named
    return Path(name) if name else None


def is_local(source: SourceSection) -> bool:
    """Whether a source is data of the recipe's own, which is here."""
    return is_file_source(source.source) and any(file.is_file() for file in list_files(source.source))


def read_files(source: SourceSection) -> list[dict[str, Any]]:
    """The first rows of local data.

    Raises:
        UserError: It can't be read, or has no rows.
    """
    if is_saved(Path(source.source)):
        from recipe_runner.data.reading import load_saved

        return [dict(row) for row in itertools.islice(load_saved(source), MOST)]
    return [row for file in list_files(source.source) for row in read_file(file, source)][:MOST]


def read_file(file: Path, source: SourceSection) -> list[dict[str, Any]]:
    """The first rows of a JSON, JSON-lines, CSV, Parquet, Arrow or text file.

    Raises:
        UserError: It can't be read, or has no rows.
    """
    try:
        if suffix_of(file.name) in (".parquet", ".arrow"):
            from datasets import load_dataset

            loaded = load_dataset(BUILDERS[suffix_of(file.name)], data_files=str(file), split=f"train[:{MOST}]")
            rows = [dict(row) for row in loaded]
        elif source.sample_by == "paragraph":
            rows = [{"text": part} for part in re.split(r"\n\s*\n", read_text(file)) if part.strip()][:MOST]
        else:
            options = source.field, source.delimiter, source.encoding
            rows = list(itertools.islice(iterate_rows(file, *options), MOST))
    except (OSError, ValueError, LookupError, EOFError) as error:
        raise user_error("unreadable-data", f"{file}: {first_line(error)}", path=SAMPLE) from error
    if not rows:
        raise user_error("empty-dataset", f"{file} has no rows", path=SAMPLE)
    return rows


def _check_layout(
    file: Path, rows: Sequence[Mapping[str, Any]], dataset: DatasetSection, source: SourceSection
) -> None:
    """Sample rows have the columns that the recipe takes from its data.

    Raises:
        UserError: They have not.
    """
    try:
        choose_columns(source, dataset.format, {name: [row.get(name) for row in rows] for name in rows[0]})
    except UserError as error:
        message = f"{file}: {error.problems[0].message}".replace(source.source, "these sample rows")
        raise user_error("sample-layout", message, "write the rows in the layout of the data", path=SAMPLE) from error


def make_row(dataset: DatasetSection, source: SourceSection, number: int) -> dict[str, Any]:
    """A row with the columns that the recipe names. No two are alike, and no answer is in its question."""

    def words(what: str, count: int) -> str:
        chosen = [WORDS[(number * 7 + place * (3 + len(what))) % len(WORDS)] for place in range(count)]
        return f"{what} {number}: {' '.join(chosen)}."

    question, answer, other = words("Question", 6), words("Answer", 4 + number % 7), words("Refusal", 3 + number % 5)
    cells: dict[str, Any] = {
        "instruction": question,
        "input": words("Context", 3),
        "output": answer,
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": words("Then", 3)},
            {"role": "assistant", "content": words("Reply", 4)},
        ],
        "text": words("Document", 20 + number % 9),
        "segments": [{"text": f"{question}\n", "label": False}, {"text": answer, "label": True}],
        "prompt": question,
        "completion": answer,
        "chosen": answer,
        "rejected": other,
        "label": number % 2 == 0,
        "system": words("System", 3),
        "history": [],
    }
    roles = FORMATS[dataset.format].required
    named = {role: column for role, column in source.columns.items() if column is not None}
    if dataset.format in ("preference", "unpaired_preference"):
        roles = ("prompt", *roles)
    handed = dict.fromkeys(dataset.reward_columns, answer)
    return handed | {named.get(role, role): cells[role] for role in dict.fromkeys((*roles, *named))}


def write_rows(rows: Rows, file: Path) -> None:
    """Writes rows as JSON lines."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.entries))


@dataclass(frozen=True)
class Wanted:
    """What the rows of a recipe should teach.

    Attributes:
        learned: Texts, one of which each learned stretch of tokens must say.
        rejected: Texts of rejected answers: each must stand where a rejected answer does.
        asked: Of each row the texts that must stand before its answer: question, input, earlier turns.
        whole: Whether all tokens of a row are learned, the question included.
        split: `train` or `eval`.
        rows: The rows in TRL's layout: `messages`, `text`, or `prompt` and answers.
    """

    learned: frozenset[str]
    rejected: frozenset[str]
    asked: tuple[tuple[str, ...], ...]
    whole: bool
    split: str
    rows: tuple[dict[str, Any], ...]


def work_out(
    dataset: DatasetSection, split: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]], unpairs: bool
) -> Wanted:
    """What rows should teach, from the layout that the recipe says they have.

    Args:
        dataset: Section of the recipe.
        split: `train` or `eval`.
        columns: Role -> column.
        rows: As they are in the data.
        unpairs: Whether each answer of a pair is a row of its own.
    """
    learned, rejected, asked = set(), set(), []
    for row in rows:
        cells = {role: row.get(column) for role, column in columns.items()}
        match dataset.format:
            case "text":
                learned.add(_text(cells["text"]))
            case "instruction":
                learned.add(_text(cells["output"]))
                asked.append([_text(cells.get(role)) for role in ("system", "instruction", "input")])
            case "chat":
                turns = cells["messages"] or []
                answers = [_said(turn) for turn in turns if _role(turn) == "assistant"]
                learned.update(answers[-1:] if dataset.train_on in ("completion", "last") else answers)
                last = max((place for place, turn in enumerate(turns) if _role(turn) == "assistant"), default=0)
                asked.append([_said(turn) for turn in turns[:last] if _role(turn) in ("system", "user")])
            case "segments":
                segments = cells["segments"] or []
                learned.update(_join_segments(segments, labelled=True))
                asked.append(_join_segments(segments, labelled=False))
            case "preference":
                learned.add(_last(cells["chosen"]))
                rejected.add(_last(cells["rejected"]))
                if isinstance(cells.get("prompt"), str):
                    asked.append([str(cells["prompt"]).replace(WRITTEN, "")])
            case "unpaired_preference":
                learned.add(_last(cells["completion"]))
            case "prompt" if isinstance(cells["prompt"], str):
                asked.append([cells["prompt"]])
    whole = dataset.format == "text" or dataset.train_on == "all"
    groups = tuple(tuple(text for text in map(squeeze, texts) if text) for texts in asked)
    made = tuple(lay_out(dataset, {role: row.get(column) for role, column in columns.items()}) for row in rows)
    if unpairs:
        learned, rejected = learned | rejected, set()
        sides = (("chosen", True), ("rejected", False))
        made = tuple(
            {"prompt": row["prompt"], "completion": row[name], "label": good} for row in made for name, good in sides
        )
    return Wanted(frozenset(map(squeeze, learned)), frozenset(map(squeeze, rejected)), groups, whole, split, made)


def lay_out(dataset: DatasetSection, cells: Mapping[str, Any]) -> dict[str, Any]:
    """A row (role -> cell) in TRL's layout, with the tools that it declares."""
    made = _lay_out(dataset, cells)
    if dataset.merge_system:
        made = {key: _merge_system(cell) if isinstance(cell, list) else cell for key, cell in made.items()}
    if declared := cells.get("tools"):
        tools = json.loads(declared) if isinstance(declared, str) else declared
        made["tools"] = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return made


def _merge_system(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns whose first one, if it is the system's, is put into the one after it."""
    if len(turns) < 2 or turns[0]["role"] != "system" or turns[1]["role"] != "user":
        return turns
    return [{"role": "user", "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}, *turns[2:]]


def _lay_out(dataset: DatasetSection, cells: Mapping[str, Any]) -> dict[str, Any]:
    text = {role: _text(cell) for role, cell in cells.items() if not isinstance(cell, list | dict)}
    history = [
        {"role": role, "content": said}
        for pair in cells.get("history") or ()
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    more = text.get("input", "")
    match dataset.format:
        case "text":
            return {"text": text["text"]}
        case "segments":
            return {"segments": cells["segments"]}
        case "instruction" if dataset.template:
            return (
                _fill(dataset.template, text)
                if text["instruction"].strip() and text["output"].strip()
                else {"text": ""}
            )
        case "instruction":
            asked = text["instruction"] + (f"{dataset.input_separator}{more}" if more.strip() else "")
            prompt = _begin(dataset, text.get("system", ""), [*history, {"role": "user", "content": asked}])
            said = [{"role": "assistant", "content": text["output"]}] if text["output"].strip() else []
            return (
                {"messages": prompt + said}
                if dataset.train_on == "assistant"
                else {"prompt": prompt, "completion": said}
            )
        case "chat":
            turns = _begin(dataset, text.get("system", ""), [_turn(turn, dataset) for turn in cells["messages"] or ()])
            muted = {"muted": True} if any(_is_muted(turn) for turn in cells["messages"] or ()) else {}
            answer_only = dataset.train_on in ("completion", "last")
            return muted | ({"prompt": turns[:-1], "completion": turns[-1:]} if answer_only else {"messages": turns})
        case _:
            prompt = _listed(cells.get("prompt"), "user", dataset)
            if more.strip():
                prompt = [{"role": "user", "content": f"{prompt[0]['content']}{dataset.input_separator}{more}"}]
            answers = {
                name: _listed(cells[name], "assistant", dataset)
                for name in ("chosen", "rejected", "completion")
                if name in cells
            }
            shared = prompt if prompt or not answers else _share(*answers.values())
            for name, turns in answers.items():
                answers[name] = turns[len(shared) :] if turns[: len(shared)] == shared else turns
            label = {"label": cells["label"]} if "label" in cells else {}
            return {"prompt": _begin(dataset, text.get("system", ""), [*history, *shared]), **answers, **label}


def _join_segments(segments: Sequence[Mapping[str, Any]], labelled: bool) -> list[str]:
    """The texts of those that are labelled, or that are not; such as stand beside each other are one text."""
    runs = itertools.groupby(segments, key=lambda segment: segment["label"])
    return ["".join(segment["text"] for segment in run) for label, run in runs if label == labelled]


def _is_muted(turn: Mapping[str, Any]) -> bool:
    """Whether a turn says that it is not learned."""
    return turn.get("weight") == 0 or any(turn.get(switch) in (False, 0) for switch in SWITCHES if switch in turn)


def _share(*answers: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns that answers begin with in common, without the last of each."""
    first, least = answers[0], min(map(len, answers)) - 1
    same = next((at for at in range(max(least, 0)) if any(of[at] != first[at] for of in answers)), max(least, 0))
    return first[:same]


def _turn(turn: Mapping[str, Any], dataset: DatasetSection) -> dict[str, Any]:
    """A turn with its calls, and with its thinking where that is not dropped."""
    role, content = _role(turn), _said(turn)
    made: dict[str, Any] = {"role": role, "content": content}
    calls = turn.get("tool_calls") or []
    if str(turn.get("role") or turn.get("from")) in CALLS:
        calls, made["content"] = [json.loads(content)], ""
    if calls:
        made["tool_calls"] = [_call(call) for call in (json.loads(calls) if isinstance(calls, str) else calls)]
    thought = next((turn[key] for key in THOUGHTS if turn.get(key)), None)
    written = re.match(r"\s*<think>(.*?)</think>\s*", content, re.DOTALL) if role == "assistant" else None
    if written:
        thought, made["content"] = written[1], content[written.end() :]
    if thought and dataset.thinking != "drop":
        made["reasoning_content"] = thought.strip()
    if role == "tool" and turn.get("name"):
        made["name"] = turn["name"]
    return made


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _begin(dataset: DatasetSection, own: str, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Turns after a system prompt: the row's, else the recipe's."""
    system = own if own.strip() else dataset.system
    if not system or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _fill(template: str | Mapping[str, str], text: Mapping[str, str]) -> dict[str, Any]:
    """A row in plain text, by the recipe's own template or the classic one."""
    more = text.get("input", "")
    if template == "classic":
        words = (
            f"Instruction:\n{text['instruction']}\n\n" + (f"Input:\n{more}\n\n" if more.strip() else "") + "Output:\n"
        )
        return {"prompt": words, "completion": text["output"]}
    if not isinstance(template, str):
        template = template["with_input" if more.strip() else "without_input"]
    before, after = template.split("{output}")
    for place, said in (("{instruction}", "instruction"), ("{input}", "input")):
        before = before.replace(place, f"\0{said}\0")
    parts = [text.get(part, "") if at % 2 else part for at, part in enumerate(before.split("\0"))]
    return {"prompt": "".join(parts), "completion": text["output"] + after}


def _listed(value: Any, role: str, dataset: DatasetSection) -> list[dict[str, Any]]:
    """Turns of a text, of a turn, or of turns."""
    if isinstance(value, list | dict):
        turns = value if isinstance(value, list) else [value]
        return [_turn(turn, dataset) for turn in turns]
    return [{"role": role, "content": _text(value)}] if _text(value).strip() else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("role") or turn.get("from"))
    return SHAREGPT_ROLES.get(role, role)


def _said(turn: Mapping[str, Any]) -> str:
    return _text(turn.get("content", turn.get("value"))).replace(WRITTEN, "")


def _last(value: Any) -> str:
    if isinstance(value, list):
        return _said(value[-1]) if value else ""
    return _said(value) if isinstance(value, Mapping) else _text(value)


def squeeze(text: str) -> str:
    """A text without white space, and without what a reasoning template puts before an answer."""
    return re.sub(r"\s+", "", re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL))
