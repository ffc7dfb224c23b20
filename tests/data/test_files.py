"""Kinds of local files: compressed, by columns, several, saved by datasets; and what is said of bad ones."""

import gzip
import json

import pytest
from shared import write_rows

ROWS = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(10)]


@pytest.fixture
def load(write_recipe, tmp_path):
    """The answers of a source, and what was guessed of how it is written."""
    from recipe_runner.data.order import arrange_rows
    from recipe_runner.data.sources import open_sources, read_rows
    from recipe_runner.recipe.resolve import load_recipe

    def load(name, **source):
        train = {"source": name, **source}
        recipe = load_recipe(str(write_recipe(dataset={"format": "instruction", "train": train})))
        with recipe.placing_errors():
            (opened,) = sources = open_sources(recipe.dataset)
            order = arrange_rows(recipe.dataset, sources, 42)["train"]
            rows = read_rows(recipe.dataset, sources, order)
        return [row["completion"][0]["content"] for row in rows], opened.guessed

    return load


@pytest.fixture
def refused(load):
    """What is said of a source that can't be read."""
    from recipe_runner.problems.errors import UserError

    def refused(name, **source):
        with pytest.raises(UserError) as caught:
            load(name, **source)
        (problem,) = caught.value.problems
        return f"{problem.code} {'.'.join(map(str, problem.path))}: {problem.message}; {problem.suggestion}"

    return refused


