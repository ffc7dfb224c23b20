"""Loading: file formats, columns, splits, mixtures, and what is said when something is wrong with them."""

import json
from collections import Counter

import pytest
from shared import write_rows

from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.resolve import load_recipe

ROWS = [{"instruction": f"question {n}", "output": f"answer {n}", "note": n} for n in range(10)]


@pytest.fixture
def load(write_recipe, tmp_path):
    from recipe_runner.data.order import arrange_rows
    from recipe_runner.data.sources import open_sources, read_rows

    def load(rows=None, file="rows.jsonl", text=None, stage="sft", **dataset):
        path = tmp_path / file
        path.write_text(text) if text is not None else write_rows(path, rows)
        dataset = {"train": {"source": str(path)}} | dataset
        training = {"eval_strategy": "steps"} if "eval" in dataset else {}
        recipe = load_recipe(str(write_recipe(stage=stage, dataset=dataset, training=training)))
        dataset = recipe.dataset
        with recipe.placing_errors():
            sources = open_sources(dataset)
            orders = arrange_rows(dataset, sources, recipe.run.seed)
            splits = {split: read_rows(dataset, sources, order) for split, order in orders.items()}
        return splits["train"], splits.get("eval")

    return load


def answers(rows):
    return [row["completion"][0]["content"] for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_file_format_gives_the_same_rows(load, tmp_path, kind):
    from datasets import Dataset

    file = tmp_path / f"data.{kind}"
    data = Dataset.from_list(ROWS)
    if kind == "json":
        file.write_text(json.dumps(ROWS))
    else:
        {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](str(file))
    train, evaluation = load(ROWS, train={"source": str(file)})
    assert answers(train) == [f"answer {n}" for n in range(10)]
    assert evaluation is None


@pytest.mark.parametrize(("sample_by", "count"), [("line", 5), ("paragraph", 2), ("document", 1)])
def test_text_files_are_cut_where_the_recipe_says(load, sample_by, count):
    train, _ = load(
        text="a\nb\n\nc\nd\n", file="t.txt", format="text", train={"source": "t.txt", "sample_by": sample_by}
    )
    assert len(train) == count
    assert Counter(row["dropped"] for row in train)["with an empty text"] == (1 if sample_by == "line" else 0)


def test_columns_are_mapped_by_role(load):
    rows = [{"q": "why", "a": "because", "instruction": "wrong", "output": "wrong"}]
    train, _ = load(rows, train={"source": "rows.jsonl", "columns": {"instruction": "q", "output": "a"}})
    assert train[0]["prompt"][0]["content"] == "why"
    assert answers(train) == ["because"]


def test_sharegpt_column_is_found_by_itself(load):
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    train, _ = load(rows, format="chat")
    assert train[0]["messages"][1] == {"role": "assistant", "content": "b"}


def test_held_out_rows_are_the_same_every_time_and_never_trained_on(load):
    first = load(ROWS, eval={"fraction": 0.3})
    second = load(ROWS, eval={"fraction": 0.3})
    assert [answers(rows) for rows in first] == [answers(rows) for rows in second]
    assert len(first[1]) == 3
    assert not set(answers(first[0])) & set(answers(first[1]))


def test_mixture_draws_by_weight_and_loses_no_row(load, tmp_path):
    write_rows(tmp_path / "many.jsonl", [{"instruction": "x", "output": f"m{n}"} for n in range(300)])
    sources = [{"source": "rows.jsonl", "weight": 1}, {"source": "many.jsonl", "weight": 3}]
    train, evaluation = load(ROWS, train=sources, eval={"fraction": 0.2})
    counts = Counter(answer[0] for answer in answers(train))
    assert 2 < counts["m"] / counts["a"] < 4.5
    assert len(set(answers(train))) == 8 + 240
    assert not set(answers(train)) & set(answers(evaluation))


def test_several_sources_without_weights_are_joined(load, tmp_path):
    (tmp_path / "more.jsonl").write_text(json.dumps({"instruction": "x", "output": "extra", "input": "i"}) + "\n")
    train, _ = load(ROWS, train=[{"source": "rows.jsonl"}, {"source": "more.jsonl"}])
    assert answers(train) == [*(f"answer {n}" for n in range(10)), "extra"]


def test_limit_takes_rows_by_the_seed(load):
    train, _ = load(ROWS, train={"source": "rows.jsonl", "limit": 4})
    assert len(set(answers(train))) == 4
    assert answers(train) != [f"answer {n}" for n in range(4)]


def test_hub_datasets_are_asked_for_by_subset_split_and_revision(load, monkeypatch):
    """The hub itself can't be here: what it would be asked for, and what becomes of the answer."""
    from datasets import Dataset

    from recipe_runner.data import reading

    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(reading, "load_dataset", load_dataset)
    train, _ = load(ROWS, train={"source": "a/b", "subset": "en", "split": "train[:5%]", "revision": "abc"})
    assert asked == [(("a/b", "en"), {"split": "train[:5%]", "revision": "abc"})]
    assert len(train) == 10


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            {"rows": [{"instruction": "a", "ouput": "b"}]},
            "missing-column",
            "columns: instruction, ouput; set columns: {output: ouput}",
        ),
        ({"rows": [{"a": 1}], "format": "chat"}, "missing-column", "no column 'messages' for the role 'messages'"),
        (
            {"rows": [{"messages": "x"}], "format": "chat"},
            "wrong-row-shape",
            "rows.jsonl: row 1: expected a list of turns",
        ),
        (
            {"text": '{"instruction": "a", "output": "b"}\n{"instruction": oops}\n'},
            "unreadable-data",
            "rows.jsonl: line 2, column 17: Expecting value",
        ),
        (
            {"text": '{"instruction": "a", "output": "b"}\n{"instruction": "a"\n'},
            "unreadable-data",
            "rows.jsonl: line 2, column 20: Expecting ',' delimiter",
        ),
        (
            {"text": '{"instruction": "a", "output": "b"}\n[1, 2]\n'},
            "unreadable-data",
            "rows.jsonl: line 2 is not a JSON object",
        ),
        (
            {"text": '[{"a": 1},\n {"a": }]', "file": "x.json", "train": {"source": "x.json"}},
            "unreadable-data",
            "x.json: line 2, column 8",
        ),
        ({"text": ""}, "empty-dataset", "rows.jsonl has no rows"),
        ({"text": "\n\n"}, "empty-dataset", "rows.jsonl has no rows"),
        (
            {"text": "not parquet", "file": "x.parquet", "train": {"source": "x.parquet"}},
            "unreadable-data",
            "cannot read",
        ),
        (
            {"rows": ROWS, "train": {"source": "nobody/no-such-dataset"}},
            "dataset-unavailable",
            "cannot load the dataset 'nobody/no-such-dataset'",
        ),
        *(
            ({"text": text, "file": file, "train": {"source": file, **options}}, "empty-dataset", f"{file} has no rows")
            for text, file, options in (
                ("instruction,output\n", "x.csv", {}),
                ("instruction\toutput", "x.tsv", {}),
                ("", "x.csv", {}),
                ("", "x.txt", {}),
                ("[]", "x.json", {}),
                ('{"rows": []}', "x.json", {"field": "rows"}),
            )
        ),
        ({"rows": ROWS[:1], "eval": {"fraction": 0.5}}, "empty-dataset", "none can be held out"),
    ],
)
def test_what_is_wrong_with_the_data_is_one_clear_line(load, arguments, code, message):
    with pytest.raises(UserError) as caught:
        load(**arguments)
    (problem,) = caught.value.problems
    assert problem.code == code
    assert message in str(problem)
    assert problem.mark.line > 0
    assert problem.path[0] == "dataset"


