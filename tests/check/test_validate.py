"""The example files are the tests: every file in valid/ passes, every one in invalid/ gives what it says at its end."""

import json
import os
import re
from pathlib import Path

import pytest
from conftest import EXAMPLES

from recipe_runner.launch import rules as launch_rules
from recipe_runner.launch.configuration import find_launch, read_launch
from recipe_runner.recipe import rules
from recipe_runner.recipe.library import shipped_recipes
from recipe_runner.recipe.resolve import load_recipe


@pytest.mark.parametrize("file", sorted((EXAMPLES / "valid").glob("*.yaml")) + shipped_recipes(), ids=lambda f: f.stem)
def test_valid_example_passes_without_a_word(run_cli, file):
    result = run_cli("validate", file)
    assert (result.status, result.out) == (0, "1 recipe, 0 errors, 0 warnings\n")


@pytest.mark.parametrize("file", sorted((EXAMPLES / "valid").glob("*.yaml")), ids=lambda f: f.stem)
def test_what_a_run_writes_down_of_a_recipe_is_valid(run_cli, tmp_path, file):
    """All defaults are in it: evaluate, merge, generate and resuming read it."""
    from recipe_runner.recipe.document import dump_values
    from recipe_runner.recipe.resolve import load_recipe

    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_values(dict(load_recipe(str(file)).values)))
    result = run_cli("validate", resolved)
    assert "0 errors" in result.out, result.out


@pytest.mark.parametrize("file", sorted((EXAMPLES / "invalid").glob("*.yaml")), ids=lambda f: f.stem)
def test_invalid_example_gives_exactly_the_problems_it_names(run_cli, file):
    expected = re.findall(rb"# expect: (\S+) (\S+) (.*)", file.read_bytes())
    result = run_cli("validate", file)
    lines = result.out.splitlines()
    assert result.status == 1
    assert len(lines) == len(expected) > 0, result.out
    for line, (place, code, message) in zip(lines, expected, strict=True):
        assert line.startswith(f"{file}:{place.decode()}: error[{code.decode()}] {message.decode()}")


# What is warned of where packages are missing needs the others: `training/test_run.py` looks at it.
WARNED = sorted(file for file in (EXAMPLES / "warned").glob("*.yaml") if file.stem != "missing_packages")


@pytest.mark.parametrize("file", WARNED, ids=lambda f: f.stem)
def test_warned_example_gives_its_warnings_and_fails_only_when_strict(run_cli, file):
    expected = re.findall(r"# expect: (\S+) (\S+) (.*)", file.read_text())
    result = run_cli("validate", file)
    lines = result.out.splitlines()[:-1]
    assert result.status == 0
    assert len(lines) == len(expected) > 0, result.out
    for line, (place, code, message) in zip(lines, expected, strict=True):
        assert line.startswith(f"{file}:{place}: warning[{code}] {message}")
    assert run_cli("validate", "--strict", file).status == 1


def test_all_problems_of_all_files_are_given_at_once_in_order(run_cli):
    result = run_cli("validate", EXAMPLES / "invalid" / "wrong_type.yaml", EXAMPLES / "invalid" / "unknown_key.yaml")
    assert [line.split(": ")[1].split()[0] for line in result.out.splitlines()] == ["error[wrong-type]"] * 3 + [
        "error[unknown-key]"
    ]
    assert "2 recipes, 4 errors" in result.err


def test_json_form_has_the_documented_fields(run_cli):
    result = run_cli("validate", "--format", "json", EXAMPLES / "invalid" / "unknown_key.yaml")
    (problem,) = json.loads(result.out)
    assert problem == {
        "file": str(EXAMPLES / "invalid" / "unknown_key.yaml"),
        "line": 12,
        "column": 3,
        "severity": "error",
        "code": "unknown-key",
        "path": "training.learning_rat",
        "message": "unknown key",
        "suggestion": "did you mean 'learning_rate'?",
    }


def test_name_that_differs_from_the_file_is_a_warning(run_cli, write_recipe):
    file = write_recipe("first")
    other = file.rename(file.with_name("second.yaml"))
    result = run_cli("validate", other)
    assert result.status == 0
    assert f"{other}:3:" in result.out
    assert "warning[name-differs]" in result.out


def test_a_typo_and_a_conflict_are_reported_together(run_cli, write_recipe):
    training = {"learning_rat": 0.1, "eval_strategy": "steps"}
    result = run_cli("validate", write_recipe(training=training))
    assert "unknown-key" in result.out
    assert "eval-without-data" in result.out