WANTED = [row["output"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_columns(file, delimiter=",", encoding="utf-8", word="answer"):
    lines = ["instruction", "output"], *([f"question {n}", f"{word} {n}"] for n in range(10))
    file.write_bytes("".join(delimiter.join(line) + "\n" for line in lines).encode(encoding))


def test_compressed_files_are_read_as_they_are(load, refused, tmp_path):
    import zstandard

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(LINES.encode()))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps({"rows": ROWS}).encode()))
    write_columns(tmp_path / "d.csv", ";")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress((tmp_path / "d.csv").read_bytes()))
    pack = zstandard.ZstdCompressor().compress
    packed, half = pack(LINES.encode()), LINES.index("\n", len(LINES) // 2) + 1
    (tmp_path / "two.jsonl.zst").write_bytes(pack(LINES[:half].encode()) + pack(LINES[half:].encode()))
    assert load("two.jsonl.zst") == load("b.jsonl.zst")
    for name, content, said in (
        ("cut", packed[: len(packed) // 2], "is cut off: "),
        ("plain", LINES.encode(), "can't be unpacked: it is no file of zstandard's, or broken: "),
    ):
        (tmp_path / f"{name}.jsonl.zst").write_bytes(content)
        assert said in refused(f"{name}.jsonl.zst")
    assert load("a.jsonl.gz") == load("b.jsonl.zst") == load("c.json.gz", field="rows") == (WANTED, "")
    assert load("d.csv.gz") == (WANTED, "columns between semicolons")


@pytest.mark.parametrize("split", ["train", "train[:50%]"])
def test_what_datasets_saved_is_read(load, refused, tmp_path, split):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(tmp_path / "two")
    count = len(WANTED) if split == "train" else 5
    assert load("one", split=split)[0] == load("two", split=split)[0] == WANTED[:count]
    assert load("two", split="test")[0] == WANTED[:2]
    assert "test" in refused("one", split="test")
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    assert load(f"one/{arrow.name}")[0] == WANTED


def test_a_file_of_what_datasets_saved_is_missing_or_cut_off(refused, tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"instruction": "q" * 100, "output": f"answer {n}"} for n in range(3000)])
    for number, harm in enumerate(("missing", "cut off", "cut off", "cut off")):
        folder = tmp_path / f"of_{number}"
        saved = DatasetDict({"train": rows}) if number % 2 else rows
        saved.save_to_disk(folder, **({"num_shards": 3} if number % 2 == 0 else {"num_shards": {"train": 3}}))
        shard = sorted(folder.rglob("*.arrow"))[number % 3]
        content = shard.read_bytes()
        shard.unlink()
        if number:
            shard.write_bytes(content[: (0, len(content) // 2, 0, len(content) - 8)[number]])
        said = refused(f"of_{number}")
        assert said.startswith("unreadable-data dataset.train.source: ")
        assert f"{shard} is {harm}" in said
    (tmp_path / "of_0" / "state.json").write_text("{}")
    assert "of_0/state.json is not as datasets writes it" in refused("of_0")


def test_several_files_are_a_pattern_or_a_folder_that_is_named_as_one(load, refused, tmp_path):
    (tmp_path / "many").mkdir()
    for part in ("a", "b"):
        write_rows(tmp_path / "many" / f"{part}.jsonl", ROWS)
    (tmp_path / "many" / "README.md").write_text("of two files")
    assert load("many/*.jsonl")[0] == load("many/")[0] == load("many/?.jsonl")[0] == WANTED * 2
    assert "many is a folder, not a file; name a file in it (" in refused("many")
    assert "many/ for all of them" in refused("many")
    assert "no file matches" in refused("many/c*.jsonl")
    (tmp_path / "many" / "._a.jsonl").write_bytes(b"\x00\x05")  # as macOS leaves them
    assert load("many/")[0] == WANTED * 2
    (tmp_path / "many" / "below").mkdir()
    write_rows(tmp_path / "many" / "below" / "c.jsonl", ROWS)
    assert "many has data in folders below it, too: below/c.jsonl; name all, or those meant: " in refused("many/")
    assert load("many/**/*.jsonl")[0] == WANTED * 3
    (tmp_path / "many" / "below" / "c.jsonl").unlink()
    write_columns(tmp_path / "many" / "c.csv")
    assert "has files of several kinds: .csv, .jsonl" in refused("many/")


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding", "guessed"),
    [
        ("a.csv", ",", "utf-8", ""),
        ("a.csv", ";", "utf-8", "columns between semicolons"),
        ("a.csv", "\t", "utf-8-sig", "columns between tabs"),
        ("a.csv", "|", "cp1252", "encoding cp1252 and columns between bars"),
        ("a.tsv", "\t", "utf-8", ""),
        ("a.tsv", ",", "utf-16", "encoding utf-16 and columns between commas"),
    ],
)
def test_the_writing_of_columns_is_guessed_and_said(load, tmp_path, name, delimiter, encoding, guessed):
    write_columns(tmp_path / name, delimiter, encoding, "antwört")
    wanted = [f"antwört {n}" for n in range(10)]
    assert load(name) == (wanted, guessed)
    assert load(name, delimiter=delimiter, encoding=encoding) == (wanted, "")


def test_what_was_guessed_is_told(run_recipe, tmp_path):
    write_columns(tmp_path / "a.csv", ";", "cp1252", "antwört")
    shown, _ = run_recipe(command="preview", dataset={"format": "instruction", "train": {"source": "a.csv"}})
    assert shown.status == 0, shown.err
    assert "a.csv: encoding cp1252 and columns between semicolons (guessed)" in shown.out


def test_columns_that_are_read_wrongly_are_said(refused, tmp_path):
    write_columns(tmp_path / "a.csv", ";")
    found = refused("a.csv", delimiter=",")
    assert found.startswith("unreadable-data dataset.train.delimiter: ")
    assert "a.csv has one column, read with the delimiter ','" in found
    assert 'set delimiter: ";", which gives instruction, output' in found
    write_columns(tmp_path / "b.csv", encoding="cp1252", word="antwört")
    assert "line 2: byte 0xf6 is not UTF-8; set encoding in the source to what it is" in refused(
        "b.csv", encoding="utf-8"
    )
    assert "there is no encoding 'klingon'; set encoding to a name" in refused("b.csv", encoding="klingon")
    (tmp_path / "c.csv").write_bytes(b"instruction,output\n" + b"q,a\n" * 20_000 + b"q,antw\xf6rt\n")
    assert "line 20002: byte 0xf6 is not UTF-8 (Latin-1 or cp1252?); set encoding in the source" in refused("c.csv")


@pytest.mark.parametrize(
    ("text", "encoding", "said"),
    [
        (
            '"instruction";"output"\n"q";"a"\n',
            "utf-8-sig",
            "one column, read with the delimiter ','; set delimiter: \";\"",
        ),
        ("instruction|in, short|output\nq|s|a\n", "utf-8", "the columns instruction|in,  short|output, read with"),
        (
            "instruction|in, short|output\nq|s|a\n",
            "utf-8",
            'set delimiter: "|", which gives instruction, in, short, output',
        ),
        ("frage;antwort\nq;a\n", "utf-8", 'set delimiter: ";", which gives frage, antwort'),
        ("instruction:output\nq:a\n", "utf-8", 'set delimiter: ":", which gives instruction, output'),
        ("instruction output\nq a\n", "utf-8", 'set delimiter: " ", which gives instruction, output'),
        ("sep=;\ninstruction;output\nq;a\n", "utf-8", "begins with 'sep=;', a line that only Excel knows; remove the"),
        ("instruction, output\nq, a\n", "utf-8", 'set columns: {output: " output"}'),
        ("frage;;\nq;a;\n", "utf-8", "no column 'instruction' for the role 'instruction'"),
    ],
)
def test_the_delimiter_that_is_named_is_the_one_that_gives_the_columns(refused, tmp_path, text, encoding, said):
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    found = refused("a.csv", delimiter=",", encoding="utf-8")
    assert said in found
    assert "\ufeff" not in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"Hi he said\tA\nrow\tB\nrow 3"\tC\nrow 4\tD\n', "a quote makes one cell of lines 2 to 4, which look like 3"),
        ('q\t"A\nrow\tB\nrow\tC"\n', "lines 2 to 4, which look like 3 rows"),
        ('"Hi" he said\tA\n', "line 2: text follows a closing quote"),
        ('"a\nb"\t"c\nd"\n', ""),
        ('"a "", b""\nb"\t"c\t d\nd"\n', ""),
    ],
)
@pytest.mark.parametrize("mark", ["\t", ","])
def test_quotes_that_change_rows_are_said(write_recipe, tmp_path, text, said, mark):
    from recipe_runner.data.sources import open_sources
    from recipe_runner.recipe.resolve import load_recipe

    (tmp_path / "a.csv").write_text(f"instruction\toutput\n{text}".replace("\t", mark))
    recipe = load_recipe(str(write_recipe(dataset={"format": "instruction", "train": {"source": "a.csv"}})))
    (source,) = open_sources(recipe.dataset)
    assert said in source.doubt
    assert bool(said) == bool(source.doubt)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "is compressed; rename it to a.jsonl.gz"),
        ("a.jsonl.gz", b"{}", "Not a gzipped file (b'{}'); its content is not packed: name it without .gz"),
        ("a.parquet", b"PAR1 and no end", "it is cut off, or no parquet file: get it again"),
        ("a.csv", b'instruction,output\n"a,b\n', "a quote is not closed: double the quotes of texts, or write"),
    ],
)
def test_what_to_do_with_a_file_that_cant_be_read_is_said(refused, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said in refused(name)


def test_addresses_and_folders_that_are_not_there_are_said(refused, tmp_path):
    (tmp_path / ".rows.jsonl").write_text(LINES)
    assert "is an address, from which nothing is read; download it" in refused("https://x.org/rows.jsonl")
    assert f"there is no folder {tmp_path}/rows; name one that is there" in refused("rows/")
    assert refused("rows.jsonl").endswith(f"there is no file {tmp_path}/rows.jsonl; ")


def test_any_character_delimits_and_pandas_says_nothing(load, tmp_path, recwarn):
    write_columns(tmp_path / "a.csv", "¦")
    assert load("a.csv", delimiter="¦")[0] == WANTED
    assert not recwarn.list


def test_rows_are_under_a_key(load, refused, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "rows": ROWS, "more": [1]}))
    assert load("a.json", field="rows")[0] == WANTED
    assert "its rows are the list 'rows'; set field: rows" in refused("a.json")
    assert "has no list 'row'; its lists: rows, more; set field: rows" in refused("a.json", field="row")
    (tmp_path / "c.json").write_text(json.dumps({"rows": {"0": ROWS[0]}}))
    assert "has no list 'rows': it is dict" in refused("c.json", field="rows")
    (tmp_path / "d.json").write_text(json.dumps({"data": {"rows": ROWS}}))
    for options in ({}, {"field": "data"}, {"field": "data.rows"}):
        found = refused("d.json", **options)
        assert "'data.rows'" in found
        assert "`field` reaches one key deep: write the list as a file of its own (jq '.data.rows' " in found
    (tmp_path / "e.json").write_text(json.dumps(ROWS))
    assert "is a list of rows, and no object with a key 'rows'; leave field out" in refused("e.json", field="rows")
    (tmp_path / "f.json").write_text('{"rows": [{"a": }]}')
    assert "f.json: line 1, column 17: Expecting value; fix the file" in refused("f.json", field="rows")
    write_rows(tmp_path / "b.jsonl", ROWS)
    assert "wrong-source dataset.train.field: is for a .json file" in refused("b.jsonl", field="rows")