@pytest.mark.parametrize("cell", ["01000", "1.50", "0.50", "NA", "None", "null", "true", "2024-01-01", "1e3", " x "])
def test_cells_of_a_csv_file_are_texts_as_they_are_written(load, cell):
    train, _ = load(text=f'instruction,output\nWhich?,"{cell}"\nAgain?,7\nGap?,\n', file="cells.csv")
    assert answers(train) == [cell, "7", ""]
    assert [row["dropped"] for row in train] == ["", "", "with an empty output"]


def test_labels_of_a_csv_file_are_true_or_false(load):
    text = "prompt,completion,label\nhi,ho,true\nhi,no,False\n"
    train, _ = load(text=text, file="labels.csv", format="unpaired_preference", stage="kto")
    assert [row["label"] for row in train] == [True, False]


@pytest.mark.parametrize("name", ["x[12].jsonl", "a*.jsonl", "what?.jsonl", "a[[]1].jsonl"])
def test_a_file_is_the_one_of_its_name(load, tmp_path, name):
    """`datasets` reads file names as patterns."""
    for other in ("x1.jsonl", "ab.jsonl", "whatx.jsonl", "a[1].jsonl"):
        write_rows(tmp_path / other, [{"instruction": "q", "output": "another file"}])
    train, _ = load([{"instruction": "q", "output": "this file"}], file=name)
    assert answers(train) == ["this file"]


