"""Pipelines: text, then sft, then dpo; resuming, stale stages, and what is refused before any weights."""

import json
import shutil

import pytest
import yaml
from shared import CHAT, LORA, PAIRS, TEXT, status, write_rows

from recipe_runner.recipe.document import read_document

ROWS = {"text": TEXT, "chat": CHAT, "preference": PAIRS}
STAGES = {"text": "pretrain", "chat": "sft", "preference": "dpo"}


@pytest.fixture
def pipeline(run_cli, write_recipe, tiny_phi3, tmp_path):
    """Writes three small recipes and a pipeline of them, runs a command on it; returns result and run folder."""

    def pipeline(*arguments, command="train", peft=LORA, changes=None, stages=("text", "chat", "preference")):
        for form, rows in ROWS.items():
            if not (tmp_path / f"{form}.jsonl").exists():
                write_rows(tmp_path / f"{form}.jsonl", rows)
            training = {"max_steps": 3, "logging_steps": 1, "learning_rate": 1e-4, "max_length": 64, "save_steps": 2}
            training |= {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
            sections = {
                "model": {"name_or_path": str(tiny_phi3)},
                "peft": peft if form == "text" or not peft else {"method": "lora"},
                "dataset": {"format": form, "train": {"source": f"{form}.jsonl"}, "eval": {"fraction": 0.2}},
                "training": training,
            }
            for section, values in (changes or {}).get(form, {}).items():
                sections[section] = values if values is None else (sections[section] or {}) | values
            write_recipe(name=form, stage=STAGES[form], **sections)
        file = tmp_path / "chain.yaml"
        entry = {
            "schema_version": 1,
            "name": "chain",
            "stage": "pipeline",
            "stages": [f"{name}.yaml" for name in stages],
        }
        file.write_text(json.dumps(entry | {"run": {"output_dir": str(tmp_path / "runs")}}))
        result = run_cli(command, file, *arguments)
        return result, max((tmp_path / "runs" / "chain").glob("*"), default=None)

    return pipeline


def stage_runs(folder):
    return {place: sorted((folder / str(place)).glob("*/*")) for place in (1, 2, 3)}


def test_three_stages_each_from_the_one_before(pipeline):
    result, folder = pipeline()
    assert result.status == 0, result.err
    (text,), (chat,), (pairs,) = stage_runs(folder).values()
    for run, before in ((chat, text), (pairs, chat)):
        model = read_document(run / "resolved.yaml").values["model"]
        assert model["adapter"] == str(before / "adapter")
        assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == LORA["r"]
    assert status(folder)["status"] == "completed"
    assert [stage["status"] for stage in status(folder)["stages"]] == ["completed"] * 3
    assert [stage["run"] for stage in status(folder)["stages"]] == [
        str(run.relative_to(folder)) for run in (text, chat, pairs)
    ]
    assert "a frozen copy of the adapter" in result.out
    report = (folder / "README.md").read_text()
    for told in ("1 pretrain  held-out loss", "2 sft       held-out loss", "held-out pairs ranked right", "(step 0)"):
        assert told in report
        assert told in result.out


def test_stages_that_train_all_weights_hand_on_a_model(pipeline, tmp_path):
    changes = {"preference": {"peft": {**LORA}}}
    result, folder = pipeline(peft=None, changes=changes)
    assert result.status == 0, result.err
    (text,), (chat,), (pairs,) = stage_runs(folder).values()
    assert read_document(chat / "resolved.yaml").values["model"]["name_or_path"] == str(text / "model")
    assert read_document(pairs / "resolved.yaml").values["model"]["name_or_path"] == str(chat / "model")
    assert (pairs / "adapter" / "adapter_model.safetensors").is_file()


def test_an_adapter_keeps_the_base_that_it_was_trained_on(pipeline):
    """The first stage trains all weights; the adapter of the second is of that model, and so is the third."""
    adapter = {"chat": {"peft": LORA}, "preference": {"peft": {"method": "lora"}}}
    result, folder = pipeline(peft=None, changes=adapter)
    assert result.status == 0, result.err
    (text,), (chat,), (pairs,) = stage_runs(folder).values()
    third = read_document(pairs / "resolved.yaml").values["model"]
    assert third["name_or_path"] == str(text / "model")
    assert third["adapter"] == str(chat / "adapter")


def test_the_end_of_turn_token_goes_on_to_the_next_stage(pipeline):
    changes = {"chat": {"training": {"eos_token": "<|end|>"}, "peft": LORA}}
    result, folder = pipeline(changes=changes, stages=("chat", "preference"))
    assert result.status == 0, result.err
    tokenizer = json.loads(next(folder.glob("2/*/*/adapter/tokenizer_config.json")).read_text())
    assert tokenizer["eos_token"] == "<|end|>"


def test_auto_does_not_take_a_plain_run_of_the_same_name(pipeline, tmp_path):
    _, folder = pipeline(stages=("text",))
    plain = folder.with_name("99999999-000000-aaaa")
    shutil.copytree(next((folder / "1").glob("*/*")), plain)
    pipeline("--resume", "auto", stages=("text",))
    assert status(plain).get("stages") is None


def fail_in(monkeypatch, stage, step):
    """Makes the training of a stage fail at a step; returns a function that fixes it."""
    from recipe_runner.training import trainers

    build = trainers.build_trainer

    def build_failing(recipe, prepared, *more):
        trainer = build(recipe, prepared, *more)
        if recipe.values["stage"] == stage:
            inner = trainer.training_step

            def training_step(*arguments, **options):
                if trainer.state.global_step == step:
                    raise OSError("the disk is gone")
                return inner(*arguments, **options)

            trainer.training_step = training_step
        return trainer

    monkeypatch.setattr(trainers, "build_trainer", build_failing)
    return lambda: monkeypatch.setattr(trainers, "build_trainer", build)


def test_a_failing_stage_is_resumed_where_it_stopped(pipeline, monkeypatch):
    repair = fail_in(monkeypatch, "sft", 2)
    result, folder = pipeline()
    assert result.status == 1
    assert f"go on with: --resume {folder}" in result.err
    assert status(folder)["status"] == "failed"
    assert [stage["status"] for stage in status(folder)["stages"]] == ["completed", "failed", "waiting"]
    repair()
    before = stage_runs(folder)
    result, again = pipeline("--resume", "auto")
    assert result.status == 0, result.err
    assert again == folder
    assert "Stage 1 of 3: text (pretrain): complete, kept" in result.out
    assert "Stage 2 of 3: chat (sft): goes on where it stopped" in result.out
    assert stage_runs(folder)[1] == before[1]
    assert stage_runs(folder)[2] == before[2]
    steps = [json.loads(line)["step"] for line in (before[2][0] / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [0, 1, 2, 3]
    assert status(folder)["status"] == "completed"


def test_a_changed_stage_makes_the_later_ones_stale_and_loses_nothing(pipeline):
    _, folder = pipeline()
    before = stage_runs(folder)
    result, again = pipeline("--resume", folder, changes={"chat": {"training": {"learning_rate": 2e-4}}})
    assert result.status == 0, result.err
    assert again == folder
    assert "Stage 1 of 3: text (pretrain): complete, kept" in result.out
    assert "Stage 2 of 3: chat (sft): stale (training.learning_rate: 0.0001 -> 0.0002)" in result.out
    assert "Stage 3 of 3: preference (dpo): stale (the stage before it, chat, runs again)" in result.out
    after = stage_runs(folder)
    assert [len(after[place]) for place in (1, 2, 3)] == [1, 2, 2]
    assert all(run in after[place] and (run / "adapter").is_dir() for place in before for run in before[place])
    newest = read_document(after[3][-1] / "resolved.yaml").values["model"]["adapter"]
    assert newest == str(after[2][-1] / "adapter")
    assert status(folder)["stages"][2]["run"] == str(after[3][-1].relative_to(folder))


def test_changed_data_makes_a_stage_stale(pipeline, tmp_path):
    _, folder = pipeline()
    with (tmp_path / "preference.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "one", "chosen": "more", "rejected": "pair"}) + "\n")
    result, _ = pipeline("--resume", "auto")
    assert result.status == 0, result.err
    assert "Stage 2 of 3: chat (sft): complete, kept" in result.out
    assert f"Stage 3 of 3: preference (dpo): stale (changed: {tmp_path / 'preference.jsonl'})" in result.out
    assert [len(runs) for runs in stage_runs(folder).values()] == [1, 1, 2]


def test_a_changed_base_makes_all_stages_stale(pipeline, tiny_phi3, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_phi3, base)
    changes = {name: {"model": {"name_or_path": str(base)}} for name in ("text", "chat", "preference")}
    _, folder = pipeline(changes=changes)
    file = base / "model.safetensors"
    save_file({name: tensor + torch.ones(()) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    result, _ = pipeline("--resume", folder, changes=changes)
    assert result.status == 0, result.err
    assert "Stage 1 of 3: text (pretrain): stale (changed: the base model's weights)" in result.out
    assert [len(runs) for runs in stage_runs(folder).values()] == [2, 2, 2]


def test_a_result_that_is_gone_is_made_again(pipeline):
    _, folder = pipeline()
    shutil.rmtree(stage_runs(folder)[2][0] / "adapter")
    result, _ = pipeline("--resume", "auto")
    assert "Stage 2 of 3: chat (sft): stale (its result is gone from" in result.out
    assert [len(runs) for runs in stage_runs(folder).values()] == [1, 2, 2]


def test_a_complete_pipeline_is_not_run_twice_unasked(pipeline):
    _, folder = pipeline(stages=("text",))
    result, _ = pipeline("--resume", folder, stages=("text",))
    assert "error[run-completed]" in result.err
    result, newest = pipeline("--resume", "auto", stages=("text",))
    assert result.status == 0
    assert newest != folder
    run = next((folder / "1").glob("*/*"))
    assert "error[not-a-run]" in pipeline("--resume", run, stages=("text",))[0].err


def test_a_stage_that_cannot_run_stops_the_pipeline_before_any_weights(pipeline, monkeypatch, tmp_path):
    from recipe_runner.training import trainers

    monkeypatch.setattr(trainers, "build_trainer", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "preference.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    result, folder = pipeline()
    assert result.status == 1
    assert "error[missing-column]" in result.err
    assert folder is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": ("text", "nowhere")}, "error[stage-not-found] stages.1: cannot read nowhere.yaml"),
        ({"stages": ("text", "chain")}, "error[nested-pipeline] stages.1: chain.yaml is itself"),
        ({"changes": {"chat": {"training": {"max_stepz": 1}}}}, "chat.yaml"),
        (
            {"changes": {"chat": {"peft": None}}},
            "error[pipeline-handover] stages.1: text and chat: an adapter comes in, but all weights",
        ),
        (
            {"changes": {"chat": {"peft": {"r": 4}}}},
            "error[pipeline-handover] stages.1: text and chat have different adapters (peft.r: 8, 4)",
        ),
        (
            {"changes": {"text": {"peft": None}, "chat": {"peft": LORA}, "preference": {"peft": {"r": 64}}}},
            "have different adapters (peft.r: 8, 64)",
        ),
        (
            {"peft": {"method": "lora", "target_modules": "all-linear"}, "changes": {"chat": {"peft": {"r": 64}}}},
            "have different adapters (peft.r: 8, 64)",  # PEFT's default
        ),
        (
            {"changes": {"chat": {"model": {"name_or_path": "some/other"}}}},
            "error[pipeline-handover] stages.1: text and chat have different base models",
        ),
        ({"changes": {"chat": {"model": {"adapter": "some/adapter"}}}}, "remove its model.adapter"),
    ],
)
def test_what_a_pipeline_cannot_be(pipeline, options, said):
    result, _ = pipeline(command="validate", **options)
    assert result.status == 1
    assert said in result.out
    assert pipeline(**options)[0].status == 1


def test_a_pipeline_says_nothing_of_what_its_stages_say(run_cli, tmp_path):
    file = tmp_path / "chain.yaml"
    entry = {"schema_version": 1, "name": "chain", "stage": "pipeline", "stages": ["phi3_chat_qlora"]}
    file.write_text(json.dumps(entry | {"training": {"max_steps": 3}, "run": {"seed": 1}}))
    out = run_cli("validate", file).out
    assert out.count("error[misplaced-key]") == 2
    file.write_text(json.dumps(entry))
    assert "error[pipeline-has-no-rows]" in run_cli("preview", file).err
    assert run_cli("validate", file).status == 0


def test_overrides_go_to_every_stage(pipeline, tmp_path):
    result, folder = pipeline("--set", "training.max_steps=1", "--set", "run.seed=7", stages=("text", "chat"))
    assert result.status == 0, result.err
    assert all(
        read_document(run / "resolved.yaml").values["run"]["seed"] == 7
        for runs in stage_runs(folder).values()
        for run in runs
    )
    for runs in list(stage_runs(folder).values())[:2]:
        assert read_document(runs[0] / "resolved.yaml").values["training"]["max_steps"] == 1
    result, _ = pipeline("--set", "training.max_stepz=1", command="validate")
    assert result.out.count("error[unknown-key] training.max_stepz") == 1


@pytest.fixture
def aligned(small_recipe, tmp_path):
    """A pipeline of sft, a reward model from it, and rloo from the sft adapter with that reward model."""
    from shared import GENERATING

    small_recipe(name="answers", peft=LORA, training={"max_steps": 2})
    small_recipe(name="judge", stage="reward", peft=LORA, training={"max_steps": 2})
    judged = [{"model": "./nowhere"}, {"name": "length", "max": 4}]
    dataset = {"reward_columns": ["wanted"], "train": {"source": "prompts.jsonl"}}
    rows = [{"prompt": f"say {n}", "wanted": f"it is {n}"} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = GENERATING | {"max_steps": 2, "save_steps": 1}
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "config.json").write_text("{}")
    pairs = [{"prompt": f"say {n}", "chosen": f"it is {n}", "rejected": "no idea"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    small_recipe(name="tried", stage="rloo", rows=None, peft=LORA, rewards=judged, dataset=dataset, training=training)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    def aligned(last='{"recipe": "tried.yaml", "from": "answers", "reward_from": "judge"}'):
        file = tmp_path / "aligned.yaml"
        file.write_text(
            f'{{"schema_version": 1, "name": "aligned", "stage": "pipeline", "stages": ["answers.yaml", "judge.yaml",'
            f' {last}], "run": {{"output_dir": {json.dumps(str(tmp_path / "runs"))}}}}}'
        )
        return file

    return aligned


def test_a_stage_takes_what_it_names_from_earlier_ones(aligned, run_cli, tmp_path):
    result = run_cli("train", aligned())
    assert result.status == 0, result.err
    (folder,) = (tmp_path / "runs" / "aligned").iterdir()
    stages = json.loads((folder / "status.json").read_text())["stages"]
    answers, judge, tried = (folder / stage["run"] for stage in stages)
    resolved = yaml.safe_load((tried / "resolved.yaml").read_text())
    assert resolved["model"]["adapter"] == str(answers / "adapter")
    assert resolved["rewards"][0]["model"] == str(judge)
    assert yaml.safe_load((judge / "resolved.yaml").read_text())["model"]["adapter"] == str(answers / "adapter")
    first = json.loads((tried / "completions.jsonl").read_text().splitlines()[0])
    assert set(first["rewards"]) == {"judge", "length"}
    again = run_cli("train", aligned(), "--resume", folder)
    assert "is complete, and nothing has changed" in again.err


def test_what_depends_on_a_changed_stage_runs_again(aligned, run_cli, tmp_path):
    assert run_cli("train", aligned()).status == 0
    (folder,) = (tmp_path / "runs" / "aligned").iterdir()
    text = (tmp_path / "judge.yaml").read_text()
    (tmp_path / "judge.yaml").write_text(text.replace('"max_steps": 2', '"max_steps": 3'))
    result = run_cli("train", aligned(), "--resume", folder)
    assert result.status == 0, result.err
    assert "Stage 1 of 3: answers (sft): complete, kept" in result.out
    assert "Stage 2 of 3: judge (reward): stale" in result.out
    assert "Stage 3 of 3: tried (rloo): stale" in result.out


def test_a_changed_reward_function_makes_a_complete_stage_stale(aligned, run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where people's data is: the record of a run says ~ for it
    code = "def own(completions, **columns):\n    return [float(len(answer[0]['content'])) for answer in completions]\n"
    (tmp_path / "own.py").write_text(code)
    tried = yaml.safe_load((tmp_path / "tried.yaml").read_text())
    tried["rewards"].append({"function": "own.py:own"})
    tried["run"] = tried["run"] | {"allow_code": True}
    (tmp_path / "tried.yaml").write_text(yaml.safe_dump(tried))
    assert run_cli("train", aligned()).status == 0
    (folder,) = (tmp_path / "runs" / "aligned").iterdir()
    assert "is complete, and nothing has changed" in run_cli("train", aligned(), "--resume", folder).err
    (tmp_path / "own.py").write_text(code.replace("float(len(", "2.0 * (len("))
    result = run_cli("train", aligned(), "--resume", folder)
    assert result.status == 0, result.err
    assert "Stage 2 of 3: judge (reward): complete, kept" in result.out
    assert "Stage 3 of 3: tried (rloo): stale (changed: the reward function in own.py)" in result.out


def test_a_name_that_two_stages_have_is_refused_where_a_later_one_names_it(aligned, run_cli, tmp_path):
    file = aligned()
    file.write_text(file.read_text().replace('"judge.yaml",', '"judge.yaml", "judge.yaml",'))
    result = run_cli("validate", file)
    assert result.status == 1
    assert "tried comes after several recipes of the name judge; give them different names" in result.out


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ('{"recipe": "tried.yaml", "from": "answer", "reward_from": "judge"}', "did you mean 'answers'"),
        ('{"recipe": "tried.yaml", "from": "judge", "reward_from": "judge"}', "a reward model: it gives numbers"),
        ('{"recipe": "tried.yaml", "reward_from": "answers"}', "trains no reward model"),
        ('{"recipe": "answers.yaml", "reward_from": "judge"}', "answers has no rewards with a model"),
        ('{"recipe": "tried.yaml", "form": "answers"}', "unknown-key"),
    ],
)
def test_what_can_not_be_taken_is_said(aligned, run_cli, last, said):
    result = run_cli("validate", aligned(last))
    assert result.status == 1
    assert said in result.out + result.err
