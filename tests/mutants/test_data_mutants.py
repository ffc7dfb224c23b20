"""Broken copies of data files: never a bug, and nothing that a file says is lost without a word."""

import csv
import io
import json
import re

import pytest
from mutate import Answers, mutate_bytes, mutate_json, time_limit

SAID = [
    {"instruction": f"Say number {n}.", "input": f"in words {n}" if n % 2 else "", "output": f"it is {n}"}
    for n in range(10)
]
TURNS = [
    {
        "messages": [
            {"role": "user", "content": f"say {n}"},
            {"role": "assistant", "content": f"it is {n}"},
            {"role": "user", "content": f"and {n + 50}?"},
            {"role": "assistant", "content": f"is {n + 50}"},
        ]
    }
    for n in range(10)
]
SHARED = [
    {"conversations": [{"from": "human", "value": f"say {n}"}, {"from": "gpt", "value": f"it is {n}"}]}
    for n in range(10)
]
TEXTS = [{"text": f"document number {n}"} for n in range(10)]
PAIRS = [{"prompt": f"say {n}", "chosen": f"it is {n}", "rejected": f"no idea of {n}"} for n in range(10)]
JUDGED = [{"prompt": f"say {n}", "completion": f"it is {n}", "label": n % 2 == 1} for n in range(10)]
# name -> stage, format, suffix, rows
SUBJECTS = {
    "instruction": ("sft", "instruction", "jsonl", SAID),
    "csv": ("sft", "instruction", "csv", SAID),
    "chat": ("sft", "chat", "jsonl", TURNS),
    "sharegpt": ("sft", "chat", "json", SHARED),
    "text": ("pretrain", "text", "jsonl", TEXTS),
    "txt": ("pretrain", "text", "txt", TEXTS),
    "pairs": ("dpo", "preference", "jsonl", PAIRS),
    "judged": ("kto", "unpaired_preference", "jsonl", JUDGED),
}
# Columns and keys of turns that say something in one layout or another.
ADDED = {
    "system": "be zealous",
    "history": [["earlier", "answer"]],
    "tools": [{"name": "look_up"}],
    "images": ["a.png"],
    "label": False,
    "input": "zealous",
    "weight": 0,
    "train": False,
    "reasoning_content": "let me think",
    "name": "zoe",
    "zz": "zebra",
}


def write_data(rows, suffix):
    if suffix == "csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        return stream.getvalue().encode("utf-8", "surrogatepass")
    if suffix == "txt":
        return "".join(f"{row['text']}\n" for row in rows).encode()
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return (f"[{', '.join(lines)}]" if suffix == "json" else "\n".join(lines)).encode("utf-8", "surrogatepass")


def read_data(data, suffix):
    """The rows of a file, as Python's own readers see them."""
    text = data.decode("utf-8-sig")
    if suffix == "csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if suffix == "txt":
        return [{"text": line} for line in re.split(r"\r\n|\n|\r", text)]
    reader, rows, at = json.JSONDecoder(strict=False), [], 0
    while at < len(text := text.rstrip()):
        value, at = reader.raw_decode(text, at + len(text[at:]) - len(text[at:].lstrip()))
        rows += value if isinstance(value, list) else [value]
    return rows


def texts_in(value, name=""):
    """What a row says: every value with the name of its column or key."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from texts_in(inside, str(key))
    elif isinstance(value, list):
        for inside in value:
            yield from texts_in(inside, name)
    elif value is not None and name not in ("role", "from", "label", "weight", "train"):
        text = value if isinstance(value, str) else json.dumps(value)
        if text.strip():
            yield name, text.strip()


def mutate_rows(rows, chance):
    """Changes one row, or all of them."""
    if chance.random() < 0.6:
        return mutate_json(rows, chance)
    key, value = chance.choice(list(ADDED.items()))
    chosen = rows if chance.random() < 0.5 else [chance.choice(rows)]
    turns = next((row for row in chosen if isinstance(next(iter(row.values())), list)), None)
    for row in chosen:
        (chance.choice(next(iter(row.values()))) if turns and chance.random() < 0.5 else row)[key] = value
    return f"{key} added to {len(chosen)} rows"


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.mutants(160, 2000)
def test_data(name, small_recipe, run_cli, tokenizer, tmp_path, mutants, report_figure):
    stage, form, suffix, rows = SUBJECTS[name]
    file = tmp_path / f"data.{suffix}"
    data = {"format": form, "train": {"source": file.name}}
    recipe = small_recipe(stage, dataset=data, training={"max_length": 400})
    answers = Answers(f"data, {name}", mutants.seed)

    def look(data):
        file.write_bytes(data)
        with time_limit(data):
            result = run_cli("prepare", recipe)
            shown = run_cli("preview", recipe, "--rows-only", "--format", "json", "-n", 100)
        return result, json.loads(shown.out) if shown.status == 0 else []

    whole, before = look(write_data(rows, suffix))
    assert whole.status == 0, whole.err
    for _ in range(mutants.count // len(SUBJECTS)):
        copy = json.loads(json.dumps(rows))
        if suffix == "txt" or answers.chance.random() < 0.4:
            data, what = mutate_bytes(write_data(rows, suffix), answers.chance)
        else:
            what = mutate_rows(copy, answers.chance)
            try:
                data = write_data(copy, suffix)
            except (ValueError, AttributeError, TypeError, KeyError):  # a csv has no such rows
                continue
        result, shown = look(data)
        if result.status:
            answers.add(what, result)
            continue
        told = result.err + result.out
        if shown == before:
            answers.add(what, result, "without effect")
        elif mentioned(told) - mentioned(whole.err + whole.out):
            answers.add(what, result, "mentioned")
        else:
            answers.add(what, result, "used")
            seen = "\n".join(tokenizer.decode(ids) for row in shown for ids in all_tokens(row))
            lost = [(key, text) for row in read_data(data, suffix) for key, text in texts_in(row, "")]
            lost = [(key, text) for key, text in lost if text not in seen and f"'{key}'" not in told]
            if lost:
                answers.wrong.append(f"{what}: lost without a word: {lost[:3]}")
    answers.check(report_figure)


def mentioned(told):
    """What a person is told of the data: warnings, dropped and truncated rows, columns that are not used."""
    return set(re.findall(r"warning\[.*|[1-9]\d* (?:dropped|truncated).*|not used.*", told))


def all_tokens(row):
    """The sequences of a row that is shown."""
    if "input_ids" in row:
        yield row["input_ids"]
    for value in row.values():
        if isinstance(value, dict):
            yield from all_tokens(value)
