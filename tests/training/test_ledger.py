"""Every row judged: losses before and after, and the rows that a run learned the least."""

import json

import pytest
from shared import LORA, PAIRS, SAMPLES, TEXT

ROWS = [{"instruction": f"say {'yes' if n % 2 else 'no'}", "output": "yes" if n % 2 else "no"} for n in range(40)]
TRAINED = {"max_steps": 80, "learning_rate": 0.005, "per_device_train_batch_size": 8}


def read(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_that_contradict_the_others_are_the_worst(run_recipe, run_cli, tmp_path):
    rows = [dict(row) for row in ROWS]
    for number in (6, 21, 30):
        rows[number]["output"] = "no" if rows[number]["output"] == "yes" else "yes"
    result, folder = run_recipe(rows=rows, dataset={"format": "instruction"}, peft=LORA, training=TRAINED)
    assert result.status == 0, result.err
    recipe = tmp_path / "tiny.yaml"
    refused = run_cli("preview", recipe, "--worst", 3, "--run", folder)
    assert f"make it: recipe-run evaluate {folder} --rows" in refused.err
    judged = run_cli("evaluate", folder, "--rows")
    assert judged.status == 0, judged.err
    assert "train: 40 rows; mean loss" in judged.out
    entries = read(folder)
    assert [entry["row"] for entry in entries] == list(range(1, 41))
    assert {entry["row"] for entry in sorted(entries, key=lambda of: -of["after"])[:3]} == {7, 22, 31}
    assert all(entry["before"] > entry["after"] for entry in entries if entry["row"] not in (7, 22, 31))
    assert sum("the same as row 1 of" in " ".join(entry["flags"]) for entry in entries) == 17
    shown = run_cli("preview", recipe, "--worst", 3, "--run", folder, "--format", "json")
    assert {row["row"] for row in json.loads(shown.out)} == {7, 22, 31}
    text = run_cli("preview", recipe, "--worst", 3, "--run", folder).out
    assert text.count("before,") == 4  # of three rows, and of all
    assert "rows.jsonl row 7:" in text


def test_rows_that_are_not_in_it_and_those_that_are_there_twice_are_counted_apart(run_recipe, run_cli, tmp_path):
    words = [f"word{number}" for number in range(40)]
    near = [*words[:20], "other", *words[21:]]
    rows = [{"instruction": "say", "output": " ".join(of)} for of in (words, near, words)] + [
        {"instruction": "x", "output": ""}
    ]
    dataset = {"format": "instruction", "max_dropped": 0.5}
    _, folder = run_recipe(rows=rows, dataset=dataset, training={"max_steps": 1, "max_length": 512}, peft=LORA)
    judged = run_cli("evaluate", folder, "--rows")
    assert judged.status == 0, judged.err
    assert "not in it: 1 rows that can't be used (1 with an empty output)" in judged.out + judged.err
    assert "train: 3 rows" in judged.out
    assert "1 the same as another; 1 nearly the same as another" in judged.out


def test_losses_are_those_of_the_model_before_and_after(run_recipe, run_cli):
    import torch
    from transformers import AutoModelForCausalLM

    from recipe_runner.preview.rows import open_preview, take_rows
    from recipe_runner.recipe.resolve import load_recipe

    _, folder = run_recipe(rows=ROWS[:4], dataset={"format": "instruction"}, training={"max_steps": 2})
    assert run_cli("evaluate", folder, "--rows").status == 0
    recipe = load_recipe(str(folder / "resolved.yaml"))
    row = take_rows(open_preview(recipe, 1), 1)[0]
    for model, key in ((recipe.model.name_or_path, "before"), (folder / "model", "after")):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            expected = float(loaded(input_ids=ids, labels=labels).loss)
        assert read(folder)[0][key] == pytest.approx(expected, rel=1e-4)


def test_a_held_out_row_that_was_trained_on_is_told(run_recipe, run_cli, tmp_path):
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [ROWS[0], {**ROWS[1], "output": "?"}])
    )
    dataset = {"format": "instruction", "eval": {"source": "held.jsonl"}}
    training = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    _, folder = run_recipe(rows=ROWS, dataset=dataset, training=training, peft=LORA)
    judged = run_cli("evaluate", folder, "--rows")
    assert "1 trained on, too" in judged.out
    assert next(entry["flags"] for entry in read(folder) if entry["split"] == "eval") == ["trained on"]


@pytest.mark.parametrize("stage", ["pretrain", "dpo", "kto", "reward"])
def test_stages(run_recipe, run_cli, stage):
    training = {"max_steps": 30, "learning_rate": 0.01}
    result, folder = run_recipe(stage=stage, rows=SAMPLES[stage][1], peft=LORA, training=training)
    assert result.status == 0, result.err
    judged = run_cli("evaluate", folder, "--rows")
    assert judged.status == 0, judged.err
    entries = read(folder)
    if stage in ("dpo", "reward"):
        assert len(entries) == len(PAIRS)
        assert sum(entry["margin"] > 0 for entry in entries) >= 0.9 * len(entries)
    elif stage == "kto":
        gains = [(entry["label"], entry["before"] - entry["after"]) for entry in entries]
        good, bad = ([gain for label, gain in gains if label is wanted] for wanted in (True, False))
        assert sum(good) / len(good) > sum(bad) / len(bad)
    else:
        assert len(entries) == len(TEXT)
        assert all(entry["after"] < entry["before"] for entry in entries)


def test_data_that_changed_is_not_judged(run_recipe, run_cli, tmp_path):
    _, folder = run_recipe(rows=ROWS, dataset={"format": "instruction"}, training={"max_steps": 2}, peft=LORA)
    assert run_cli("evaluate", folder, "--rows").status == 0
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    for command in (("evaluate", folder, "--rows"), ("preview", tmp_path / "tiny.yaml", "--worst", 3, "--run", folder)):
        result = run_cli(*command)
        assert result.status == 1
        assert "error[data-changed]" in result.err


def test_what_has_no_ledger(run_cli, tiny_phi3):
    result = run_cli("evaluate", tiny_phi3, "--rows")
    assert result.status == 1
    assert "error[no-ledger]" in result.err
    assert run_cli("preview", "phi3_chat_qlora", "--worst", 3).status == 2
