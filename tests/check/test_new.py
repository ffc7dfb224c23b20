"""`recipe-run new`: whatever is chosen, the recipe is valid, and ready to run."""

import io
import json

import pytest
import yaml
from shared import write_rows

from recipe_runner.recipe.library import shipped_recipes
from recipe_runner.recipe.resolve import load_recipe


@pytest.fixture
def data(tmp_path):
    rows = {"instruction": "a", "input": "", "output": "b", "text": "c", "chosen": "d", "rejected": "e"}
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
    result = CliRunner().invoke(cli, ["new", "mine.yaml"], input="c/d\na/b\ntext\nlora\n")
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


NAMES = [
    *("123", "null", "true", "no", "1e3", "0x1f", "2024-01-01", "1.5", "a-b.c", "x" * 100, "Yes", "a.yaml", "0o7"),
    *("x: y", "a b", "a#b", "größe", ".hidden", "-x", "a'b", 'a"b', "[x]", "x" * 101, "a\nb", "a\\b", "{}", "&a"),
]
FOLDERS = [
    "plain",
    "with space",
    "a: b",
    "#x",
    "größe",
    "null",
    "[x]",
    "it's",
    'say "x"',
    "*a",
    "&a",
    "{x}",
    "a\tb",
    "😀",
]
FILES = [
    "123",
    "x: y",
    "null",
    "a b",
    "#x",
    "[x]",
    "größe",
    "it's",
    'q"q',
    "&a",
    "*a",
    "!a",
    "a,b",
    "{x}",
    "%x",
    "@x",
    "`x",
    "😀",
]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_under_any_name_is_valid(run_cli, tmp_path, data, name):
    file = tmp_path / f"{name}.yaml"
    options = ["--format", "chat", "--method", "lora", "--model", "a/b", "--data", "my rows.jsonl"]
    for how in (options, ["--from", "phi3_chat_qlora"]):
        result = run_cli("new", file, *how)
        if result.status:
            assert (result.status, file.exists()) == (2, False)
            assert "a recipe is named as its file: letters, digits" in result.err
            assert name not in NAMES[:13]
            continue
        assert load_recipe(str(file)).name == name
        assert run_cli("validate", "--strict", file).status == 0
        file.unlink()


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_for_any_data_and_model_is_valid(run_cli, tmp_path, name):
    column = name.replace("\t", "")
    write_rows(tmp_path / f"{name}.jsonl", [{"prompt": "a", column: "b"}] * 60)
    folder = tmp_path / "models" / FOLDERS[FILES.index(name) % len(FOLDERS)]
    folder.mkdir(parents=True)
    file = tmp_path / "mine.yaml"
    options = ["--format", "instruction", "--method", "qlora", "--model", f"models/{folder.name}"]
    result = run_cli("new", file, *options, "--data", f"{name}.jsonl", "--column", f"output={column}")
    assert result.status == 0, result.err
    recipe = load_recipe(str(file))
    assert recipe.dataset.train[0].source == str(tmp_path / f"{name}.jsonl")
    assert recipe.dataset.train[0].columns == {"instruction": "prompt", "output": column}
    assert recipe.model.name_or_path == str(folder)
    assert run_cli("validate", "--strict", file).status == 0