LOST = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("label", True), ("images", ["a.png"])),
        *(("system_prompt", "Be brief."), ("reasoning", "because"), ("weight", 0.5), ("history", [["a", "b"]])),
        *(("Tools", [{"name": "weather"}]), ("sytem", "Be brief."), ("labels", True), ("contexts", "a story")),
        *(("system_message", "Be brief."), ("chat_template_kwargs", {"enable_thinking": False}), ("cot", "because")),
    ],
)
def test_a_column_that_says_something_is_never_left_out_silently(load, column, value):
    rows = [LOST[0] | {column: value}] * 2
    with pytest.raises(UserError) as caught:
        load(rows, format="chat")
    (problem,) = caught.value.problems
    assert problem.code == "unused-column"
    assert f"has a column '{column}', which format chat does not use" in problem.message
    assert f"dataset.ignore: [{column}]" in problem.suggestion
    if column in ("system_prompt", "sytem", "system_message"):
        assert f"columns: {{system: {column}}}" in problem.suggestion
    elif column == "Tools":
        assert problem.suggestion.startswith("set columns: {tools: Tools}, or ")
    elif column == "images":
        assert problem.suggestion.startswith("set dataset.images: marked (or first) to train on them, or ")
    else:
        assert problem.suggestion.startswith("remove it, or ")
    train, _ = load(rows, format="chat", ignore=[column])
    assert len(train) == 2


@pytest.mark.parametrize("extra", [{"tools": "[]"}, {"tools": []}, {"tools": None}, {"label": 3}, {"id": "x"}])
def test_columns_that_say_nothing_are_left_out(load, extra):
    train, _ = load([LOST[0] | extra] * 2, format="chat")
    assert len(train) == 2


def test_a_column_is_left_out_by_null(load):
    rows = [{"instruction": "q", "output": "a", "system": "in version 3", "input": "more"}]
    train, _ = load(rows, train={"source": "rows.jsonl", "columns": {"system": None, "input": None}})
    assert [turn["content"] for turn in train[0]["prompt"]] == ["q"]
    train, _ = load(rows)
    assert [turn["content"] for turn in train[0]["prompt"]] == ["in version 3", "q\n\nmore"]


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        ("a.jsonl", b"null\n" + b'{"instruction": "q", "output": "a"}\n' * 3, "the first row is not a JSON object"),
        ("a.jsonl", b"\n  7\n", "the first row is not a JSON object"),
        ("a.json", b'"text"', "the first row is not a JSON object"),
        ("a.json", b'[null, {"instruction": "q", "output": "a"}]', "the first row is not a JSON object"),
        ("a.json", b'[ [1], {"instruction": "q", "output": "a"}]', "the first row is not a JSON object"),
        (
            "a.jsonl",
            b'{"instruction": "q", "output": "a"}\n{"instruction": "caf\xe9", "output": "a"}\n',
            "line 2: byte 0xe9",
        ),
        ("a.txt", b"caf\xe9\n", "line 1: byte 0xe9 is not UTF-8"),
        ("a.jsonl", '{"instruction": "q", "output": "a"}\n'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
)
def test_files_that_are_no_text_in_utf_8_are_one_clear_line(load, tmp_path, file, data, said):
    (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError) as caught:
        load(train={"source": file}, rows=[], file="other.jsonl", **({"format": "text"} if file == "a.txt" else {}))
    (problem,) = caught.value.problems
    assert problem.code == "unreadable-data"
    assert said in problem.message


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused(load):
    with pytest.raises(UserError, match=r"0\.9 of 3 rows are all of them: none is left to train on"):
        load(ROWS[:3], eval={"fraction": 0.9})


