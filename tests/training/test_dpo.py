"""Stage dpo: every shape of pair, the right reference in each case, and what is shown is what is trained on."""

import json
import math

import pytest
from shared import LORA, NF4, PAIRS, metrics, status

from recipe_runner.data.formats import RowError, normalise_row
from recipe_runner.recipe.sections import DatasetSection

PREFERENCE = DatasetSection("preference", (), "truncate", 0.1)
ASK, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "g"), ("assistant", "b"))
)


@pytest.fixture
def dpo(run_recipe):
    """Runs a command on a small DPO recipe; returns the result and the latest run folder, if any."""

    def dpo(*arguments, training=None, **options):
        training = {"max_steps": 6, "learning_rate": 2e-3, "max_length": 128} | (training or {})
        return run_recipe(*arguments, stage="dpo", training=training, **options)

    return dpo


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "g", "rejected": "b"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {
            "prompt": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "g"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ],
    ids=["texts", "turns", "whole conversations", "implicit prompt", "sharegpt"],
)
def test_every_shape_of_a_pair_is_the_same_pair(row):
    found = normalise_row(row, PREFERENCE, "row 1")
    assert found == {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD], "dropped": ""}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "g", "rejected": "g"}, "with equal answers"),
        ({"prompt": "q", "chosen": "", "rejected": "g"}, "with an empty chosen"),
        ({"prompt": "q", "chosen": "g", "rejected": None}, "with an empty rejected"),
        (
            {"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "other"}, BAD]},
            "whose answers have no prompt in common",
        ),
        (
            {"prompt": "q", "chosen": [{**ASK, "content": "x"}, GOOD], "rejected": [BAD]},
            "whose answer does not continue its prompt",
        ),
    ],
)
def test_pairs_that_teach_nothing_are_dropped_by_reason(row, reason):
    assert normalise_row(row, PREFERENCE, "row 1")["dropped"] == reason


def test_a_pair_of_the_wrong_shape_is_an_error():
    with pytest.raises(RowError, match="row 1: column 'chosen': expected a text, a turn or a list of turns, found int"):
        normalise_row({"prompt": "q", "chosen": 3, "rejected": "b"}, PREFERENCE, "row 1")


@pytest.mark.parametrize(
    ("quantization", "peft", "training"),
    [(None, LORA, {}), (NF4, LORA, {}), (None, None, {}), (None, LORA, {"precompute_ref_log_probs": True})],
    ids=["lora", "qlora", "full", "precomputed"],
)
def test_training_starts_at_the_reference_and_learns(dpo, quantization, peft, training):
    """At step 1 the policy is the reference: margin 0 and loss ln 2, which a wrong reference does not give."""
    result, folder = dpo(quantization=quantization, peft=peft, training=training)
    assert result.status == 0, result.err
    steps = [entry for entry in metrics(folder) if "rewards/margins" in entry]
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.01
    assert steps[-1]["rewards/margins"] > 0
    assert status(folder)["status"] == "completed"
    assert list(folder.glob("adapter/*.safetensors" if peft else "model/*.safetensors"))


def test_pairs_are_grouped_by_length(dpo):
    rows = [{"prompt": "q", "chosen": "long " * n, "rejected": "no"} for n in range(1, 25)]
    result, _ = dpo(rows=rows, training={"train_sampling_strategy": "group_by_length"})
    assert result.status == 0, result.err


def test_what_is_shown_is_what_the_trainer_receives(dpo, tmp_path):
    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training import prepare, trainers

    rows = [*PAIRS, {"prompt": "q", "chosen": "long " * 40, "rejected": "short"}]
    training = {"train_sampling_strategy": "sequential", "max_length": 24, "per_device_train_batch_size": 1}
    result, _ = dpo("-n", "20", "--format", "json", command="preview", rows=rows, training=training)
    shown = json.loads(result.out)
    recipe = load_recipe(str(tmp_path / "tiny.yaml"))
    prepared = prepare.prepare(recipe, None)
    prepared.config.output_dir = str(tmp_path / "out")
    batches = list(trainers.build_trainer(recipe, prepared).get_train_dataloader())
    assert len(shown) == len(batches) == 13
    for batch, row in zip(batches, shown, strict=True):
        for place, side in enumerate((row, row["rejected"])):
            length = int(batch["attention_mask"][place].sum())
            mask = batch["completion_mask"][place][:length].tolist()
            assert side["input_ids"] == batch["input_ids"][place][:length].tolist()
            assert side["labels"] == [
                token if learned else -100 for token, learned in zip(side["input_ids"], mask, strict=True)
            ]


def test_pairs_are_shown_side_by_side(dpo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result, _ = dpo("-n", "1", "--rows-only", command="preview")
    lines = result.out.splitlines()
    assert "say 0<|end|>\u23ce" in lines
    (heads,) = [line for line in lines if line.startswith("chosen: ")]
    answers = lines[lines.index(heads) + 1]
    assert [part.strip() for part in answers.split(" | ")] == ["it is 0<|end|>", "no idea, ask again<|end|>"]


def test_a_page_of_pairs_has_both_answers(dpo, tmp_path):
    page = tmp_path / "pairs.html"
    assert dpo("--html", page, command="preview")[0].status == 0
    html = page.read_text()
    assert html.count('<div class="pair">') == 3
    assert '<b class="rejected">rejected</b>' in html


def test_lost_pairs_are_counted(dpo):
    rows = [
        *PAIRS,
        {"prompt": "q", "chosen": "g", "rejected": "g"},
        {"prompt": "p " * 200, "chosen": "g", "rejected": "b"},
    ]
    result, _ = dpo(command="prepare", rows=rows, dataset={"max_dropped": 0.2})
    assert "14 rows: 12 kept, 2 dropped (1 with equal answers; 1 whose prompt fills max_length (128))" in result.out


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"packing": True}}, "error[removed-key] training.packing: pairs are not packed"),
        ({"training": {"max_prompt_length": 3}}, "removed in TRL 0.29; max_length bounds prompt and answer"),
        ({"training": {"loss_type": ["sigmod"]}}, "did you mean 'sigmoid'?"),
        ({"dataset": {"train_on": "all"}}, "preference tuning learns from whole answers"),
        ({"dataset": {"format": "text"}}, "error[format-stage-mismatch] dataset.format"),
        ({"training": {"sync_ref_model": True}, "peft": LORA}, "error[synced-reference]"),
        ({"training": {"bet": 0.2}}, "did you mean 'beta'?"),
    ],
)
def test_what_dpo_does_not_take_is_said(dpo, sections, said):
    result, _ = dpo(command="validate", **sections)
    assert result.status == 1
    assert said in result.out


def test_a_data_set_without_pairs_is_refused(dpo):
    result, _ = dpo(rows=[{"prompt": "q", "chosen": "g"}])
    assert result.status == 1
    assert "error[missing-column]" in result.err
    assert "for the role 'rejected'" in result.err


@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
def test_evaluations_measure_what_the_record_of_the_stage_says(run_recipe, stage):
    """Upstream's names: a checkpoint may be chosen by them, and by no other."""
    from recipe_runner.stages import STAGES

    training = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "learning_rate": 1e-5}
    result, folder = run_recipe(stage=stage, peft=LORA, training=training, dataset={"eval": {"fraction": 0.2}})
    assert result.status == 0, result.err
    (measured,) = [set(entry) for entry in metrics(folder) if "eval_loss" in entry]
    timing = {"runtime", "samples_per_second", "steps_per_second", "loss", "aux_loss"}
    names = {name.removeprefix("eval_") for name in measured if name.startswith("eval_")}
    assert names | timing == {*STAGES[stage].logged} | timing
