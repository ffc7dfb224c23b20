"""Mixtures: weights by rows and by tokens, epochs of a source, and the loss of each source."""

import json
from pathlib import Path

import pytest
from shared import metrics, write_rows

SHORT = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(40)]
LONG = [{"instruction": f"tell me of {n}", "output": f"once there was {n}. " * 6} for n in range(40)]


@pytest.fixture
def mixture(tmp_path, run_recipe):
    """Runs a command on a mixture of short and long rows."""

    def mixture(*arguments, short=None, long=None, command="train", training=None, name="tiny", **dataset):
        train = [
            {"source": write_rows(tmp_path / f"{of}.jsonl", rows).name, **(options or {})}
            for of, rows, options in (("short", SHORT, short), ("long", LONG, long))
        ]
        data = {"format": "instruction", "train": train, **dataset}
        return run_recipe(*arguments, command=command, dataset=data, training=training, name=name)

    return mixture


def shares(result):
    """What `preview` says of the sources: shares of rows and of tokens."""
    (line,) = [line for line in result.out.splitlines() if line.startswith("  sources ")]
    numbers = [int(word.rstrip("%")) for word in line.split() if word.endswith("%")]
    return numbers[0::2], numbers[1::2]


def test_weights_are_shares_of_rows_or_of_tokens(mixture):
    half = {"short": {"weight": 0.5}, "long": {"weight": 0.5}}
    rows, _ = shares(mixture(command="preview", **half)[0])
    assert all(abs(share - 50) < 12 for share in rows)
    rows, tokens = shares(mixture(command="preview", weight_by="tokens", **half)[0])
    assert rows[0] > 60
    assert all(abs(share - 50) < 12 for share in tokens)


def test_a_source_is_taken_as_often_as_it_says(mixture):
    result, _ = mixture(command="preview", short={"epochs": 2.5}, long={"epochs": 0.5})
    assert "120 rows: 120 kept" in result.out
    assert shares(result)[0] == [83, 17]
    assert "60 duplicates" in result.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"short": {"epochs": 2, "weight": 1}, "long": {"weight": 1}},
            "a mixture has weights, or epochs of its sources",
        ),
        ({"weight_by": "tokens"}, "no source has a weight; add 'weight:' to each source"),
        ({"eval": {"source": "long.jsonl", "epochs": 2}}, "evaluation data is taken once"),
        ({"short": {"epochs": 0}}, "dataset.train.0.epochs: expected a number above 0, found 0"),
    ],
)
def test_ways_to_mix_that_contradict_each_other_are_refused(mixture, options, said):
    result, _ = mixture(command="validate", **options)
    assert result.status == 1
    assert said in result.out


@pytest.mark.parametrize(
    "training", [{}, {"packing": True, "max_length": 128}, {"padding_free": True, "max_length": None}]
)
def test_each_source_has_its_loss(mixture, training):
    """Summed up by tokens, they are the loss of all."""
    training = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "eval_strategy": "steps",
    } | training
    training |= {"eval_steps": 1, "eval_packing": False} if "packing" in training else {"eval_steps": 1}
    result, folder = mixture(eval={"fraction": 0.2}, training=training)
    assert result.status == 0, result.err
    entries = [entry for entry in metrics(folder) if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        short, long = entry["loss/short"], entry["loss/long"]
        assert min(short, long) <= entry["loss"] <= max(short, long)
        assert short != long
    held = [entry for entry in metrics(folder) if "eval_loss" in entry]
    assert all({"eval_loss/short", "eval_loss/long"} <= entry.keys() for entry in held)


def test_the_losses_of_sources_are_those_of_their_rows_alone(mixture, tmp_path):
    """The first loss of a mixture, by source, against runs on one source."""
    training = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 80, "learning_rate": 1e-9}
    _, folder = mixture(training=training)
    (together,) = [entry for entry in metrics(folder) if "loss" in entry]
    for name in ("short", "long"):
        _, folder = mixture(training=training, name=name, train={"source": f"{name}.jsonl"})
        (alone,) = [entry for entry in metrics(folder) if "loss" in entry]
        assert together[f"loss/{name}"] == pytest.approx(alone["loss"], rel=1e-4)


