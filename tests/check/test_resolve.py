from pathlib import Path

import pytest

from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.document import dump_values, parse_document
from recipe_runner.recipe.resolve import load_recipe


def test_defaults_of_our_sections_are_filled_in(write_recipe):
    recipe = load_recipe(str(write_recipe()))
    assert recipe.values["dataset"]["train_on"] == "completion"
    assert recipe.values["dataset"]["train"]["split"] == "train"
    assert recipe.values["model"]["use_safetensors"] is True
    assert recipe.values["run"]["seed"] == 42


def test_extends_merges_mappings_and_replaces_lists(write_recipe, tmp_path):
    lists = {"method": "lora", "r": 4, "target_modules": ["a", "b"]}
    write_recipe("base", peft=lists)
    child = tmp_path / "child.yaml"
    child.write_text(
        "schema_version: 1\nname: child\nextends: base.yaml\npeft: {target_modules: [c]}\nrun: {seed: 7}\n"
    )
    values = load_recipe(str(child)).values
    assert values["peft"] == {"method": "lora", "r": 4, "target_modules": ["c"]}
    assert values["run"]["seed"] == 7
    assert values["name"] == "child"
    assert "extends" not in values


def test_an_error_inherited_from_the_base_names_the_base(write_recipe, tmp_path, run_cli):
    base = write_recipe("base", training={"learning_rat": 1})
    child = tmp_path / "child.yaml"
    child.write_text("schema_version: 1\nname: child\nextends: base.yaml\n")
    assert f"{base}:" in run_cli("validate", child).out


def test_extends_takes_a_shipped_recipe_by_name_and_keeps_its_paths(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("schema_version: 1\nname: child\nextends: smollm2_tickets_lora\ntraining: {max_steps: 1}\n")
    source = Path(load_recipe(str(child)).values["dataset"]["train"]["source"])
    assert source.is_absolute()
    assert source.is_file()


def test_paths_are_relative_to_the_recipe(write_recipe, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    file = write_recipe(dataset={"train": {"source": "rows.jsonl"}}, model={"name_or_path": "./model"})
    monkeypatch.chdir("/")
    values = load_recipe(str(file)).values
    assert values["dataset"]["train"]["source"] == str(tmp_path / "rows.jsonl")
    assert values["model"]["name_or_path"] == str(tmp_path / "model")


def test_a_path_given_by_set_is_relative_to_the_current_folder(write_recipe, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    (folder / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(folder)
    recipe = load_recipe(str(write_recipe()), ["model.name_or_path=models/mine"])
    assert recipe.values["model"]["name_or_path"] == str(folder / "models" / "mine")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("training.learning_rate=2e-4", ("training", "learning_rate"), 2e-4),
        ("training.lr_scheduler_type=cosine", ("training", "lr_scheduler_type"), "cosine"),
        ("training.max_length=null", ("training", "max_length"), None),
        ("peft={method: lora, target_modules: [a, b]}", ("peft", "target_modules"), ["a", "b"]),
        ("dataset.eval.fraction=0.5", ("dataset", "eval", "fraction"), 0.5),
    ],
)
def test_set_reads_values_by_the_rules_of_the_file(write_recipe, override, path, value):
    overrides = [override, "training.eval_strategy=steps"] if "eval" in override else [override]
    found = load_recipe(str(write_recipe()), overrides).values
    for part in path:
        found = found[part]
    assert found == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "--set training.learning_rat=1: error[unknown-key] training.learning_rat"),
        ("training.learning_rate=-1", "--set training.learning_rate=-1: error[out-of-bounds]"),
        ("nonsense", "--set nonsense: error[bad-override]"),
        ("dataset.train.3.source=x", "error["),
        ("name.deeper.x=1", "error[bad-override]"),
        ("training.max_steps=[1", "error[yaml-syntax]"),
    ],
)
def test_a_wrong_override_is_an_error_at_the_override(write_recipe, override, message):
    with pytest.raises(UserError) as caught:
        load_recipe(str(write_recipe()), [override])
    assert message in str(caught.value)