def test_misspelt_key_does_not_set_off_rules_about_its_absence(run_cli, write_recipe):
    dataset = {"eval": {"fraction": 0.1}}
    result = run_cli("validate", write_recipe(dataset=dataset, training={"evaluation_strategy": "steps"}))
    assert "renamed-key" in result.out
    assert "eval-data-unused" not in result.out


@pytest.mark.parametrize(
    ("argument", "code"),
    [("nowhere.yaml", "unreadable-file"), ("no_such_recipe", "recipe-not-found"), ("{tmp}", "no-recipes")],
)
def test_what_cannot_be_read_is_one_line_and_status_1(run_cli, tmp_path, argument, code):
    result = run_cli("validate", argument.format(tmp=tmp_path))
    assert result.status == 1
    text = result.out + result.err
    assert f"error[{code}]" in text
    assert "Traceback" not in text


def test_nearest_shipped_data_file_is_suggested(run_cli, write_recipe):
    dataset = {"train": {"source": str(Path("recipes/data/tickets_trian.jsonl").absolute())}}
    result = run_cli("validate", write_recipe(dataset=dataset))
    assert "did you mean 'tickets_train.jsonl'?" in result.out


def rule_codes():
    recipe = load_recipe("phi3_chat_qlora")
    launch = read_launch(find_launch("ddp"))
    return {code for code, _ in [*rules.apply_rules(recipe), *launch_rules.apply_rules(launch, recipe)]}


def test_every_code_is_documented_and_every_documented_code_exists():
    root = Path(__file__).resolve().parent.parent.parent
    source = "\n".join(file.read_text() for file in (root / "recipe_runner").rglob("*.py"))
    source += (root / "schema" / "recipe.schema.json").read_text()
    rows = re.findall(r"^\| `(\S+)` \| (.+) \| (.+) \|$", (root / "docs" / "errors.md").read_text(), flags=re.MULTILINE)
    documented = {code for code, meaning, fix in rows if len(meaning) > 10 and len(fix) > 5} - {"bug"}
    raised = set(re.findall(r'(?:error|problem|Problem|fail)\(\s*"([a-z]+(?:-[a-z0-9]+)+)"', source))
    raised |= rule_codes() | set(re.findall(r'"x-code": "([a-z-]+)"', source))
    assert len(raised) > 50
    assert raised <= documented
    assert all(f'"{code}"' in source for code in documented)
    assert len(rows) == len({code for code, *_ in rows})
    warnings = {code for code, meaning, _ in rows if meaning.startswith("warning: ")}
    others = {"name-differs", "special-tokens-in-data", "many-truncated", "large-adapter", "default-launch-config"}
    others |= {"half-precision-weights", "segments-without-end"}
    others |= {"template-changes-text", "report-not-written", "no-golden-answers"}
    others |= {"special-tokens-in-prompt", "rows-left-out", "prompt-differs", "prompt-text-cut"}
    others |= {
        "empty-thinking-learned",
        "undeclared-calls",
        "text-beside-call-lost",
        "calls-spelt-otherwise",
        "csv-quotes",
    }
    others |= {"unbalanced-labels", "guessed-encoding", "tools-listed-twice", "flat-reward"}
    assert warnings == rules.WARNINGS | launch_rules.WARNINGS | others


