"""Data that is streamed: read while it is trained on, by one reader a process, and gone on with where a run stopped."""

import json
import shutil

import pytest
from shared import LORA, SAMPLES, break_off, losses, status, write_rows

ROWS = [{"instruction": f"say the number {n}", "output": f"it is the number {n}"} for n in range(2000)]
STREAMED = {"format": "instruction", "streaming": True}


def read(prepared, count=1, number=0, rows=2000, position=None, skip=0):
    """Rows that a reader gives, as the trainer takes them."""
    from itertools import islice

    from recipe_runner.data.marks import mark_sources
    from recipe_runner.data.stream import Position, Reader, stream

    marked = len(prepared.job.sources) > 1
    head = prepared.train
    features = (mark_sources(head.dataset, head.order) if marked else head.dataset).features
    readers = [
        Reader(prepared.job, n, count, prepared.known, marked, position or Position(), skip) for n in range(count)
    ]
    if count > 1:
        return list(islice(stream(readers, features).shard(count, number), rows))
    return list(islice(stream(readers, features), rows))


@pytest.fixture
def prepared(small_recipe):
    """Everything but the weights of a small recipe."""
    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training.prepare import prepare

    def made(rows=ROWS, dataset=None, **options):
        training = {"use_cpu": True} | options.pop("training", {})
        file = small_recipe(rows=rows, dataset=STREAMED | (dataset or {}), training=training, peft=LORA, **options)
        return prepare(load_recipe(str(file)), None)

    return made


def test_each_row_is_read_once_in_a_pass_as_it_is_without_streaming(prepared):
    streamed = read(prepared())
    whole = prepared(dataset={"streaming": False}).train.dataset
    assert sorted(map(str, streamed)) != list(map(str, streamed))
    of = lambda rows: sorted((row["input_ids"], row["labels"]) for row in rows)  # noqa: E731
    assert of(streamed) == of(whole)


def test_rows_are_mixed_by_the_seed_and_come_again_when_all_were_read(prepared):
    made = prepared()
    first, again = read(made, rows=4000), read(made, rows=4000)
    assert first == again
    assert sorted(row["input_ids"] for row in first[:2000]) == sorted(row["input_ids"] for row in first[2000:])
    assert first[:1000] != first[2000:3000]
    assert read(prepared(run={"seed": 7}), rows=1000) != first[:1000]


def test_readers_share_the_rows(prepared):
    made = prepared()
    parts = [read(made, count=2, number=n, rows=1000) for n in range(2)]
    ids = [{tuple(row["input_ids"]) for row in part} for part in parts]
    assert len(ids[0]) == len(ids[1]) == 1000
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("given", [0, 7, 1000, 1234, 1999, 3100])
def test_a_reader_goes_on_where_one_was(prepared, given):
    from itertools import islice

    from recipe_runner.data.stream import Position, Reader

    made = prepared()
    reader = Reader(made.job, 0, 1, made.known, False, Position(), 0)
    rows = iter(reader)
    deque = list(islice(rows, given + 1))
    position, skip = reader.find(given)
    kept = json.loads(json.dumps({"position": position.as_json(), "skip": skip}))
    again = Reader(made.job, 0, 1, made.known, False, Position.from_json(kept["position"]), kept["skip"])
    assert list(islice(again, 3)) == [deque[-1], *islice(rows, 2)]


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(run_recipe, tmp_path, packing):
    training = {"max_steps": 6, "save_steps": 2, "packing": packing, "max_length": 64, "gradient_accumulation_steps": 2}
    sections = {"rows": ROWS, "dataset": STREAMED, "peft": LORA | {"lora_dropout": 0.1}, "training": training}
    result, whole = run_recipe(**sections)
    assert result.status == 0, result.err
    assert "streamed; the first 1,000 rows" in result.out
    assert "1,000 rows read: 1,000 kept, 0 dropped" in result.out
    expected = losses(whole)
    broken = break_off(whole, 3)
    result, folder = run_recipe("--resume", "auto", **sections)
    assert result.status == 0, result.err
    assert folder == broken
    assert losses(broken) == expected


@pytest.mark.parametrize("stage", ["pretrain", "dpo", "kto", "reward"])
def test_stages_that_take_rows_as_they_come(run_recipe, stage):
    rows = SAMPLES[stage][1] * 3
    result, folder = run_recipe(stage=stage, rows=rows, dataset={"streaming": True}, peft=LORA)
    assert result.status == 0, result.err
    assert status(folder)["status"] == "completed"


def test_a_mixture_is_drawn_by_its_weights(prepared, tmp_path):
    for name, count in (("a", 3000), ("b", 40)):
        write_rows(tmp_path / f"{name}.jsonl", [{"instruction": f"{name} {n}", "output": name} for n in range(count)])
    sources = [{"source": "a.jsonl", "weight": 3}, {"source": "b.jsonl", "weight": 1}]
    made = prepared(rows=None, dataset={"train": sources})
    rows = read(made, rows=2000)
    marks = [row["sources"] for row in rows]
    assert marks.count([1]) == 500
    assert len({tuple(row["input_ids"]) for row, mark in zip(rows, marks, strict=True) if mark == [1]}) == 40
    assert len({tuple(row["input_ids"]) for row, mark in zip(rows, marks, strict=True) if mark == [0]}) == 1500


@pytest.mark.parametrize("form", ["parquet", "csv", "gz", "arrow"])
def test_files_are_streamed(prepared, tmp_path, form):
    from datasets import Dataset

    rows = Dataset.from_list(ROWS)
    name = {"gz": "rows.jsonl.gz", "arrow": "saved"}.get(form, f"rows.{form}")
    if form == "parquet":
        rows.to_parquet(tmp_path / name)
    elif form == "csv":
        rows.to_csv(tmp_path / name)
    elif form == "arrow":
        rows.save_to_disk(tmp_path / name)
    else:
        rows.to_json(tmp_path / name, compression="gzip")
    made = prepared(rows=None, dataset={"train": {"source": f"./{name}"}})
    expected = sorted(row["input_ids"] for row in read(prepared()))
    assert sorted(row["input_ids"] for row in read(made)) == expected