@pytest.mark.parametrize(
    "text", ["instruction,output\nAdd 1,Yes, it is 1\nAdd 2,No\n", "instruction,output\nAdd,Yes, it,is\n"]
)
def test_a_csv_whose_rows_are_wider_than_its_header_is_refused(load, text):
    """pandas takes the first column for an index: every text would be that of the next column."""
    with pytest.raises(UserError) as caught:
        load(text=text, file="a.csv")
    (problem,) = caught.value.problems
    assert problem.code == "unreadable-data"
    assert f"row 1 has {text.splitlines()[1].count(',') + 1} fields, the header has 2" in problem.message


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ([1, 2.5, 3], ["1", "2.5", "3"]),
        ([1.0, 2.5, None], ["1.0", "2.5", ""]),
        (["2024-01-01", "2024-01-02"], ["2024-01-01", "2024-01-02"]),
        (["2024-01-01 10:00:00", "2024-01-02T10:00:00Z"], ["2024-01-01 10:00:00", "2024-01-02T10:00:00Z"]),
        (["10:00:00", "11:00:00"], ["10:00:00", "11:00:00"]),
        ([True, False], ["true", "false"]),
    ],
)
@pytest.mark.parametrize("file", ["rows.jsonl", "rows.json"])
def test_cells_of_json_are_learned_as_they_are_written(load, values, written, file):
    """pyarrow's reader makes dates of texts, and 1.0 of the 1 beside a fraction."""
    rows = [{"instruction": "q", "output": value} for value in values]
    train, _ = load(text=json.dumps(rows) if file.endswith("json") else None, rows=rows, file=file)
    assert answers(train) == written
    half, _ = load(rows, train={"source": "rows.jsonl", "split": "train[50%:]"})
    assert answers(half) == written[round(len(written) / 2) :]


def test_dates_inside_turns_stay_texts(load):
    days = [f"2024-01-0{day}" for day in (1, 2)]
    rows = [{"messages": [{"role": "user", "content": day}, {"role": "assistant", "content": day}]} for day in days]
    train, _ = load(rows, format="chat", train_on="all")
    assert [[turn["content"] for turn in row["messages"]] for row in train] == [[day, day] for day in days]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"instruction": "q", "output": "a", "output": "b"}\n', "line 1: the key 'output' is there twice"),
        ('{"instruction": "q", "output": "\\ud83d"}\n', "line 1: key 'output': half a surrogate pair"),
    ],
)
def test_json_that_means_two_things_or_nothing_is_refused_with_its_line(load, text, said):
    with pytest.raises(UserError) as caught:
        load(text=text)
    assert said in caught.value.problems[0].message


def test_two_roles_never_have_the_same_column(load):
    with pytest.raises(UserError, match="the roles 'instruction' and 'output' have the same column 'output'"):
        load(ROWS, train={"source": "rows.jsonl", "columns": {"instruction": "output"}})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("output", "'output' is used, for the role 'output'"),
        ("nots", "no source has a column or a key of a turn 'nots'"),
    ],
)
def test_what_is_ignored_is_there_and_not_used(load, name, said):
    with pytest.raises(UserError) as caught:
        load(ROWS, ignore=[name])
    (problem,) = caught.value.problems
    assert said in problem.message
    assert problem.path == ("dataset", "ignore", 0)