def test_compressed_files_that_are_damaged_are_said(refused, tmp_path, monkeypatch):
    packed = gzip.compress("".join(json.dumps({**row, "n": n}) for n in range(5000) for row in ROWS).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    assert "a.jsonl.gz is cut off: " in refused("a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    assert "b.jsonl.gz" in refused("b.jsonl.gz")
    (tmp_path / "c.parquet.gz").write_bytes(b"")
    assert "only texts are read where they are compressed" in refused("c.parquet.gz")


def test_a_file_on_the_hub_is_read_by_its_kind(load, refused, monkeypatch):
    from datasets import Dataset

    from recipe_runner.data import reading

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(reading, "load_dataset", load_dataset)
    assert load("hf://datasets/someone/rows/a.jsonl")[0] == WANTED
    assert asked == [(("json",), {"data_files": ["hf://datasets/someone/rows/a.jsonl"], "split": "train"})]
    assert "is no file of data; name one" in refused("hf://datasets/someone/rows")


def write_parts(folder, suffix, parts):
    from datasets import Dataset

    folder.mkdir()
    for number, rows in enumerate(parts):
        file = folder / f"{number}.{suffix}"
        made = Dataset.from_list(rows)
        write_rows(file, rows) if suffix == "jsonl" else getattr(made, f"to_{suffix}")(file)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_column_that_a_part_lacks_is_empty_there(run_recipe, tmp_path, suffix, first):
    more = [row | {"input": f"look at {n}"} for n, row in enumerate(ROWS)]
    write_parts(tmp_path / "many", suffix, [ROWS, more] if first == 0 else [more, ROWS])
    data = {"format": "instruction", "train": {"source": "many/", "split": "train[:75%]"}}
    shown, _ = run_recipe("-n", "15", command="preview", dataset=data)
    assert shown.status == 0, shown.err
    assert "15 rows: 15 kept" in shown.out
    assert shown.out.count("look at") == (5 if first == 0 else 10)


def test_parts_of_json_are_read_as_one_file(load, refused, tmp_path):
    """Keys of turns that some parts have, calls with other arguments, numbers beside texts."""
    write_parts(tmp_path / "many", "jsonl", [[{"instruction": "q", "output": of}] for of in ("a", 1, 2.5, True, "07")])
    (tmp_path / "many" / "9.jsonl").write_text("")
    assert load("many/")[0] == ["a", "1", "2.5", "true", "07"]
    write_parts(tmp_path / "other", "jsonl", [[ROWS[0]], [{"instruction": "q", "output": {"a": 1}}]])
    assert "row 2: column 'output': expected a text, found dict" in refused("other/")


def test_parts_that_cant_be_one_are_named(refused, tmp_path):
    write_parts(tmp_path / "types", "parquet", [ROWS, [{"instruction": "q", "output": ["a"]}]])
    found = refused("types/")
    assert "the column 'output' of " in found
    assert "types/1.parquet is List(Value('string')), and that of " in found
    write_parts(tmp_path / "names", "csv", [ROWS, [{"question": "q", "output": "a"}]])
    found = refused("names/")
    assert "names/1.csv has no column 'instruction' for the role 'instruction', which other files of " in found
    assert "its columns: question, output" in found


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_turns_of_parts_keep_their_own_keys(tokenizer_of, job_of, tmp_path, suffix):
    from templated import TEMPLATES, prepare

    ask, say = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    calls = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": of}}]}
        for of in ({"x": 1}, {"y": "z"})
    ]
    parts = [[{"messages": [ask, turn]}] for turn in (say, *calls, {**say, "weight": 1})]
    write_parts(tmp_path / "many", suffix, parts)
    tokenizer = tokenizer_of(next(file for file in TEMPLATES if file.stem == "qwen3_training"))
    rows = prepare(job_of("sft", [], tokenizer, {"max_length": None}, format="chat", train={"source": "many/"}))[0]
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    assert ['"arguments": {"x": 1}}' in texts[1], '"arguments": {"y": "z"}}' in texts[2]] == [True, True]
    assert len(rows) == 4


def test_a_guess_of_an_encoding_is_a_warning(run_recipe, tmp_path):
    text = "instruction,output\n" + "".join(f"вопрос {n},ответ {n}\n" for n in range(12))
    (tmp_path / "rows.csv").write_bytes(text.encode("cp1251"))
    for encoding in ({}, {"encoding": "cp1251"}):
        data = {"format": "instruction", "train": {"source": "rows.csv"} | encoding}
        shown, _ = run_recipe(command="preview", dataset=data)
        assert shown.status == 0, shown.err
        assert ("warning[guessed-encoding] dataset.train" in shown.out + shown.err) == (not encoding)
        assert ("вопрос" in shown.out) == bool(encoding)