def test_show_prints_what_reads_back_the_same(run_cli, write_recipe):
    values = load_recipe(str(write_recipe(training={"learning_rate": 2e-4}))).values
    assert parse_document(dump_values(dict(values)), "f").values == values
    shown = run_cli("show", "phi3_chat_qlora", "--set", "training.learning_rate=3e-5")
    assert shown.status == 0
    assert parse_document(shown.out, "f").values["training"]["learning_rate"] == 3e-5


def test_words_that_yaml_1_1_reads_otherwise_survive_show(write_recipe):
    recipe = load_recipe(str(write_recipe(description="no", metadata={"tags": ["1e5", "0o7", "null", "12:30"]})))
    assert parse_document(dump_values(dict(recipe.values)), "f").values == recipe.values


def test_null_takes_out_what_a_base_has(write_recipe):
    recipe = load_recipe(
        "phi3_chat_qlora", ["dataset.eval=null", "training.eval_strategy=no", "training.eval_steps=null"]
    )
    assert "eval" not in recipe.values["dataset"]


def test_a_source_replaces_the_whole_source_of_the_base(tmp_path):
    child = tmp_path / "child.yaml"
    (tmp_path / "rows.jsonl").write_text("{}")
    child.write_text(
        "schema_version: 1\nname: child\nextends: phi3_chat_qlora\n"
        "dataset: {train: {source: rows.jsonl}, eval: {source: a/b}}\n"
    )
    dataset = load_recipe(str(child)).values["dataset"]
    assert dataset["train"] == {"source": str(tmp_path / "rows.jsonl"), "split": "train"}
    assert dataset["eval"] == {"source": "a/b", "split": "train"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("extends=phi3_chat_qlora", "error[bad-override]"),
        ("training.max_steps=1\nfoo: 2", "error[bad-override] more than one value"),
        ("training.max_steps=[1", "--set training.max_steps=[1: error[yaml-syntax]"),
        (
            "dataset.train.0.source=a/b",
            "--set dataset.train.0.source=a/b: error[unknown-key] dataset.train.0: unknown key",
        ),
    ],
)
def test_an_override_that_would_be_lost_is_refused(override, message):
    with pytest.raises(UserError) as caught:
        load_recipe("phi3_chat_qlora", [override])
    assert message in str(caught.value)


def test_an_item_of_a_list_can_be_overridden(write_recipe):
    file = write_recipe(dataset={"train": [{"source": "a/b"}, {"source": "c/d"}]})
    recipe = load_recipe(str(file), ["dataset.train.1.source=e/f"])
    assert [source["source"] for source in recipe.values["dataset"]["train"]] == ["a/b", "e/f"]
    with pytest.raises(UserError) as caught:
        load_recipe(str(file), ["dataset.train.1.limit=0"])
    assert str(caught.value).startswith("--set dataset.train.1.limit=0: error[out-of-bounds] dataset.train.1.limit")


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b", "a\tb", "a\nb\n", " a ", "", "{a}", "# a", "é😀"])
def test_every_text_survives_show(text):
    assert parse_document(dump_values({"k": text}), "f").values == {"k": text}


def test_a_misspelt_extends_is_an_error_and_not_a_bug(run_cli, tmp_path):
    (tmp_path / "mine.yaml").write_text("schema_version: 1\nname: mine\nextend: phi3_chat_qlora\n")
    result = run_cli("validate", tmp_path / "mine.yaml")
    assert result.status == 1
    assert "mine.yaml:3:1: error[unknown-key] extend: unknown key; did you mean 'extends'?" in result.out


@pytest.mark.parametrize("line", ['extends: "x\\0"', 'name: "x\\0"', '"key\\0": 1'])
def test_a_nul_character_is_an_error_at_its_place(run_cli, tmp_path, line):
    (tmp_path / "mine.yaml").write_text(f"schema_version: 1\n{line}\n")
    result = run_cli("validate", tmp_path / "mine.yaml")
    assert result.status == 1
    assert "mine.yaml:2:" in result.out
    assert "error[yaml-syntax]" in result.out
    assert "NUL character" in result.out