@pytest.mark.parametrize(
    ("row", "form", "columns"),
    [
        (
            {"question": "a", "answer": "b", "context": "c"},
            "instruction",
            "instruction: question, output: answer, input: context",
        ),
        ({"Question": "a", "Response": "b"}, "instruction", "instruction: Question, output: Response"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "chat", "messages: conversations"),
        ({"id": 1, "document": "a"}, "text", "text: document"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "preference",
            "chosen: chosen, rejected: rejected, prompt: prompt",
        ),
        (
            {"query": "a", "response": "b", "label": True},
            "unpaired_preference",
            "completion: response, label: label, prompt: query",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_layout_and_columns_are_those_of_the_data(monkeypatch, tmp_path, row, form, columns, suffix):
    import csv
    import json

    from click.testing import CliRunner

    from recipe_runner.cli import cli

    if suffix == "csv" and form == "chat":
        return  # a csv file has no lists
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        with file.open("w", newline="") as stream:
            table = csv.DictWriter(stream, row)
            table.writeheader()
            table.writerows([row] * 59)
    elif suffix == "json":
        file.write_text(json.dumps([row] * 59))
    else:
        write_rows(file, [row] * 59)
    arguments = ["new", "mine.yaml", "--model", "a/b", "--method", "lora", "--data", file.name]
    result = CliRunner().invoke(cli, arguments, input="\n")
    assert result.exit_code == 0, result.output
    assert f"[{form}]" in result.output  # what is proposed
    assert f"    columns: {{{columns}}}" in (tmp_path / "mine.yaml").read_text()
    assert "# 59 rows" in (tmp_path / "mine.yaml").read_text()


def test_data_without_a_column_for_a_role_is_refused_and_nothing_is_written(run_cli, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"a": "x", "text": "y"}])
    options = ["--model", "a/b", "--method", "lora", "--data", "rows.jsonl", "--format", "instruction"]
    result = run_cli("new", tmp_path / "mine.yaml", *options)
    assert result.status == 1
    assert (
        "no column of the data is known for 'instruction', 'output' of format instruction; its columns: a, text"
        in result.err
    )
    assert "--column instruction=NAME; or take --format text" in result.err
    assert not (tmp_path / "mine.yaml").exists()
    missing = run_cli("new", tmp_path / "mine.yaml", *options[:5], "nowhere.jsonl", "--format", "text")
    assert (missing.status, "there is no file" in missing.err) == (1, True)
    assert not (tmp_path / "mine.yaml").exists()


def test_few_rows_are_evaluated_within_their_steps(run_cli, tmp_path):
    """59 rows in batches of 16 are 4 steps: an evaluation every 100 would never come."""
    options = ["--model", "a/b", "--method", "lora", "--format", "text"]
    for count, epochs in ((59, 3), (3000, 1), (500_000, 1)):
        write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * count)
        file = tmp_path / f"of_{count}.yaml"
        assert run_cli("new", file, *options, "--data", "rows.jsonl").status == 0
        training = load_recipe(str(file)).training
        batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
        steps = count * training["num_train_epochs"] / batch
        every = training["eval_steps"] * (steps if training["eval_steps"] < 1 else 1)
        assert training["num_train_epochs"] == epochs
        assert 1 <= every <= steps / 2
        assert training["eval_steps"] == training["save_steps"]


def test_paths_are_seen_from_the_recipe(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "model").mkdir()
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 60)
    options = ["--model", "model", "--method", "lora", "--format", "text", "--data", "rows.jsonl"]
    assert run_cli("new", "mine/x.yaml", *options).status == 0
    recipe = load_recipe("mine/x.yaml")
    assert recipe.dataset.train[0].source == str(tmp_path / "rows.jsonl")
    assert recipe.model.name_or_path == str(tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "mine" / "x.yaml").read_text()


@pytest.mark.parametrize("data", ["parts/", "parts/*.jsonl", "./parts/a.jsonl"])
def test_folders_and_patterns_are_seen_from_the_recipe(run_cli, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "parts", "mine/parts"):
        (tmp_path / folder).mkdir()
    write_rows(tmp_path / "parts" / "a.jsonl", [{"text": "a"}] * 60)
    write_rows(tmp_path / "mine" / "parts" / "a.jsonl", [{"text": "another"}] * 7)  # beside the recipe: not meant
    options = ["--model", "a/b", "--method", "lora", "--format", "text", "--data", data]
    assert run_cli("new", "mine/x.yaml", *options).status == 0
    written = yaml.safe_load((tmp_path / "mine" / "x.yaml").read_text())
    assert written["dataset"]["train"]["source"] == f"../{data.removeprefix('./')}"
    assert "# 60 rows" in (tmp_path / "mine" / "x.yaml").read_text()


