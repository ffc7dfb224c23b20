"""`recipe-run evaluate`: figures that are those of training, told again by other means."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import TICKETS
from learned import ADAPTER, ROWS, SYSTEM, WORDS
from shared import PAIRS, metrics

from recipe_runner.problems.errors import UserError


def evaluate(run_cli, *arguments):
    """The figures and the answers of an evaluation."""
    result = run_cli("evaluate", *arguments, "--format", "json")
    assert result.status == 0, result.err
    folder = Path(re.search(r"^(\S+) is written$", result.err, flags=re.MULTILINE)[1])
    assert json.loads((folder / "results.json").read_text()) == json.loads(result.out)
    return json.loads(result.out), [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def value(figures, column, measure):
    return figures["columns"][column][measure]["value"]


def last(run, measure):
    return [entry[measure] for entry in metrics(run) if measure in entry][-1]


def first(run, measure):
    return next(entry[measure] for entry in metrics(run) if measure in entry)


def test_loss_and_accuracy_are_those_that_the_trainer_measured(run_cli, learned):
    figures, answers = evaluate(run_cli, learned)
    assert value(figures, "tuned", "loss") == pytest.approx(last(learned, "eval_loss"), rel=1e-4)
    assert value(figures, "base", "loss") == pytest.approx(first(learned, "eval_loss"), rel=1e-4)
    accuracy = last(learned, "eval_mean_token_accuracy")
    assert value(figures, "tuned", "token accuracy") == pytest.approx(accuracy, abs=1e-4)
    assert value(figures, "tuned", "perplexity") == pytest.approx(math.exp(value(figures, "tuned", "loss")))
    assert value(figures, "tuned", "exact_match") == 1
    assert value(figures, "base", "exact_match") == 0
    assert figures["difference"]["exact_match"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert value(figures, "tuned", "ended by itself") == 1
    assert [row["wanted"] for row in answers] == [row["output"] for row in ROWS]
    assert [row["columns"]["tuned"]["answer"] for row in answers] == [row["output"] for row in ROWS]
    assert answers[0]["prompt"][0] == {"role": "system", "content": SYSTEM}


def test_the_same_figures_twice(run_cli, learned):
    options = (learned, "--few-shot", "2", "--limit", "3")
    assert evaluate(run_cli, *options) == evaluate(run_cli, *options)


def test_examples_are_in_the_prompt_of_the_base_and_not_in_its_loss(run_cli, learned):
    """The loss of the answers after the examples, computed here token by token."""
    import torch

    from recipe_runner.model.load import load_result

    figures, answers = evaluate(run_cli, learned, "--few-shot", "2")
    shown = figures["few_shot"]
    assert len(shown) == 2
    assert all(example["answer"] in [row["output"] for row in ROWS] for example in shown)
    model, tokenizer = load_result(learned, dtype=torch.float32)
    turns = [{"role": "system", "content": SYSTEM}]
    for example in shown:
        turns += [example["prompt"][-1], {"role": "assistant", "content": example["answer"]}]
    losses, tokens = 0.0, 0
    for row in answers:
        asked = [*turns, row["prompt"][-1]]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer(row["wanted"])["input_ids"], *tokenizer("<|end|>\n<|endoftext|>")["input_ids"]]
        with torch.no_grad(), model.disable_adapter():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        losses -= float(logits[range(len(answer)), answer].sum())
        tokens += len(answer)
    assert value(figures, "base, 2 shown", "loss") == pytest.approx(losses / tokens, rel=1e-4)
    assert value(figures, "base", "loss") != pytest.approx(losses / tokens, rel=1e-4)


@pytest.fixture(scope="session")
def preferred(train):
    """A run of DPO, whose evaluation is of all pairs at once."""
    steps = {"max_steps": 6, "eval_steps": 6, "learning_rate": 0.01, "per_device_eval_batch_size": 12}
    return train("preferred", PAIRS, "preference", None, "dpo", training=steps)


def test_rewards_are_those_that_the_trainer_measured(run_cli, preferred):
    figures, _ = evaluate(run_cli, preferred)
    assert value(figures, "tuned", "reward margin") == pytest.approx(last(preferred, "eval_rewards/margins"), rel=1e-3)
    ranked = last(preferred, "eval_rewards/accuracies")
    assert value(figures, "tuned", "pairs ranked right") == pytest.approx(ranked, abs=1e-6)
    assert "reward margin" not in figures["columns"]["base"]  # it is the reference
    assert "exact_match" not in figures["columns"]["tuned"]


def test_the_reference_of_a_continued_adapter_is_the_one_it_began_with(run_cli, train, preferred):
    steps = {"max_steps": 4, "eval_steps": 4, "learning_rate": 0.01, "per_device_eval_batch_size": 12}
    model = {"adapter": str(preferred)}
    run = train("continued", PAIRS, "preference", None, "dpo", training=steps, model=model)
    figures, _ = evaluate(run_cli, run)
    assert value(figures, "tuned", "reward margin") == pytest.approx(last(run, "eval_rewards/margins"), rel=1e-3)


def test_a_judged_answer_has_its_margin(run_cli, train):
    rows = [
        {"prompt": f"say {n}", "completion": f"it is {n}" if n % 2 else "no", "label": n % 2 == 1} for n in range(12)
    ]
    steps = {"max_steps": 6, "eval_steps": 6, "learning_rate": 0.01, "per_device_eval_batch_size": 12}
    run = train("judged", rows, "unpaired_preference", None, "kto", training=steps)
    figures, _ = evaluate(run_cli, run)
    margin = last(run, "eval_rewards/margins")
    assert value(figures, "tuned", "reward margin") == pytest.approx(margin, rel=1e-3)


def test_a_whole_model_is_compared_with_its_base(run_cli, whole):
    figures, _ = evaluate(run_cli, whole)
    assert value(figures, "tuned", "loss") == pytest.approx(last(whole, "eval_loss"), rel=1e-4)
    assert value(figures, "base", "loss") == pytest.approx(first(whole, "eval_loss"), rel=1e-4)


def test_a_recipe_without_a_run_is_measured_by_its_base(run_cli, small_recipe, tmp_path):
    recipe = small_recipe(rows=ROWS, dataset={"format": "instruction", "eval": {"source": "rows.jsonl"}},
                          training={"eval_strategy": "epoch"})  # fmt: skip
    figures, _ = evaluate(run_cli, recipe, "--output", tmp_path / "figures")
    assert list(figures["columns"]) == ["base"]


@pytest.mark.parametrize("rows", [ROWS, [{"text": f"{word} and more"} for word in WORDS]], ids=["instruction", "text"])
def test_a_plain_model_is_measured_on_data_alone(run_cli, tiny_phi3, tmp_path, rows):
    from shared import write_rows

    data = write_rows(tmp_path / "data.jsonl", rows)
    figures, answers = evaluate(run_cli, tiny_phi3, "--data", data, "--output", tmp_path / "figures")
    assert list(figures["columns"]) == ["base"]
    assert ("exact_match" in figures["columns"]["base"]) == ("output" in rows[0])
    assert len(answers) == 4


def test_sources_of_a_mixture_have_figures_of_their_own(run_cli, train):
    from shared import write_rows

    run = train("mixture", training={"max_steps": 2})
    folder = run.parent.parent.parent
    write_rows(folder / "other.jsonl", ROWS[:1])
    resolved = run / "resolved.yaml"
    values = json.loads(json.dumps(__import__("yaml").safe_load(resolved.read_text())))
    source = values["dataset"]["eval"]
    values["dataset"]["eval"] = [source, source | {"source": str(folder / "other.jsonl")}]
    resolved.write_text(json.dumps(values))
    figures, answers = evaluate(run_cli, run)
    assert {name.rsplit("/", 1)[-1]: of["rows"] for name, of in figures["by_source"].items()} == {
        "rows.jsonl": 4,
        "other.jsonl": 1,
    }
    limited, _ = evaluate(run_cli, run, "--limit", "2")
    assert len(limited["by_source"]) == 2  # rows of both
    other = figures["by_source"][answers[-1]["source"]]
    assert other["columns"]["tuned"]["loss"]["value"] == pytest.approx(answers[-1]["columns"]["tuned"]["loss"])


def test_data_of_ones_own_takes_the_place_of_the_recipes(run_cli, learned, tmp_path):
    from shared import write_rows

    data = write_rows(tmp_path / "mine.jsonl", [{"instruction": "say one", "output": "two it is"}])
    figures, answers = evaluate(run_cli, learned, "--data", data)
    assert (figures["rows"], figures["data"]) == (1, [str(data)])
    assert value(figures, "tuned", "exact_match") == 0
    assert answers[0]["columns"]["tuned"]["answer"] == "one it is"


def test_the_table_fits_a_terminal(run_cli, learned):
    result = run_cli("evaluate", learned, "--few-shot", "2", "--max-new-tokens", "8")
    assert result.status == 0, result.err
    assert max(map(len, result.out.splitlines())) <= 80, result.out
    assert re.search(r"^ +base +base, 2 shown +tuned$", result.out, flags=re.MULTILINE)
    assert re.search(r"^exact_match +0\.000 \[0\.000, 0\.000\] .* 1\.000 \[1\.000, 1\.000\]$", result.out, re.MULTILINE)


SCORES = [
    ("exact_match", " Paris ", "Paris", 1),
    ("exact_match", "paris", "Paris", 0),
    ("normalized_match", "The paris!", "Paris", 1),
    ("normalized_match", "Paris, France", "Paris", 0),
    ("json", '{"a": 1, "b": [true]}', '{"b": [true], "a": 1.0}', 1),
    ("json", '```json\n{"a": 1}\n```', '{"a": 1}', 1),
    ("json", '{"a": true}', '{"a": 1}', 0),
    ("json", "no json", "null", 0),
    ("json:a", '{"a": 1, "b": 2}', '{"a": 1}', 1),
    ("json:a", '{"b": 2}', '{"a": null}', 0),
    ("json:a", "[1]", '{"a": 1}', 0),
    (r"regex:-?\d+", "first 3, then 42.", "so: #### 42", 1),
    (r"regex:(\d+) apples", "7 apples", "7 apples and 8 pears", 1),
    (r"regex:\d+", "none", "none", 0),
    ("rougeL", "the cat sat", "the cat sat", 1),
    ("rouge1", "dogs bark", "cats sleep", 0),
]


@pytest.mark.parametrize(("name", "answer", "wanted", "score"), SCORES)
def test_scorers(name, answer, wanted, score):
    from recipe_runner.model.scorers import build_scorers

    (scorer,) = build_scorers([name], [wanted]).values()
    assert scorer(answer, wanted) == score


def test_json_is_scored_where_all_wanted_answers_are_json():
    from recipe_runner.model.scorers import build_scorers

    assert list(build_scorers([], ['{"a": 1}', "[2]"])) == ["exact_match", "json"]
    assert list(build_scorers([], ['{"a": 1}', "two"])) == ["exact_match"]
    assert list(build_scorers([], [])) == []


@pytest.mark.parametrize("name", ["exact_mach", "regex:(", "json:", "bleu", r"regex:(a+)+$"])
def test_a_scorer_that_cannot_be_used_is_one_line(name, monkeypatch):
    from recipe_runner.model import scorers

    monkeypatch.setattr(scorers, "PATTERN_SECONDS", 0.2)

    def use():
        scorers.build_scorers([name], ["x"])[name]("a" * 40 + "b", "x")

    with pytest.raises(UserError, match="unknown-scorer"):
        use()


def test_intervals_are_those_of_a_bootstrap():
    from recipe_runner.results.statistics import Measure, estimate, resample

    generator = np.random.default_rng(0)
    right = (generator.random(400) < 0.3).astype(float)
    one, loss = np.ones(400), generator.exponential(size=400)
    measures = {"share": Measure(right, one), "same": Measure(one, one), "perplexity": Measure(loss, one, True)}
    drawn = resample(measures, 1)
    share = estimate(*drawn["share"])
    deviation = math.sqrt(share.value * (1 - share.value) / 400)  # of a binomial share
    assert share.value == right.mean()
    assert share.low == pytest.approx(share.value - 1.96 * deviation, abs=0.01)
    assert share.high == pytest.approx(share.value + 1.96 * deviation, abs=0.01)
    same = estimate(*drawn["same"])
    assert (same.value, same.low, same.high) == (1, 1, 1)
    assert drawn["perplexity"][0] == pytest.approx(math.exp(loss.mean()))
    again = resample(measures, 1)
    assert all((again[name][1] == drawn[name][1]).all() for name in measures)
    paired = drawn["share"][1] - resample(measures, 1)["share"][1]
    assert not paired.any()  # the same resamples: a difference of equals is 0, without an interval


def test_a_difference_of_means_is_of_the_rows_that_are_there():
    """A margin of KTO: good rewards less bad ones, whatever their shares in a part of the data."""
    from recipe_runner.results.statistics import Measure, estimate, resample

    good = np.array([1.0, 1, 1, 0, 0, 0, 0, 0])
    rewards = np.array([0.5, 0.6, 0.7, 0.1, 0.2, 0.3, 0.1, 0.2])
    margin = Measure(rewards * good, good, minus=Measure(rewards * (1 - good), 1 - good))
    found = estimate(*resample({"margin": margin}, 1)["margin"])
    assert found.value == pytest.approx(0.6 - 0.18)
    assert 0.29 < found.low < found.value < found.high < 0.55
    part = estimate(*resample({"margin": margin.of(np.array([0, 3, 4]))}, 1)["margin"])
    assert part.value == pytest.approx(0.5 - 0.15)
    only_good = estimate(*resample({"margin": margin.of(np.array([0, 1]))}, 1)["margin"])
    assert math.isnan(only_good.value)


def test_a_row_without_a_prompt_is_in_the_loss_alone(run_cli, train):
    from shared import write_rows

    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    run = train("turns", rows, "chat", "all", training={"max_steps": 2})
    alone = [{"messages": [{"role": "assistant", "content": "b"}]}]
    data = write_rows(run.parent / "alone.jsonl", rows[:1] + alone)
    figures, answers = evaluate(run_cli, run, "--data", data)
    assert figures["rows"] == 2
    assert ["answer" in row["columns"]["tuned"] for row in answers] == [True, False]


def test_what_cannot_be_measured_is_one_line(run_cli, learned, run_recipe, tiny_phi3, tmp_path):
    from shared import write_rows

    strange = write_rows(tmp_path / "strange.jsonl", [{"foo": 1}])
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    long = write_rows(tmp_path / "long.jsonl", [{"instruction": "word " * 420, "output": "x"}])
    for arguments, said in (
        (
            (learned, "--scorer", "exact"),
            "error[unknown-scorer] there is no scorer 'exact'; did you mean 'exact_match'?",
        ),
        ((learned, "--data", tmp_path / "no.jsonl"), "error[data-not-found]"),
        ((learned, "--data", strange), "error["),
        ((learned, "--data", long), "error[prompt-too-long]"),
        ((learned, "--few-shot", "40"), "error[no-examples] 40 examples were asked for, and the training data has 4"),
        ((learned, "--output", full), "error[file-exists]"),
        ((learned, "--tasks", "hellaswag"), "error[missing-package]"),
        ((learned, "--data", strange, "--column", "prompt"), "error[unknown-column]"),
        ((learned, "--data", strange, "--column", "prompt=foo"), "error[unknown-column] --column prompt=foo: no role"),
        ((tiny_phi3, "--data", TICKETS, "--few-shot", "2"), "error[no-examples] a plain model has no training data"),
        ((tiny_phi3,), "error[no-evaluation-data]"),
        ((tiny_phi3, "--data", strange), "error[unknown-format]"),
    ):
        result = run_cli("evaluate", *arguments)
        lines = [line for line in result.err.splitlines() if "error[" in line]
        assert (result.status, len(lines)) == (1, 1), result.err
        assert said in lines[0]
        assert "Traceback" not in result.err
    result, _ = run_recipe(peft=ADAPTER, rows=ROWS, dataset={"format": "instruction"})
    assert result.status == 0
    result = run_cli("evaluate", tmp_path / "runs" / "tiny")
    assert "error[no-evaluation-data]" in result.err