def test_the_same_data_has_the_same_name_in_training_and_evaluation(mixture, tmp_path):
    from recipe_runner.data.sources import name_sources
    from recipe_runner.recipe.sections import SourceSection

    names = ["/a/rows.jsonl.gz", "someone/rows", "hf://datasets/x/y/rows.csv", "/a/b/", "someone/rows", "/c/rows.txt"]
    sections = [SourceSection((), name, "train") for name in names]
    assert name_sources(sections) == ["rows", "rows#2", "rows#3", "b", "rows#2", "rows#4"]
    (tmp_path / "other").mkdir()
    write_rows(tmp_path / "other" / "short.jsonl", SHORT[:4])
    evaluation = [{"source": "short.jsonl", "limit": 4}, {"source": "./other/short.jsonl"}]
    training = {"max_steps": 1, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    result, folder = mixture(eval=evaluation, training=training)
    assert result.status == 0, result.err
    found = {key for entry in metrics(folder) for key in entry if "loss/" in key}
    assert {key for key in found if key.startswith("eval_")} == {"eval_loss/short", "eval_loss/short#2"}
    assert found <= {"loss/short", "loss/long", "eval_loss/short", "eval_loss/short#2"}
    assert "other/short.jsonl (loss/short#2)" in result.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"short": {"epochs": 0.01}, "long": {"epochs": 1}}, "0.01 epochs of 40 rows are none; take more, or leave"),
        (
            {"short": {"weight": 1e-6}, "long": {"weight": 1e6}},
            "rows are drawn until each of 80 was seen; take weights",
        ),
    ],
)
def test_a_mixture_of_which_nothing_or_nearly_all_is_one_source_is_refused(mixture, options, said):
    result, _ = mixture(command="preview", **options)
    assert result.status == 1
    assert "error[mixture-weight] dataset.train" in result.err
    assert said in result.err


@pytest.mark.parametrize("weights", [{}, {"weight": 1}])
def test_a_source_of_which_nothing_is_left_is_refused(mixture, tmp_path, weights):
    """Also where it is less than `max_dropped` of all rows."""
    write_rows(tmp_path / "gone.jsonl", [{"instruction": f"say {n}", "output": ""} for n in range(3)])
    train = [{"source": f"{name}.jsonl"} | weights for name in ("short", "long", "gone")]
    more = {"weight_by": "tokens"} if weights else {}
    result, _ = mixture(command="preview", train=train, **more)
    assert result.status == 1
    assert "error[empty-dataset] dataset.train.2.source: no row of the train data of " in result.err
    assert "gone.jsonl can be used: 3 with an empty output; fix its rows, or leave the source out" in result.err


@pytest.mark.parametrize("train_on", ["assistant", "completion", "all"])
@pytest.mark.parametrize("streaming", [False, True])
def test_instructions_and_conversations_are_mixed(run_recipe, tmp_path, train_on, streaming):
    """The same rows as turns and as instructions give the same tokens and labels, from a file each."""
    talks = [
        {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
        for row in SHORT
    ]
    sources = [
        {"source": write_rows(tmp_path / "talks.jsonl", talks).name},
        {"source": write_rows(tmp_path / "tasks.jsonl", SHORT).name, "format": "instruction"},
    ]
    more = {"streaming": True} if streaming else {}
    for source in sources if streaming else ():
        source["weight"] = 1
    data = {"format": "chat", "train": sources, "train_on": train_on, **more}
    result, _ = run_recipe(
        "-n", "80", "--rows-only", "--format", "json", command="preview", dataset=data, training={"max_steps": 4}
    )
    assert result.status == 0, result.err
    found = {name: set() for name in ("talks", "tasks")}
    for row in json.loads(result.out):
        found[Path(row["source"]).stem].add((tuple(row["input_ids"]), tuple(row["labels"])))
    assert found["talks"] & found["tasks"]
    assert streaming or found["talks"] == found["tasks"]
    assert all(any(label != -100 for label in labels) for _, labels in found["tasks"])


def test_a_mixture_of_layouts_trains_and_is_evaluated(run_recipe, run_cli, tmp_path):
    talks = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"yes {n}"}]}
        for n in range(9)
    ]
    sources = [
        {"source": write_rows(tmp_path / "talks.jsonl", talks).name},
        {"source": write_rows(tmp_path / "tasks.jsonl", SHORT).name, "format": "instruction"},
    ]
    data = {"format": "chat", "train": sources, "eval": {"fraction": 0.2}}
    training = {"eval_strategy": "steps", "eval_steps": 4, "per_device_train_batch_size": 8}
    result, run = run_recipe(dataset=data, training=training)
    assert result.status == 0, result.err
    assert {"loss/talks", "loss/tasks"} <= {key for line in metrics(run) for key in line}
    assert run_cli("evaluate", str(run), "--limit", "4", "--max-new-tokens", "4").status == 0