@pytest.mark.parametrize(
    ("data", "said"), [("no.csv", "there is no file"), ("no/", "there is no folder"), ("no/*.jsonl", "no file matches")]
)
def test_data_that_is_not_there_is_named_as_it_was_looked_for(run_cli, tmp_path, monkeypatch, data, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    result = run_cli("new", "mine/x.yaml", "--model", "a/b", "--method", "lora", "--format", "text", "--data", data)
    assert result.status == 1
    assert f"{said} {tmp_path}/{data.rstrip('/')}; --data is a path from the current folder" in result.err
    assert not (tmp_path / "mine" / "x.yaml").exists()


def test_rows_are_no_longer_than_the_model_can_see(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"max_position_embeddings": 384}))
    write_rows(tmp_path / "rows.jsonl", [{"text": "word " * 2000}] * 3)
    options = ["--model", "model", "--method", "lora", "--format", "text", "--data", "rows.jsonl"]
    assert run_cli("new", "mine.yaml", *options).status == 0
    assert load_recipe("mine.yaml").training["max_length"] == 384


def test_columns_that_a_run_would_refuse_are_named_to_be_ignored(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"text": "word", "weight": 2, "images": [], "label": 3, "id": 1}] * 3)
    options = ["--model", "a/b", "--method", "lora", "--format", "text", "--data", "rows.jsonl"]
    assert run_cli("new", "mine.yaml", *options).status == 0
    assert list(load_recipe("mine.yaml").dataset.ignore) == ["weight"]


def test_editors_find_the_schema_from_anywhere(run_cli, tmp_path):
    for how in (
        ["--from", "phi3_chat_qlora"],
        ["--model", "a/b", "--method", "lora", "--format", "text", "--data", "c/d"],
    ):
        file = tmp_path / f"x{len(how)}.yaml"
        assert run_cli("new", file, *how).status == 0
        line = file.read_text().splitlines()[0]
        assert line.startswith("# yaml-language-server: $schema=https://")
        assert line.endswith("/schema/recipe.bundle.schema.json")


def test_what_a_copy_would_not_heed_is_refused(run_cli, tmp_path):
    file = tmp_path / "mine.yaml"
    result = run_cli("new", file, "--from", "phi3_chat_qlora", "--data", "rows.jsonl", "--method", "full")
    assert result.status == 2
    assert "leave out --method, --data, or --from" in result.err
    assert not file.exists()


@pytest.mark.parametrize("content", [b"1\n2\n", b"null\n", b'{"messages": []}\n3\n', b"\xff\xfe1", b'{"a": 1'])
def test_rows_that_cannot_be_read_are_said(run_cli, tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    options = ["--model", "a/b", "--format", "chat", "--method", "lora", "--data", "rows.jsonl"]
    result = run_cli("new", tmp_path / "mine.yaml", *options)
    assert result.status == 0, result.err
    assert "the rows of rows.jsonl could not be read, so its columns are not known" in result.err


@pytest.mark.parametrize(
    ("row", "form", "columns"),
    [
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": "c",
            },
            "preference",
            {"chosen": "chosen", "rejected": "rejected", "prompt": "conversations"},
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "tools": '[{"name": "count"}]'},
            "chat",
            {"messages": "messages", "tools": "tools"},
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "kto_tag": True},
            "unpaired_preference",
            {"completion": "messages", "label": "kto_tag"},
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "functions": [{"name": "count"}]},
            "chat",
            {"messages": "messages", "tools": "functions"},
        ),
    ],
)
def test_what_nobody_answers_is_taken_from_the_data(run_cli, tmp_path, monkeypatch, row, form, columns):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    result = run_cli("new", "mine.yaml", "--data", "rows.jsonl")
    assert result.status == 0, result.err
    assert "[microsoft/Phi-3-mini-4k-instruct]: microsoft/Phi-3-mini-4k-instruct" in result.out
    written = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert written["dataset"]["format"] == form
    assert written["dataset"]["train"]["columns"] == columns
    alone = run_cli("new", "other.yaml")
    assert alone.status == 2
    assert "there is nobody to ask: give --data, or --from" in alone.err