def test_keys_of_turns_that_nothing_reads_are_listed(write_recipe, tmp_path):
    from recipe_runner.data.sources import open_sources

    turns = [{"role": "user", "content": "q", "id": 3}, {"role": "assistant", "content": "a", "train": True}]
    write_rows(tmp_path / "rows.jsonl", [{"messages": turns, "score": 1}] * 3)
    recipe = load_recipe(str(write_recipe(dataset={"format": "chat", "train": {"source": "rows.jsonl"}})))
    assert open_sources(recipe.dataset)[0].unused == ("score", "messages.id")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"data": [{"instruction": "x", "output": "y"}]}', "its rows are the list 'data'; set field: data"),
        ("a.json", '{"v": 1, "rows": [{"instruction": "x"}]}', "its rows are the list 'rows'; set field: rows"),
        (
            "a.jsonl",
            '{"question": "x", "reply": "y"}\n' * 3,
            "no column 'instruction' for the role 'instruction' and no column 'output' for the role 'output'; its "
            "columns: question, reply; set columns: {instruction: question, output: reply}",
        ),
    ],
)
def test_files_of_another_layout_are_told_from_missing_columns(write_recipe, tmp_path, name, content, said):
    from recipe_runner.data.sources import open_sources

    (tmp_path / name).write_text(content)
    recipe = load_recipe(str(write_recipe(dataset={"train": {"source": name}})))
    with pytest.raises(UserError) as caught:
        open_sources(recipe.dataset)
    assert said in str(caught.value.problems[0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.jsonl.xz", "a.jsonl.xz is compressed; unpack it (unxz), and name what is inside"),
        ("data", "data is a folder, not a file; name a file in it ("),
        ("./data", "data is a folder, not a file; name a file in it ("),
        ("A.JSONL", "A.JSONL has the suffix '.JSONL'; rename it to A.jsonl; "),
    ],
)
def test_files_beside_the_recipe_that_are_not_read_are_told(run_cli, write_recipe, tmp_path, monkeypatch, name, said):
    place, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    for folder in (place, elsewhere, place / "data"):
        folder.mkdir()
    (place / "data" / "rows.jsonl").write_text("{}")
    if not (place / name).exists():
        (place / name).write_text("{}")
    monkeypatch.chdir(elsewhere)
    result = run_cli("validate", write_recipe(folder=place, dataset={"train": {"source": name}}))
    assert (result.status, said in result.out) == (1, True), result.out


def test_a_template_without_system_turns_says_where_to_put_them(write_recipe, tmp_path, run_recipe):
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    )
    (tmp_path / "t.jinja").write_text(template)
    training = {"chat_template_path": str(tmp_path / "t.jinja"), "eos_token": "<|end|>"}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [{"role": "system", "content": "s"}, *turns]}] * 3
    options = {"command": "preview", "training": training}
    told, _ = run_recipe(rows=rows, dataset={"format": "chat"}, **options)
    fix = "roles must alternate; the chat template refuses a system turn: set dataset.merge_system: true"
    fix = f"row 1 can't be rendered: turn 1 (system, 's'): {fix}"
    assert (told.status, fix in told.err) == (1, True), told.err
    told, _ = run_recipe(rows=[{"messages": turns}] * 3, dataset={"format": "chat", "system": "s"}, **options)
    assert fix in told.err


@pytest.mark.parametrize(
    ("good", "weights", "said"),
    [
        (20, {}, ""),
        (30, {}, "warning[unbalanced-labels] training.undesirable_weight: 30 good and 10 bad answers"),
        (30, {"undesirable_weight": 3.0}, ""),
        (30, {"desirable_weight": 0.2}, "warning[unbalanced-labels] training.desirable_weight"),
        (40, {}, "error[labels-equal] dataset.train: all 40 train rows are judged good"),
        (0, {}, "all 40 train rows are judged bad"),
    ],
)
def test_labels_are_counted_and_their_weights_held_against_them(run_recipe, good, weights, said):
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}", "label": n < good} for n in range(40)]
    if good == 20:
        rows = rows[:35]
    shown, _ = run_recipe(command="preview", stage="kto", rows=rows, training=weights)
    counted = {f"{good} rows judged good"} if good else set()
    assert all(count in shown.out for count in counted), shown.out
    told = shown.out + shown.err
    assert said in told
    assert bool(said) == ("[labels-equal]" in told or "[unbalanced-labels]" in told), told
    assert shown.status == (1 if "error" in said or not good else 0)