def test_a_long_chain_of_recipes_is_refused(run_cli, tmp_path):
    for number in range(1200):
        (tmp_path / f"c{number}.yaml").write_text(
            f"schema_version: 1\nname: c{number}\nextends: ./c{number + 1}.yaml\n"
        )
    result = run_cli("validate", tmp_path / "c0.yaml")
    assert result.status == 1
    assert "error[extends-cycle] extends: ./c51.yaml is the end of a chain of more than 50 recipes" in result.out


def test_sources_of_evaluation_data_in_a_list_have_defaults(write_recipe):
    dataset = {"eval": [{"source": "someone/a"}, {"source": "someone/b", "split": "test"}]}
    recipe = load_recipe(str(write_recipe(dataset=dataset, training={"eval_strategy": "steps"})))
    assert [source.split for source in recipe.dataset.eval] == ["train", "test"]


def test_an_index_that_is_no_ascii_number_is_an_unknown_key(run_cli, write_recipe):
    recipe = write_recipe(dataset={"train": [{"source": "someone/a"}]})
    result = run_cli("validate", recipe, "--set", "dataset.train.\u00b2.split=test")
    assert result.status == 1
    assert "error[bad-override]" in result.out


def test_the_trouble_of_one_file_never_hides_that_of_another(run_cli, tmp_path, monkeypatch, write_recipe):
    from recipe_runner.recipe import resolve

    for name in ("a", "b", "c"):
        write_recipe(name, folder=tmp_path, typo=1)
    examine = resolve.examine_recipe

    def broken(file, overrides):
        if file.stem == "b":
            raise KeyError("stage")
        return examine(file, overrides)

    monkeypatch.setattr(resolve, "examine_recipe", broken)
    result = run_cli("validate", *(tmp_path / f"{name}.yaml" for name in "abc"))
    assert result.status == 3
    assert result.out.count("error[unknown-key] typo") == 2
    assert "error[bug] KeyError" in result.err


def test_new_without_anybody_to_ask_is_a_wrong_command_line(run_cli, tmp_path, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    result = run_cli("new", tmp_path / "mine.yaml")
    assert result.status == 2
    assert "there is nobody to ask: give --data, or --from" in result.err
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize(("name", "stages"), [("outer", "[inner.yaml]"), ("outer", "[plain.yaml, inner.yaml]")])
def test_a_stage_that_is_a_pipeline_by_what_it_extends_is_refused(run_cli, write_recipe, tmp_path, name, stages):
    write_recipe("plain")
    (tmp_path / "base.yaml").write_text("schema_version: 1\nname: base\nstage: pipeline\nstages: [plain.yaml]\n")
    (tmp_path / "inner.yaml").write_text("name: inner\nextends: base.yaml\n")
    (tmp_path / f"{name}.yaml").write_text(f"schema_version: 1\nname: {name}\nstage: pipeline\nstages: {stages}\n")
    result = run_cli("validate", tmp_path / f"{name}.yaml")
    assert result.status == 1, result.err
    assert "error[nested-pipeline]" in result.out
    assert "inner.yaml is a pipeline" in result.out


def test_a_pipeline_whose_stage_extends_it_is_refused(run_cli, tmp_path):
    (tmp_path / "p.yaml").write_text("schema_version: 1\nname: p\nstage: pipeline\nstages: [s.yaml]\n")
    (tmp_path / "s.yaml").write_text("name: s\nextends: p.yaml\n")
    for name in ("p", "s"):
        result = run_cli("validate", tmp_path / f"{name}.yaml")
        assert (result.status, "error[nested-pipeline] stages.0: s.yaml is" in result.out) == (1, True), result.err


def test_bytes_of_the_command_line_that_are_no_text_are_refused(run_cli, write_recipe):
    result = run_cli("validate", write_recipe("plain"), "--set", "model.name_or_path=\udcff")
    assert result.status == 1, result.err
    assert "error[wrong-encoding] the text is not UTF-8" in result.out