def test_what_datasets_saved_is_looked_into_and_nothing_is_written_of_no_rows(run_cli, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list([{"question": "a", "answer": "b"}] * 7)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        result = run_cli(
            "new",
            f"{name}.yaml",
            "--data",
            f"./{name}",
            "--model",
            "a/b",
            "--method",
            "lora",
            "--format",
            "instruction",
        )
        assert result.status == 0, result.err
        written = (tmp_path / f"{name}.yaml").read_text()
        assert "columns: {instruction: question, output: answer}" in written
        assert "# 7 rows" in written
    (tmp_path / "rows.csv").write_text("instruction,output\n")
    empty = run_cli("new", "empty.yaml", "--data", "rows.csv", "--model", "a/b", "--method", "lora", "--format", "text")
    assert (empty.status, "error[empty-dataset]" in empty.err) == (1, True)
    assert not (tmp_path / "empty.yaml").exists()


def test_of_one_row_none_is_held_out(run_cli, tmp_path):
    """It can't be on both sides: a run would refuse it."""
    options = ["--model", "a/b", "--method", "lora", "--format", "text", "--data", "rows.jsonl"]
    for count in (1, 2):
        write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * count)
        file = tmp_path / f"of_{count}.yaml"
        assert run_cli("new", file, *options).status == 0
        recipe = load_recipe(str(file))
        assert recipe.dataset.has_eval == (count > 1)
        assert recipe.training["eval_strategy"] == ("steps" if count > 1 else "no")
        assert run_cli("validate", "--strict", file).status == 0


@pytest.mark.parametrize("as_json", [True, False])
def test_declared_tools_and_calls_count_for_the_length(run_cli, tmp_path, as_json):
    words = {name: {"type": "string", "description": "a word"} for name in (f"word{n}" for n in range(20))}
    tools = [{"type": "function", "function": {"name": "say", "parameters": {"type": "object", "properties": words}}}]
    call = {"type": "function", "function": {"name": "say", "arguments": dict.fromkeys(words, "a")}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    write_rows(tmp_path / "rows.jsonl", [{"messages": turns, "tools": json.dumps(tools) if as_json else tools}] * 3)
    options = ["--model", "a/b", "--method", "lora", "--format", "chat", "--data", "rows.jsonl"]
    assert run_cli("new", tmp_path / "mine.yaml", *options).status == 0
    characters = len(json.dumps(tools)) + len(json.dumps(call))
    assert load_recipe(str(tmp_path / "mine.yaml")).training["max_length"] == 1024 > characters / 3 > 300


def test_a_stage_that_several_share_a_layout_with_is_the_one_that_was_asked_for(run_cli, tmp_path):
    pairs = [{"prompt": f"q {n}", "chosen": f"a {n}", "rejected": "b"} for n in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for stage in ("dpo", "kto", "reward"):
        file = tmp_path / f"{stage}_made.yaml"
        options = ("--stage", stage, "--format", "preference", "--method", "lora", "--model", "a/b")
        made = run_cli("new", file, *options, "--data", tmp_path / "pairs.jsonl")
        assert made.status == 0, made.err
        shown = run_cli("show", file).out
        assert f"stage: {stage}\n" in shown
        assert "format: preference\n" in shown
    refused = run_cli("new", tmp_path / "tried.yaml", "--stage", "grpo", "--data", tmp_path / "pairs.jsonl")
    assert refused.status == 1
    assert "error[not-composed]" in refused.err
    assert "--from phi3_grpo_qlora" in refused.err
