"""`recipe-run new`: whatever is chosen, the recipe is valid, and ready to run."""

import pytest
from shared import write_rows

from recipe_runner.recipe.library import shipped_recipes
from recipe_runner.recipe.resolve import load_recipe


@pytest.fixture
def data(tmp_path):
    rows = {"instruction": "a", "input": "", "output": "b", "text": "c"}
    rows["messages"] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "my rows.jsonl"
    write_rows(file, [rows] * 60)
    return file


@pytest.mark.parametrize("form", ["instruction", "chat", "text", "preference"])
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_every_choice_gives_a_recipe_without_a_problem(run_cli, tmp_path, data, form, method):
    file = tmp_path / "mine.yaml"
    options = ["--format", form, "--method", method, "--model", "a/b", "--data", "my rows.jsonl"]
    result = run_cli("new", file, *options)
    assert (result.status, result.err) == (0, "")
    values = load_recipe(str(file)).values
    assert values["dataset"]["train"]["source"] == str(data)
    assert values["stage"] == {"preference": "dpo", "text": "pretrain"}.get(form, "sft")
    assert bool(values.get("quantization")) == (method == "qlora")
    assert bool(values.get("peft")) == (method != "full")
    assert run_cli("validate", "--strict", file).status == 0


@pytest.mark.parametrize("source", [file.stem for file in shipped_recipes()])
def test_a_copy_of_a_shipped_recipe_is_the_same_recipe_by_another_name(run_cli, tmp_path, source):
    file = tmp_path / "mine.yaml"
    assert run_cli("new", file, "--from", source).status == 0
    copy, shipped = (dict(load_recipe(str(recipe)).values) for recipe in (file, source))
    assert copy.pop("name") == "mine"
    shipped.pop("name")
    assert copy == shipped
    assert "#" in file.read_text()


def test_answers_are_asked_for(monkeypatch, tmp_path):
    from click.testing import CliRunner

    from recipe_runner.cli import cli

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["new", "mine.yaml"], input="a/b\ntext\nlora\nc/d\n")
    assert result.exit_code == 0, result.output
    values = load_recipe("mine.yaml").values
    assert (values["model"]["name_or_path"], values["dataset"]["format"]) == ("a/b", "text")


def test_nothing_is_overwritten(run_cli, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("precious")
    result = run_cli("new", file, "--from", "phi3_chat_qlora")
    assert result.status == 1
    assert "error[file-exists]" in result.err
    assert file.read_text() == "precious"
    assert run_cli("new", tmp_path / "mine", "--from", "phi3_chat_qlora").status == 2


def test_stage_and_layout_belong_together(run_cli, tmp_path):
    options = ["--model", "a/b", "--method", "lora", "--data", "c/d"]
    assert run_cli("new", tmp_path / "pairs.yaml", "--stage", "dpo", *options).status == 0
    assert load_recipe(str(tmp_path / "pairs.yaml")).values["dataset"]["format"] == "preference"
    refused = run_cli("new", tmp_path / "odd.yaml", "--stage", "dpo", "--format", "chat", *options)
    assert (refused.status, "format chat is for stage sft" in refused.err) == (2, True)