ODD = [
    "training.learning_rate: 2e-4",
    "trainning:",
    "quantisation: true",
    "runs: null",
    "model: {a.b: 1}",
    "model: a/b",
    "peft: lora",
    "peft: []",
    "dataset: 3",
    "dataset: {format: instruction, train: []}",
    "dataset: {format: instruction, train: {source: a/b}, eval: 3}",
    "dataset: {format: instruction, train: {source: ~nobody/x.jsonl}}",
    "training: [1]",
    "training: {chat_template_path: null, eos_token: null}",
    "training: {load_best_model_at_end: true, eval_strategy: steps, logging_steps: 0}",
    "training: {<<: *x}",
    "name: [1]",
    "run: {output_dir: '~nobody/x'}",
    "model: {name_or_path: '~nobody/x'}",
    "model: {name_or_path: '" + "x" * 300 + "'}",
    'model: {name_or_path: "a\\0b"}',
    "extends: nosuch",
    "extends: 3",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_recipes_are_no_bugs(run_cli, tmp_path, text):
    base = "schema_version: 1\nname: t\nstage: sft\nmodel: {name_or_path: a/b}\n"
    base += "dataset: {format: instruction, train: {source: a/b}}\n"
    key = text.split(":")[0]
    kept = "".join(line + "\n" for line in base.splitlines() if not line.startswith(f"{key}:"))
    (tmp_path / "t.yaml").write_text(kept + text + "\n")
    result = run_cli("validate", tmp_path / "t.yaml")
    assert result.status in (0, 1), result.err
    assert all(line.startswith(str(tmp_path)) for line in result.out.splitlines() if "error[" in line)


def test_mutated_recipes_are_no_bugs(tmp_path):
    """Keys are renamed, moved and removed, values swapped, 1,000 times by a seed: an answer each time."""
    import copy
    import random

    import yaml

    from recipe_runner.recipe.resolve import examine_recipe

    chance = random.Random(0)
    shipped = [yaml.safe_load(file.read_text()) for file in shipped_recipes()]
    values = [None, True, 0, -1, 1.5, "", "x", "a.b", [], [None], {}, {"a": 1}, "9" * 400, "\u2028", "~", "../x.csv"]
    file = tmp_path / "t.yaml"
    answers = {True: 0, False: 0}
    for _ in range(1000):
        recipe = copy.deepcopy(chance.choice(shipped))
        for _ in range(chance.randint(1, 3)):
            section = recipe
            while isinstance(section, dict) and section:
                key = chance.choice(list(section))
                if not isinstance(section[key], dict) or chance.random() < 0.3:
                    change = chance.randrange(4)
                    if change == 0:
                        section[key + chance.choice("sx._-")] = section.pop(key)
                    elif change == 1:
                        del section[key]
                    elif change == 2:
                        section[key] = chance.choice(values)
                    else:
                        recipe[chance.choice(list(recipe))] = section[key]
                    break
                section = section[key]
        file.write_text(json.dumps(recipe))
        found, problems = examine_recipe(file)
        assert (found is None) == any(problem.severity == "error" for problem in problems)
        assert all(str(problem) and problem.as_json() for problem in problems)
        answers[found is None] += 1
    assert answers[True] > 500


def test_one_argument_that_is_not_there_does_not_hide_the_others(run_cli):
    result = run_cli("validate", "--format", "json", EXAMPLES / "invalid" / "unknown_key.yaml", "nosuch")
    assert [problem["code"] for problem in json.loads(result.out)] == ["unknown-key", "recipe-not-found"]


@pytest.mark.parametrize(
    ("training", "hint"),
    [
        ({"lr": 1}, "did you mean 'learning_rate'?"),
        ({"max_step": 1}, "did you mean 'max_steps'?"),
        ({"batch_size": 1}, "did you mean 'per_device_train_batch_size'?"),
        ({"gradient_acumulation_steps": 1}, "did you mean 'gradient_accumulation_steps'?"),
        ({"r": 8}, "it belongs to 'peft'"),
    ],
)
def test_hints_name_keys_that_may_be_set(run_cli, write_recipe, training, hint):
    assert hint in run_cli("validate", write_recipe(training=training)).out


def test_a_missing_format_is_one_problem(run_cli, write_recipe):
    dataset = {"format": None, "system": "x", "train_on": "completion"}
    assert run_cli("validate", write_recipe(dataset=dataset)).out.count("error[") == 1


@pytest.mark.parametrize(
    "template",
    [
        "Q: {instruction}",
        "{output} {instruction}",
        "{instruction} {context} {output}",
        {"with_input": "{input}{output}", "without_input": "{instruction}{output}"},
    ],
)
def test_templates_that_would_lose_something_are_refused(run_cli, write_recipe, template):
    assert "error[wrong-form]" in run_cli("validate", write_recipe(dataset={"template": template})).out


@pytest.mark.parametrize(
    ("sections", "code"),
    [
        (
            {"quantization": {"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "peft": {"method": "lora"}},
            "error[quantization-width]",
        ),
        ({"dataset": {"train": {"source": "a/b", "sample_by": "line"}}}, "error[wrong-source]"),
        ({"dataset": {"train": {"source": "../x/nosuch"}}}, "error[wrong-source]"),
        ({"dataset": {"train": {"source": "rows.JSONL"}}}, "error[wrong-source]"),
        ({"dataset": {"train": {"source": "a/b", "weight": 1}}}, "error[mixture-weight]"),
        ({"model": {"name_or_path": "./here", "revision": "v1"}}, "error[local-model]"),
        ({"training": {"max_steps": 3, "num_train_epochs": 2}}, "warning[ignored-key] training.num_train_epochs"),
        ({"training": {"packing_strategy": "wrapped"}}, "warning[ignored-key] training.packing_strategy"),
        (
            {"training": {"lr_scheduler_type": "constant", "warmup_steps": 5}},
            "warning[ignored-key] training.warmup_steps",
        ),
        ({"training": {"optim": "sgd", "adam_beta1": 0.8}}, "warning[ignored-key] training.adam_beta1"),
        ({"training": {"optim": "lion_32bit", "adam_epsilon": 1e-6}}, "warning[ignored-key] training.adam_epsilon"),
        (
            {"stage": "dpo", "dataset": {"format": "preference"}, "training": {"label_smoothing": 0.1}},
            "warning[ignored-key] training.label_smoothing",
        ),
        (
            {"stage": "dpo", "dataset": {"format": "preference"}, "training": {"label_smoothing_factor": 0.2}},
            "warning[ignored-key] training.label_smoothing_factor: has no effect: stage dpo has a loss of its own",
        ),
        ({"training": {"length_column_name": "n"}}, "warning[ignored-key] training.length_column_name"),
        ({"training": {"bf16_full_eval": True}}, "warning[ignored-key] training.bf16_full_eval"),
        ({"training": {"dataloader_prefetch_factor": 2}}, "warning[ignored-key] training.dataloader_prefetch_factor"),
        ({"training": {"optim_target_modules": ["mlp"]}}, "warning[ignored-key] training.optim_target_modules"),
        ({"training": {"metric_for_best_model": "loss"}}, "warning[ignored-key] training.metric_for_best_model"),
        (
            {
                "training": {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 5},
                "dataset": {"eval": {"fraction": 0.2}},
            },
            "warning[never-evaluated] training.eval_steps",
        ),
        ({"training": {"save_only_model": True}}, "error[removed-key]"),
        ({"name": "tiny\n"}, "error[wrong-form]"),
    ],
)
def test_what_would_be_ignored_is_said(run_cli, write_recipe, sections, code):
    name = sections.pop("name", None)
    file = write_recipe(**sections)
    if name:
        file.write_text(file.read_text().replace('"tiny"', json.dumps(name)))
    assert code in run_cli("validate", file).out


def test_a_folder_with_the_name_of_a_hub_id_is_not_taken_for_it(run_cli, write_recipe, tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "someone" / "some-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = {"trust_remote_code": True}
    result = run_cli("validate", write_recipe(model=model))
    assert "error[local-model]" in result.out
    assert "error[remote-code-unpinned]" in result.out


PHI3 = {"name_or_path": "microsoft/Phi-3-mini-4k-instruct"}
NF4 = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
LORA = {"method": "lora", "target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"quantization": NF4, "peft": LORA, "training": {"fp16": True}}, "error[compute-dtype]"),
        ({"model": PHI3, "peft": LORA | {"target_modules": ["q_proj"]}}, "Phi-3 has no 'q_proj'; use 'qkv_proj'"),
        ({"model": PHI3, "training": {"max_length": 8192}}, "warning[context-length] training.max_length"),
        ({"training": {"learning_rate": 0.01}}, "warning[unusual-learning-rate] training.learning_rate"),
        ({"peft": LORA, "training": {"learning_rate": 1e-7}}, "is unusual for an adapter"),
    ],
)
def test_rules_about_precision_models_and_rates(run_cli, write_recipe, sections, message):
    assert message in run_cli("validate", write_recipe(**sections)).out


def test_what_is_usual_is_not_remarked_on(run_cli, write_recipe):
    training = {"learning_rate": 2e-4, "max_length": 4096, "bf16": True}
    result = run_cli("validate", write_recipe(model=PHI3, quantization=NF4, peft=LORA, training=training))
    assert result.out == "1 recipe, 0 errors, 0 warnings\n"


def test_a_local_model_s_config_says_its_context_and_architecture(run_cli, write_recipe, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "phi3", "max_position_embeddings": 128}))
    sections = {"model": {"name_or_path": str(model)}, "training": {"max_length": 129}}
    peft = {"method": "lora", "target_modules": ["up_proj"]}
    out = run_cli("validate", write_recipe(**sections, peft=peft)).out
    assert "error[fused-projections] peft.target_modules.0: Phi-3 has no 'up_proj'; use 'gate_up_proj'" in out
    assert "warning[context-length] training.max_length: 129 tokens, the model's context is 128" in out
    (model / "config.json").write_text("{broken")  # another check's business, and no reason to fail here
    assert run_cli("validate", write_recipe(**sections)).status == 0


def test_links_to_nothing_and_pipes_in_a_folder_are_reported_not_skipped(run_cli, tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    result = run_cli("validate", tmp_path)
    assert [line.split("error")[1] for line in result.out.splitlines()] == [
        "[unreadable-file] the file is a link that leads to nothing, or to itself; name a recipe file (.yaml)",
        "[unreadable-file] the file is not a regular file; name a recipe file (.yaml)",
    ]