def test_a_row_that_is_wrong_is_named_when_it_comes(run_recipe):
    rows = [*ROWS[:1200], {"instruction": ["no", "text"], "output": "x"}, *ROWS[1200:]]
    training = {"max_steps": 200, "per_device_train_batch_size": 8, "save_steps": 50}
    result, folder = run_recipe(rows=rows, dataset=STREAMED, peft=LORA, training=training)
    assert result.status == 1
    assert "rows.jsonl: row 1201" in result.err
    assert status(folder)["status"] == "failed"
    assert "checkpoint" in status(folder)


def test_too_many_rows_that_are_no_use_end_the_run(run_recipe):
    rows = [*ROWS[:1000], *({"instruction": "x", "output": ""} for _ in range(1000))]
    training = {"max_steps": 200, "per_device_train_batch_size": 8}
    result, _ = run_recipe(rows=rows, dataset=STREAMED, peft=LORA, training=training)
    assert result.status == 1
    assert "error[too-many-dropped] dataset.max_dropped: 1,000 of 2,000 train rows up to here" in result.err


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["training.max_steps=-1"], "training.max_steps"),
        (["dataset.eval={fraction: 0.1}"], "dataset.eval.fraction"),
        (["training.train_sampling_strategy=group_by_length"], "training.train_sampling_strategy"),
        (["dataset.train.limit=10"], "dataset.train.limit"),
        (["dataset.train.epochs=2"], "dataset.train.epochs"),
        (["dataset.train.split='train[:5%]'"], "dataset.train.split"),
        (["training.dataloader_num_workers=2"], "training.dataloader_num_workers"),
    ],
)
def test_what_needs_all_rows_is_refused_by_name(run_cli, small_recipe, changes, key):
    file = small_recipe(rows=ROWS[:10], dataset=STREAMED, peft=LORA)
    result = run_cli("validate", file, *(part for change in changes for part in ("--set", change)))
    assert result.status == 1
    assert f"error[streaming] {key}:" in result.out


def test_a_stage_that_asks_for_prompts_by_number_is_refused(run_cli, small_recipe):
    rewards = [{"name": "repetition_penalty", "ngram_size": 1}]
    result = run_cli("validate", small_recipe(stage="grpo", dataset={"streaming": True}, peft=LORA, rewards=rewards))
    assert "error[streaming] dataset.streaming: the stage grpo asks for its prompts by number" in result.out


def test_data_that_changed_is_not_gone_on_with(run_recipe, tmp_path):
    training = {"max_steps": 4, "save_steps": 2}
    sections = {"dataset": STREAMED, "peft": LORA, "training": training}
    _, folder = run_recipe(rows=ROWS, **sections)
    shutil.rmtree(folder / "adapter")
    (folder / "status.json").write_text('{"status": "failed"}')
    result, _ = run_recipe("--resume", "auto", rows=[*ROWS, ROWS[0]], **sections)
    assert "error[data-changed]" in result.err


@pytest.mark.parametrize(
    ("late", "said"),
    [
        ({"input": "three"}, "row 1201 has a column 'input', which none of the first rows has: it would be lost"),
        ({"tools": [{"name": "look"}]}, "row 1201 has a column 'tools'"),
        ({"images": ["map.png"]}, "row 1201 has a column 'images'"),
        ("question", "row 1201 has no column 'instruction'; its columns: question, output"),
    ],
)
def test_a_column_that_comes_late_is_named_with_its_row(run_recipe, late, said):
    rows = [dict(row) for row in ROWS]
    if late == "question":
        rows[1200] = {"question": "what?", "output": "this"}
    else:
        rows[1200] |= late
    training = {"max_steps": 500, "per_device_train_batch_size": 8, "save_strategy": "no"}
    result, folder = run_recipe(rows=rows, dataset=STREAMED, training=training, peft=LORA)
    assert result.status == 1
    assert said in result.err
    assert status(folder)["status"] == "failed"


def test_a_column_that_comes_late_may_be_left_out_knowingly(prepared):
    rows = [*ROWS[:1200], *({**row, "score": 3, "tools": "none"} for row in ROWS[1200:])]
    assert len(read(prepared(rows=rows, dataset={"ignore": ["tools"]}))) == 2000


def test_a_reader_that_has_rows_of_no_use_alone_says_so(prepared):
    rows = [{**row, "output": "" if number % 2 else row["output"]} for number, row in enumerate(ROWS)]
    made = prepared(rows=rows, dataset={"max_dropped": 1.0})
    assert len(read(made, count=2, number=0, rows=10)) == 10
    with pytest.raises(
        Exception, match=r"no row of the train data can be used for reader 2 of 2: .* with an empty output"
    ):
        read(made, count=2, number=1, rows=10)


def test_a_line_that_is_broken_late_is_named(run_recipe, small_recipe, tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    lines[1500] = lines[1500][:20]
    small_recipe(rows=ROWS)
    training = {"max_steps": 500, "per_device_train_batch_size": 8, "save_strategy": "no"}
    (tmp_path / "broken.jsonl").write_text("\n".join(lines) + "\n")
    dataset = STREAMED | {"train": {"source": "broken.jsonl"}}
    result, _ = run_recipe(rows=ROWS, dataset=dataset, training=training, peft=LORA)
    assert result.status == 1
    assert "broken.jsonl: line 1501, column" in result.err
