"""Stage reward: pairs -> a head of one number, trained with an adapter or whole, evaluated, merged, gone on from."""

import json

import pytest
from shared import LORA, NF4, PAIRS, cut_back, metrics, status


@pytest.fixture
def reward(run_recipe):
    """Runs a command on a small recipe of stage reward; returns the result and the latest run folder, if any."""

    def reward(*arguments, training=None, **options):
        training = {"max_steps": 8, "learning_rate": 5e-3, "max_length": 128} | (training or {})
        return run_recipe(*arguments, stage="reward", training=training, **options)

    return reward


@pytest.mark.parametrize(
    ("quantization", "peft"), [(None, LORA), (NF4, LORA), (None, None)], ids=["lora", "qlora", "full"]
)
def test_it_learns_to_rank_and_is_used_as_what_it_is(reward, run_cli, tmp_path, quantization, peft):
    held = {"eval": {"source": "rows.jsonl"}}
    training = {"eval_strategy": "steps", "eval_steps": 8}
    result, folder = reward(quantization=quantization, peft=peft, dataset=held, training=training)
    assert result.status == 0, result.err
    logged = metrics(folder)
    first = next(entry for entry in logged if "loss" in entry)
    last = next(entry for entry in logged if "eval_loss" in entry)
    assert first["loss"] == pytest.approx(0.693, abs=0.1)
    assert last["eval_accuracy"] == 1.0
    assert last["eval_margin"] > 0.1
    assert "margin" in result.out
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "ForSequenceClassification" in card
    evaluated = run_cli("evaluate", folder, "--format", "json")
    assert evaluated.status == 0, evaluated.err
    tuned = json.loads(evaluated.out)["columns"]["tuned"]
    assert tuned["pairs ranked right"]["value"] == 1.0
    assert tuned["reward margin"]["value"] == pytest.approx(last["eval_margin"], rel=0.05)
    for option in ("--few-shot", "--max-new-tokens"):
        refused = run_cli("evaluate", folder, option, "2")
        assert (refused.status, f"leave out {option}" in refused.err) == (1, True), refused.err
    whole = folder / "model"
    if peft:
        whole = tmp_path / "merged"
        merged = run_cli("merge", folder, "--output", whole)
        assert merged.status == 0, merged.err
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    ranked = run_cli("evaluate", whole, "--data", pairs, "--output", tmp_path / "ranked")
    assert ranked.status == 0, ranked.err
    assert "pairs ranked right" in ranked.out
    asked = run_cli("generate", folder, "--prompt", "hi")
    assert asked.status == 1
    assert "error[reward-model]" in asked.err


def test_the_adapter_holds_the_head_and_merges_into_a_model_that_scores_the_same(reward, run_cli):
    import torch
    from safetensors.torch import load_file

    from recipe_runner.model.load import load_result
    from recipe_runner.runs.golden import read_golden

    result, folder = reward(peft=LORA)
    assert result.status == 0, result.err
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert saved["base_model.model.score.weight"].shape == (1, 64)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    merged = run_cli("merge", folder, "--dtype", "float32")
    assert merged.status == 0, merged.err
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert config["architectures"] == ["Phi3ForSequenceClassification"]
    golden = read_golden(folder)
    assert golden
    for place in (folder, folder / "merged"):
        model, tokenizer = load_result(place, dtype=torch.float32)
        for row in golden:
            made = tokenizer.apply_chat_template(row.messages, tokenize=True, return_dict=False)
            assert made == row.prompt_ids
            with torch.no_grad():
                score = float(model(input_ids=torch.tensor([made])).logits[0, 0])
            assert score == pytest.approx(row.score, abs=1e-4)


def test_prepared_rows_are_those_of_a_real_trainer_and_of_the_preview(reward, run_cli, tiny_phi3, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training import prepare, trainers

    rows = [*PAIRS, {"prompt": "q", "chosen": "long " * 60, "rejected": "no"}]
    options = {"rows": rows, "training": {"max_length": 40}, "peft": LORA}
    shown, _ = reward("-n", "20", "--format", "json", command="preview", **options)
    assert shown.status == 0, shown.err
    recipe = load_recipe(str(tmp_path / "tiny.yaml"))
    prepared = prepare.prepare(recipe, None)
    assert prepared.train.accounting.dropped == {"longer than max_length (40)": 1}
    prepared.config.output_dir = str(tmp_path / "out")
    trainer = trainers.build_trainer(recipe, prepared)
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]
    config = RewardConfig(str(tmp_path / "theirs"), bf16=False, max_length=40, use_cpu=True)
    theirs = RewardTrainer(
        str(tiny_phi3), args=config, train_dataset=Dataset.from_list(turns), processing_class=tokenizer
    ).train_dataset
    for name in ("chosen_ids", "rejected_ids"):
        assert sorted(trainer.train_dataset[name]) == sorted(theirs[name]), name
    previewed = json.loads(shown.out)
    assert [row["input_ids"] for row in previewed] == list(trainer.train_dataset["chosen_ids"])
    assert [row["rejected"]["input_ids"] for row in previewed] == list(trainer.train_dataset["rejected_ids"])
    first = previewed[0]  # marked is what tells the answers apart
    learned = [token for token in first["labels"] if token != -100]
    assert first["input_ids"][-len(learned) :] == learned
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["input_ids"][0][: len(first["input_ids"])].tolist() == first["input_ids"]


def test_it_goes_on_from_an_adapter_that_answers_with_a_new_head(run_recipe, reward, tmp_path):
    from safetensors.torch import load_file

    _, answers = run_recipe(name="answers", peft=LORA)
    begun = load_file(answers / "adapter" / "adapter_model.safetensors")
    result, folder = reward(peft=LORA, model={"adapter": str(answers)}, training={"learning_rate": 1e-7})
    assert result.status == 0, result.err
    ended = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert set(ended) - set(begun) == {"base_model.model.score.weight"}
    assert all((ended[name] - value).abs().max() < 1e-4 for name, value in begun.items())
    back, _ = run_recipe(name="back", peft=LORA, model={"adapter": str(folder)})
    assert back.status == 1
    assert "the adapter is a reward model's" in back.err


def test_a_stopped_run_goes_on_the_same(reward, run_cli):
    from safetensors.torch import load_file

    options = {"peft": LORA, "training": {"max_steps": 4, "save_steps": 2, "logging_steps": 1}}
    _, whole = reward(**options)
    result, folder = reward("--resume", "never", **options)
    assert result.status == 0, result.err
    cut_back(folder, step=2, last=4)
    resumed, _ = reward("--resume", folder, **options)
    assert resumed.status == 0, resumed.err
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, folder))
    assert all(value.equal(other[name]) for name, value in one.items())
    assert status(folder)["status"] == "completed"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft": {"method": "prompt_tuning", "num_virtual_tokens": 4}}, "error[prompt-learning] peft.method"),
        ({"dataset": {"on_overlong": "truncate"}}, "error[overlong-answer]"),
        ({"training": {"beta": 0.1}}, "a reward model has no reference"),
        ({"dataset": {"format": "unpaired_preference"}}, "for single answers with a label use stage: kto"),
        ({"rows": [{"prompt": "q", "completion": "a", "label": True}]}, "for stage kto"),
        ({"rows": [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 9}, "with equal answers"),
    ],
)
def test_what_it_does_not_take_is_said(reward, options, said):
    result, _ = reward(**({"peft": LORA} | options))
    assert result.status == 1
    assert said in result.err
