"""Stage kto: single answers with a label, the right reference, and what is shown is what is trained on."""

import json

import pytest
from shared import JUDGED, LORA, NF4, metrics, status


@pytest.fixture
def kto(run_recipe):
    """Runs a command on a small KTO recipe; returns the result and the latest run folder, if any."""

    def kto(*arguments, training=None, **options):
        training = {"max_steps": 6, "learning_rate": 2e-3, "max_length": 128} | (training or {})
        return run_recipe(*arguments, stage="kto", training=training, **options)

    return kto


@pytest.mark.parametrize(
    ("quantization", "peft"), [(None, LORA), (NF4, LORA), (None, None)], ids=["lora", "qlora", "full"]
)
def test_training_starts_at_the_reference_and_learns(kto, quantization, peft):
    """At step 1 the policy is the reference: KL 0 and loss 0.5, which a wrong reference does not give."""
    result, folder = kto(quantization=quantization, peft=peft)
    assert result.status == 0, result.err
    steps = [entry for entry in metrics(folder) if "rewards/margins" in entry or "kl" in entry]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.005
    assert status(folder)["status"] == "completed"
    assert "reference  " in result.out


def test_what_is_shown_is_what_the_trainer_receives(kto, tmp_path):
    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training import prepare, trainers

    rows = [*JUDGED, {"prompt": "q", "completion": "long " * 40, "label": True}]
    result, _ = kto("-n", "20", "--format", "json", command="preview", rows=rows, training={"max_length": 24})
    shown = json.loads(result.out)
    recipe = load_recipe(str(tmp_path / "tiny.yaml"))
    prepared = prepare.prepare(recipe, None)
    prepared.config.output_dir = str(tmp_path / "out")
    batches = list(trainers.build_trainer(recipe, prepared).get_train_dataloader())
    places = [(batch, place) for batch in batches for place in range(len(batch["label"]))]
    assert len(shown) == len(places) == 13
    for row, (batch, place) in zip(shown, places, strict=True):
        length = int(batch["attention_mask"][place].sum())
        mask = batch["completion_mask"][place][:length].tolist()
        assert row["input_ids"] == batch["input_ids"][place][:length].tolist()
        assert row["labels"] == [
            token if learned else -100 for token, learned in zip(row["input_ids"], mask, strict=True)
        ]
        assert bool(batch["label"][place]) == rows[row["row"] - 1]["label"]


def test_rows_equal_those_of_a_real_trainer(kto, tiny_phi3, tmp_path, tokenizer):
    """The KL term's answers, too: TRL makes them within each batch of a device."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training import prepare

    kto(command="validate", training={"per_device_train_batch_size": 5})
    ours = prepare.prepare(load_recipe(str(tmp_path / "tiny.yaml")), None).train.dataset
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in JUDGED
    ]
    config = KTOConfig(str(tmp_path / "out"), bf16=False, max_length=128, per_device_train_batch_size=5)
    data = Dataset.from_list(turns)
    theirs = KTOTrainer(str(tiny_phi3), args=config, train_dataset=data, processing_class=tokenizer).train_dataset
    for name in ("prompt_ids", "completion_ids", "KL_completion_ids", "label"):
        assert list(ours[name]) == list(theirs[name]), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": [{"prompt": "q", "completion": "a", "label": "true"}]}, "expected true or false, found str 'true'"),
        ({"rows": [{"prompt": "q", "completion": "a"}]}, "no column 'label' for the role 'label'"),
        ({"training": {"per_device_train_batch_size": 1}}, "expected a number at least 2, found 1"),
        ({"training": {"train_sampling_strategy": "random"}}, "'random' is not one of 'sequential'"),
        ({"dataset": {"format": "preference"}}, "its rows are of format: unpaired_preference, for stage kto"),
    ],
)
def test_what_kto_does_not_take_is_said(kto, options, said):
    result, _ = kto(**options)
    assert result.status == 1
    assert said in result.err


def test_lost_rows_are_counted(kto):
    rows = [
        *JUDGED,
        {"prompt": "q", "completion": " ", "label": True},
        {"prompt": "", "completion": "a", "label": True},
    ]
    result, _ = kto(command="prepare", rows=rows, dataset={"max_dropped": 0.2})
    assert "2 dropped (1 with an empty completion; 1 with an empty prompt)" in result.out


def test_both_answers_of_pairs_are_rows_with_a_label(kto, run_cli, tmp_path):
    """As TRL unpairs them; the answers to a prompt are apart, and each can be previewed, evaluated and trained on."""
    from datasets import Dataset
    from shared import PAIRS
    from trl import unpair_preference_dataset

    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training import prepare

    rows = [*PAIRS, {"prompt": "q", "chosen": "a", "rejected": ""}]
    options = {"rows": rows, "peft": LORA, "dataset": {"format": "preference", "eval": {"source": "rows.jsonl"}}}
    options["training"] = {"eval_strategy": "steps", "eval_steps": 6}
    shown, _ = kto("-n", "30", "--format", "json", command="preview", **options)
    assert shown.status == 0, shown.err
    prepared = prepare.prepare(load_recipe(str(tmp_path / "tiny.yaml")), None)
    counted = prepared.train.accounting
    assert (counted.rows_read, counted.rows_kept, counted.dropped) == (26, 24, {"with an empty rejected": 2})
    assert counted.noted == {"judged good": 12, "judged bad": 12}
    tokenizer = prepared.tokenizer
    texts = [
        (tokenizer.decode(row["prompt_ids"] + row["completion_ids"]), row["label"]) for row in prepared.train.dataset
    ]
    unpaired = unpair_preference_dataset(Dataset.from_list(PAIRS))
    wanted = [
        (f"<|user|>\n{row['prompt']}<|end|>\n<|assistant|>\n{row['completion']}<|end|>\n", row["label"])
        for row in unpaired
    ]
    assert sorted((text.replace("<|endoftext|>", ""), label) for text, label in texts) == sorted(wanted)
    previewed = json.loads(shown.out)
    assert [(tokenizer.decode(row["input_ids"]), row["label"]) for row in previewed] == texts
    assert all(rows[row["row"] - 1]["prompt"] in tokenizer.decode(row["input_ids"]) for row in previewed)
    one, _ = kto("--row", "2", "--format", "json", command="preview", **options)
    both = json.loads(one.out[one.out.index("[") :])
    assert [row["label"] for row in both] in ([True, False], [False, True])
    result, folder = kto(**options)
    assert result.status == 0, result.err
    evaluated = run_cli("evaluate", folder, "--format", "json")
    assert evaluated.status == 0, evaluated.err
    logged = [entry for entry in metrics(folder) if "eval_rewards/margins" in entry][-1]
    margin = json.loads(evaluated.out)["columns"]["tuned"]["reward margin"]["value"]
    assert margin == pytest.approx(logged["eval_rewards/margins"], rel=0.1, abs=1e-3)
