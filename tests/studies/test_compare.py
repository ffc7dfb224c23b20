"""`recipe-run compare`: studies and sweeps, with a tiny model."""

import json
import shutil

import pytest
import yaml
from shared import LORA

ROWS = [{"instruction": f"question {n}", "output": f"answer {n % 3}"} for n in range(12)]


@pytest.fixture
def study(small_recipe, tmp_path):
    """Writes a small recipe and a study of it."""

    def study(**keys):
        small_recipe(
            name="base", rows=ROWS, dataset={"format": "instruction"}, peft=LORA, training={"learning_rate": 1e-3}
        )
        held = tmp_path / "held.jsonl"
        held.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:6]))
        values = {
            "schema_version": 1,
            "name": "small",
            "recipe": "base.yaml",
            "evaluate": {"data": "held.jsonl", "scorers": ["exact_match"], "max_new_tokens": 4},
        }
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump({**values, **keys}, sort_keys=False))
        return file

    return study


def compare(run_cli, tmp_path, *arguments):
    result = run_cli("compare", *arguments, "--output-dir", tmp_path / "studies")
    return result, tmp_path / "studies" / "small"


VARIANTS = [
    {"name": "LoRA"},
    {"name": "merged", "merged_from": "LoRA"},
    {"name": "full", "set": {"peft": None, "training.learning_rate": 1e-4}},
]


def test_variants_are_run_measured_and_kept(run_cli, study, tmp_path):
    file = study(variants=VARIANTS, seeds=[1, 2], latency=True, baseline="full")
    result, folder = compare(run_cli, tmp_path, file)
    assert result.status == 0, result.out + result.err
    assert "6 of 6: merged, seed 2" in result.out
    assert all(len(line) <= 80 for line in result.out.splitlines() if "/" not in line)
    values = json.loads((folder / "results.json").read_text())
    rows = {row["name"]: row for row in values["variants"]}
    assert list(rows) == ["LoRA", "merged", "full"]
    assert rows["LoRA"]["seeds"] == [1, 2]
    assert rows["LoRA"]["trained"]["value"] < rows["full"]["trained"]["value"] == rows["full"]["total"]["value"]
    assert rows["LoRA"]["size_bytes"]["value"] < rows["full"]["size_bytes"]["value"]
    assert rows["LoRA"]["latency"].keys() == {"result", "merged", "base"}
    assert rows["full"]["latency"].keys() == {"result", "base"}
    assert len(rows["LoRA"]["measures"]["loss"]["seeds"]) == 2
    assert rows["merged"]["measures"]["loss"]["value"] == pytest.approx(
        rows["LoRA"]["measures"]["loss"]["value"], rel=1e-3
    )
    assert "difference" in rows["LoRA"]["measures"]["loss"]
    assert "difference" not in rows["full"]["measures"]["loss"]
    assert rows["LoRA"]["step_seconds"]["value"] > 0
    for name in ("table.md", "plot.svg", "report.html"):
        assert "LoRA" in (folder / name).read_text()
    again, _ = compare(run_cli, tmp_path, file)
    assert again.status == 0
    assert json.loads((folder / "results.json").read_text())["variants"] == values["variants"]  # nothing ran again
    assert len(list((folder / "lora" / "seed-1" / "base").iterdir())) == 1


def test_the_same_seeds_give_the_same_figures(run_cli, study, tmp_path):
    file = study(variants=[{"name": "LoRA"}], seeds=[3])
    _, folder = compare(run_cli, tmp_path, file)
    first = json.loads((folder / "results.json").read_text())["variants"][0]["measures"]
    shutil.rmtree(folder)
    compare(run_cli, tmp_path, file)
    assert json.loads((folder / "results.json").read_text())["variants"][0]["measures"] == first


def test_a_recipe_and_lists_are_a_sweep(run_cli, study, tmp_path):
    study()
    held = {"dataset.eval.source": tmp_path / "held.jsonl", "training.eval_strategy": "epoch"}
    sets = [part for key, value in held.items() for part in ("--set", f"{key}={value}")]
    sweep = ["--set", "training.learning_rate=[1e-4,3e-4]", "--set", "peft.r=[2]", *sets]
    result = run_cli("compare", tmp_path / "base.yaml", *sweep, "--output-dir", tmp_path / "studies")
    assert result.status == 0, result.out + result.err
    assert "learning_rate=0.0001 r=2" in result.out
    assert "learning_rate=0.0003 r=2" in result.out


def test_a_variant_that_fails_is_told_and_the_others_run(run_cli, study, tmp_path):
    variants = [
        {"name": "typo", "set": {"training.learning_rat": 1e-4}},
        {"name": "good"},
        {"name": "good", "set": {"peft.r": 2}},
        {"name": "of nothing", "merged_from": "goood"},
        {"name": "no target", "set": {"peft.target_modules": ["nothing"]}},
        {"name": "full", "set": {"peft": None}},
        {"name": "full merged", "merged_from": "full"},
    ]
    result, folder = compare(run_cli, tmp_path, study(variants=variants))
    assert result.status == 1
    told = result.out + result.err
    assert "error[variant-name-twice] variants.2: another variant has the name 'good', too" in told
    assert "error[unknown-variant] variants.3.merged_from: there is no variant 'goood'; did you mean 'good'?" in told
    assert "error[unknown-key] training.learning_rat: unknown key; did you mean 'learning_rate'?" in told
    assert "error[target-not-found]" in told
    assert "error[no-adapter]" in told
    assert "Traceback" not in told
    rows = json.loads((folder / "results.json").read_text())["variants"]
    assert {row["name"] for row in rows if row["measures"]} == {"good", "full"}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"varriants": []}, "error[unknown-key] varriants: unknown key; did you mean 'variants'?"),
        ({"seeds": ["one"]}, "error[wrong-type] seeds.0"),
        (
            {"baseline": "LoRa", "variants": VARIANTS},
            "error[unknown-variant] there is no variant 'LoRa'; did you mean 'LoRA'?",
        ),
        ({"evaluate": {"data": "nothing.jsonl"}}, "error[data-not-found]"),
        (
            {"evaluate": {"data": "held.jsonl", "scorers": ["exact"]}},
            "error[unknown-scorer] evaluate.scorers: there is no scorer 'exact'; did you mean 'exact_match'?",
        ),
        ({"recipe": "nothing.yaml"}, "does not exist"),
        ({"variants": [{"set": {}}]}, "error[missing-key]"),
    ],
    ids=str,
)
def test_a_study_that_can_not_be_read_is_one_line(run_cli, study, tmp_path, keys, said):
    result, _ = compare(run_cli, tmp_path, study(**keys))
    assert result.status == 1
    assert said in result.out + result.err, result.out + result.err
    assert "Traceback" not in result.err


def test_a_study_of_a_billion_variants_is_refused_at_once(run_cli, study, tmp_path):
    result, _ = compare(run_cli, tmp_path, study(vary={f"peft.key{n}": list(range(10)) for n in range(9)}))
    assert result.status == 1
    assert "error[study-too-large] 1,000,000,000 variants; at most 1,000" in result.err


def test_shipped_studies_are_valid():
    from conftest import ROOT

    from recipe_runner.studies.study import read_study

    for file in (ROOT / "studies").glob("*.yaml"):
        study = read_study(str(file), ())
        assert study.name == file.stem
        assert not study.refused
        for variant in study.variants:
            if not variant.merged_from:
                variant.load(study.seeds[0], file.parent)
