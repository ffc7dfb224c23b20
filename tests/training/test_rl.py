"""Stages rloo, grpo and distillation: the model's own answers, judged by rewards or corrected by a teacher."""

import json
import shutil

import pytest
from shared import GENERATING, LORA, NF4, PROMPTS, VARIED, cut_back, metrics, status


@pytest.fixture
def rl(run_recipe):
    """Runs a command on a small recipe of a stage that judges answers; returns the result and the newest run."""

    def rl(*arguments, stage="grpo", training=None, rewards=VARIED, dataset=None, **options):
        training = GENERATING | (training or {})
        dataset = {"reward_columns": ["wanted"]} | (dataset or {})
        return run_recipe(*arguments, stage=stage, training=training, rewards=rewards, dataset=dataset, **options)

    return rl


def completions(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["rloo", "grpo"])
@pytest.mark.parametrize(
    ("quantization", "peft"), [(None, LORA), (NF4, LORA), (None, None)], ids=["lora", "qlora", "full"]
)
def test_it_begins_at_the_reference_and_keeps_every_answer(rl, stage, quantization, peft):
    result, folder = rl(stage=stage, quantization=quantization, peft=peft, training={"beta": 0.05})
    assert result.status == 0, result.err
    steps = [entry for entry in metrics(folder) if "loss" in entry]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert "reference  " in result.out
    kept = completions(folder)
    assert len(kept) == 3 * 4  # steps, answers
    for step in steps:
        of_step = [entry["rewards"]["repetition_penalty"] for entry in kept if entry["step"] == step["step"]]
        assert sum(of_step) / len(of_step) == pytest.approx(step["reward"], abs=1e-4)
    asked = {entry["prompt"] for entry in kept}
    assert asked <= {row["prompt"] for row in PROMPTS}
    assert all(len([e for e in kept if e["prompt"] == prompt]) % 2 == 0 for prompt in asked)  # in whole groups
    assert status(folder)["status"] == "completed"


@pytest.mark.parametrize("stage", ["rloo", "grpo"])
def test_a_killed_run_goes_on_the_same_also_in_a_later_epoch(rl, stage):
    """TRL's sampler would begin anew with the first epoch's order; see `completions.keep_prompt_order`."""
    from safetensors.torch import load_file

    options = {"stage": stage, "peft": LORA, "rows": PROMPTS[:4]}
    options["training"] = {"max_steps": 5, "save_steps": 3, "logging_steps": 1}  # an epoch has two steps
    _, whole = rl(**options)
    result, folder = rl("--resume", "never", **options)
    assert result.status == 0, result.err
    cut_back(folder, step=3, last=5)
    resumed, _ = rl("--resume", folder, **options)
    assert resumed.status == 0, resumed.err
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, folder))
    assert all(value.equal(other[name]) for name, value in one.items())
    assert completions(folder) == completions(whole)


def test_a_reward_model_judges_what_it_was_trained_to(rl, run_recipe, tmp_path):
    """The kept rewards are what the reward model gives the kept answers."""
    import torch

    from recipe_runner.model.load import load_result

    _, judge = run_recipe(name="judge", stage="reward", peft=LORA, training={"max_steps": 3})
    rewards = [{"model": str(judge)}, {"name": "length", "max": 6, "weight": 0.5}]
    result, folder = rl(stage="rloo", peft=LORA, rewards=rewards, training={"max_steps": 2})
    assert result.status == 0, result.err
    model, tokenizer = load_result(judge, dtype=torch.float32)
    kept = completions(folder)
    assert {tuple(entry["rewards"]) for entry in kept} == {("judge", "length")}
    for entry in kept:
        turns = [{"role": "user", "content": entry["prompt"]}, {"role": "assistant", "content": entry["completion"]}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        with torch.no_grad():
            score = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        assert entry["rewards"]["judge"] == pytest.approx(score, abs=1e-3)


def test_known_rewards_give_what_they_say(tmp_path):
    from types import SimpleNamespace

    from recipe_runner.recipe.sections import RewardSection
    from recipe_runner.training.reward_functions import build_known

    def give(text, ids=(1, 2, 3), right=None, **keys):
        judge = build_known(RewardSection(1.0, "same", **keys), SimpleNamespace(max_completion_length=8))
        turns = [[{"role": "assistant", "content": text}]]
        return judge(prompts=[[]], completions=turns, completion_ids=[list(ids)], right=[right])[0]

    assert give(" yes ", right="yes", name="exact_match", column="right") == 1.0
    assert give("no", right="yes", name="exact_match", column="right") == 0.0
    assert give('{"a": 1}', name="json_valid") == 1.0
    assert give("a: 1", name="json_valid") == 0.0
    assert give("NaN", name="json_valid") == 0.0
    assert give("null", right=None, name="json_equal", column="right") == 1.0
    assert give("no", right=None, name="json_equal", column="right") == 0.0
    assert give('{"b": 2, "a": 1}', right='{"a": 1, "b": 2}', name="json_equal", column="right") == 1.0
    assert give('{"a": 1}', right={"a": True}, name="json_equal", column="right") == 0.0
    assert give('{"a": 1}', right='{"a": 1, "b": 2}', name="json_equal", column="right", key="a") == 1.0
    assert give('{"a": 1}', right='{"a": 1, "b": 2}', name="json_equal", column="right", key="b") == 0.0
    assert give("so: 12", name="regex", pattern=r"\d+$") == 1.0
    assert give("12 so", name="regex", pattern=r"\d+$") == 0.0
    assert give("x", ids=range(5), name="length", min=2, max=5) == 1.0
    assert give("x", ids=range(10), name="length", max=5) == 0.5
    assert give("x", ids=range(1), name="length", min=2, max=5) == 0.5
    assert give("<think>a</think>b", name="think_format") == 1.0
    assert give("b", name="think_format") == 0.0
    assert give("x", ids=[1, 1, 1, 1], name="repetition_penalty", ngram_size=1) == pytest.approx(-0.75)
    assert give("x", ids=range(8), name="soft_overlong", soft_punish_cache=4) == -1.0


OWN = """
def lengths(completions, wanted, **kwargs):
    return [float(len(c[0]["content"])) for c in completions]

def narrow(prompts, completions):
    return [0.0] * len(completions)

def nan(completions, **kwargs):
    return [float("nan")] * len(completions)

def few(completions, **kwargs):
    return [1.0]

def same(completions, **kwargs):
    return [0.5] * len(completions)

def rewriting(prompts, completions, **kwargs):
    found = [float(len(c[0]["content"])) for c in completions]
    for completion in completions:
        completion[0]["content"] = "X"
    prompts.clear()
    return found

CALLS = []

def later(completions, **kwargs):
    CALLS.append(1)
    if len(CALLS) > 4:
        raise KeyError("gone")
    return [float(len(c[0]["content"])) for c in completions]
"""


@pytest.fixture
def own(rl, tmp_path):
    """Trains with a function of one's own."""

    def own(name, **options):
        (tmp_path / "own.py").write_text(OWN)
        options = {"run": {"allow_code": True, "output_dir": str(tmp_path / "runs")}} | options
        return rl(rewards=[{"function": f"own.py:{name}"}], peft=LORA, **options)

    return own


def test_a_function_of_one_s_own_judges(own):
    result, folder = own("lengths")
    assert result.status == 0, result.err
    for entry in completions(folder):
        assert entry["rewards"]["lengths"] == len(entry["completion"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("narrow", "can't be called as TRL calls it"),
        ("nan", "nan gives float 'nan' for the answer"),
        ("few", "few gives 1 values for"),
        ("same", "error[constant-reward] rewards.0: same gives 0.5 to all of"),
        ("missing", "has no function missing"),
    ],
)
def test_what_is_wrong_with_it_is_said_before_the_first_step(own, name, said):
    result, folder = own(name)
    assert result.status == 1
    assert said in result.err
    assert "loss" not in (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else True


def test_one_that_fails_later_ends_the_run_with_its_checkpoint_and_shows_its_own_line(own, run_cli, tmp_path):
    result, folder = own("later", training={"max_steps": 8, "save_steps": 100})
    assert result.status == 1
    assert 'raise KeyError("gone")' in result.err
    assert "error[reward-failed] rewards.0.function: own.py:later failed: KeyError" in result.err
    assert "on the answer" in result.err
    assert status(folder)["status"] == "failed"
    (checkpoint,) = (folder / "checkpoints").iterdir()
    steps = int(checkpoint.name.rpartition("-")[2])
    assert steps >= 1
    (tmp_path / "own.py").write_text(OWN.replace("> 4", "> 400"))
    again = run_cli("train", tmp_path / "tiny.yaml", "--resume", folder)  # mended, it goes on
    assert again.status == 0, again.err
    assert "the reward function in own.py as it is now: it has changed since the run began" in again.out
    assert status(folder)["status"] == "completed"


def test_its_code_never_runs_unless_the_recipe_says_so(rl, run_cli, tmp_path):
    (tmp_path / "own.py").write_text("open('ran', 'w')\ndef f(**kwargs):\n    return []\n")
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w')\ndef f(**kwargs):\n    return []\n")
    rewards = [{"function": "own.py:f"}]
    result, _ = rl(rewards=rewards, peft=LORA)
    assert "error[code-not-allowed] rewards.0.function" in result.err
    allowed = {"allow_code": True, "output_dir": str(tmp_path / "runs")}
    for command in ("validate", "show", "preview"):
        result, _ = rl(command=command, rewards=rewards, peft=LORA, run=allowed)
        assert result.status == 0, result.err
    assert not marker.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"training": {"num_generations": 3}}, "3 answers to a prompt (num_generations) do not divide the 4 answers"),
        ({"training": {"max_completion_length": 505}}, "error[no-room-to-answer] training.max_completion_length"),
        ({"training": {"use_vllm": True}}, "vLLM is not installed here"),
        ({"training": {"log_completions": True}}, "answers are always kept"),
        ({"rows": PROMPTS[:1]}, "error[too-few-rows]"),
        ({"rewards": [{"name": "accuracy", "column": "wanted"}]}, "accuracy needs the package math-verify"),
        ({"rewards": [{"name": "exact_match", "column": "wantd"}]}, "did you mean 'wanted'"),
        ({"rewards": [{"name": "exact_match"}]}, "exact_match needs the key column"),
        ({"rewards": [{"name": "json_valid", "pattern": "a"}]}, "json_valid has no such key"),
        ({"rewards": [{"weight": 2}]}, "neither model nor name nor function"),
        ({"rewards": [{"name": "regex", "pattern": "("}]}, "the pattern can't be read"),
        ({"rewards": None}, "add 'rewards:'"),
        ({"dataset": {"reward_columns": ["wants"]}}, "error[missing-column] dataset.reward_columns.0"),
        ({"peft": {"method": "prompt_tuning", "num_virtual_tokens": 4}}, "error[prompt-learning] peft.method"),
        (
            {"rows": [{"prompt": [{"role": "assistant", "content": "a"}], "wanted": ""}]},
            "the prompt ends with an answer",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_is_said(rl, options, said):
    result, _ = rl(**({"peft": LORA} | options))
    assert result.status == 1
    assert said in result.err


def test_a_reward_run_of_another_tokenizer_or_kind_is_refused(rl, run_recipe, tmp_path, tiny_phi3):
    _, answers = run_recipe(name="answers", peft=LORA)
    result, _ = rl(peft=LORA, rewards=[{"model": str(answers)}])
    assert "is a run of stage sft, and no reward model" in result.err
    _, judge = run_recipe(name="judge", stage="reward", peft=LORA, training={"max_steps": 2})
    other = tmp_path / "other"
    shutil.copytree(judge / "adapter", other)
    file = other / "tokenizer_config.json"
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|end|>", "<|end|>!"))
    assert file.is_file()
    result, _ = rl(peft=LORA, rewards=[{"model": str(other)}])
    assert "error[reward-tokenizer-differs] rewards.0.model" in result.err
    assert "tokenizer: own" in result.err
    result, _ = rl(peft=LORA, rewards=[{"model": str(other), "tokenizer": "own"}])
    assert result.status == 0, result.err


def test_preview_shows_the_prompt_as_the_trainer_asks_it(rl, run_cli, tmp_path, tokenizer):
    shown, _ = rl("-n", "3", "--format", "json", command="preview", peft=LORA)
    rows = json.loads(shown.out)
    for row in rows:
        turns = [{"role": "user", "content": PROMPTS[row["row"] - 1]["prompt"]}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert row["input_ids"] == asked
        assert set(row["labels"]) == {-100}
        assert row["reward_columns"] == {"wanted": PROMPTS[row["row"] - 1]["wanted"]}
    text, _ = rl("-n", "1", "--rows-only", command="preview", peft=LORA)
    assert f'rewards are given wanted: "{PROMPTS[rows[0]["row"] - 1]["wanted"]}"' in text.out


@pytest.mark.parametrize(("quantization", "peft"), [(None, LORA), (NF4, LORA)], ids=["lora", "qlora"])
def test_distillation_trains_an_adapter_with_a_run_as_its_teacher(run_recipe, quantization, peft):
    _, teacher = run_recipe(name="taught", peft=LORA, training={"max_steps": 6})
    training = {key: value for key, value in GENERATING.items() if key != "num_generations"} | {"learning_rate": 2e-3}
    result, folder = run_recipe(
        stage="distillation",
        model={"teacher": str(teacher)},
        training=training,
        dataset={"ignore": ["wanted"]},
        quantization=quantization,
        peft=peft,
    )
    assert result.status == 0, result.err
    assert status(folder)["status"] == "completed"
    assert next(entry["loss"] for entry in metrics(folder) if "loss" in entry) > 0


def test_distillation_comes_nearer_to_its_teacher_and_refuses_another_vocabulary(run_recipe, tiny_phi3, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = tmp_path / "teacher"
    torch.manual_seed(7)
    config = AutoModelForCausalLM.from_pretrained(tiny_phi3).config
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        made.lm_head.weight.mul_(5)  # surer than random weights are
    made.save_pretrained(teacher)
    AutoTokenizer.from_pretrained(tiny_phi3).save_pretrained(teacher)
    training = {key: value for key, value in GENERATING.items() if key != "num_generations"}
    training |= {"max_steps": 12, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    options = {"stage": "distillation", "training": training, "dataset": {"ignore": ["wanted"]}}
    result, folder = run_recipe(model={"teacher": str(teacher)}, **options)
    assert result.status == 0, result.err
    losses = [entry["loss"] for entry in metrics(folder) if "loss" in entry]
    assert losses[-1] < losses[0] * 0.98
    assert completions(folder)
    tokens = AutoTokenizer.from_pretrained(tiny_phi3)
    tokens.add_tokens(["another"])
    tokens.save_pretrained(teacher)
    result, _ = run_recipe(model={"teacher": str(teacher)}, **options)
    assert "error[teacher-differs] model.teacher" in result.err
    result, _ = run_recipe(**options)
    assert "add 'teacher:'" in result.err


def test_who_looks_for_ppo_finds_its_successors(run_cli, write_recipe):
    result = run_cli("validate", write_recipe(stage="ppo"))
    assert "TRL removed its PPO trainer" in result.out + result.err
    assert "rloo" in result.out + result.err


def test_a_function_that_changes_what_it_is_given_changes_no_record(own):
    result, folder = own("rewriting")
    assert result.status == 0, result.err
    assert {entry["completion"] for entry in completions(folder)} != {"X"}


def test_held_out_answers_are_all_kept_and_their_reward_is_that_of_all_rows(rl, run_cli):
    """Two batches of evaluation, of 8 and of 2 answers, each larger or smaller than the 4 of training."""
    rows = [{"prompt": f"say {'more ' * n}{n}", "wanted": "x"} for n in range(10)]
    training = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8, "num_generations_eval": 1}
    result, folder = rl(peft=LORA, rows=rows, dataset={"eval": {"source": "rows.jsonl"}}, training=training)
    assert result.status == 0, result.err
    held = [entry for entry in completions(folder) if entry["split"] == "eval"]
    last = [entry for entry in held if entry["step"] == held[-1]["step"]]
    assert len(last) == len(rows)
    logged = [entry["eval_reward"] for entry in metrics(folder) if "eval_reward" in entry][-1]
    assert logged == pytest.approx(sum(sum(entry["rewards"].values()) for entry in last) / len(last), abs=1e-3)
    told = run_cli("runs", folder.parent.parent).out
    assert "eval_reward" in told
    assert "Held-out reward" in (folder / "README.md").read_text()


def test_the_best_checkpoint_of_what_is_rewarded_has_the_best_reward(rl):
    from recipe_runner.training.config import build_config

    seen = {}

    def noted(*arguments):
        seen["config"] = config = build_config(*arguments)
        return config

    from unittest import mock

    training = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "max_steps": 6,
    }
    with mock.patch("recipe_runner.training.prepare.build_config", noted):
        result, _ = rl(peft=LORA, dataset={"eval": {"source": "rows.jsonl"}}, training=training)
    assert result.status == 0, result.err
    assert seen["config"].metric_for_best_model == "eval_reward"
    assert seen["config"].greater_is_better


def test_a_teacher_that_is_a_reward_model_or_is_not_there_is_refused_by_name(run_recipe, run_cli, tmp_path):
    training = {key: value for key, value in GENERATING.items() if key != "num_generations"}
    options = {"stage": "distillation", "training": training, "dataset": {"ignore": ["wanted"]}, "peft": LORA}
    judge = {"stage": "reward", "name": "judge", "peft": LORA, "training": {"max_steps": 1, "learning_rate": 1e-3}}
    _, folder = run_recipe(**judge)
    assert run_cli("merge", folder).status == 0
    result, _ = run_recipe(model={"teacher": str(folder / "merged")}, **options)
    assert "error[teacher-differs] model.teacher" in result.err
    assert "is a reward model" in result.err
    result, _ = run_recipe(model={"teacher": "nobody/nothing"}, **options)
    assert "error[model-not-found] model.teacher: nobody/nothing is no run, no recipe" in result.err


def test_a_run_is_evaluated_by_its_answers(rl, run_cli):
    """The wanted answer is what the first of the reward columns has; there is no loss of answers that are not there."""
    dataset = {"eval": {"source": "rows.jsonl"}}
    training = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    result, folder = rl(peft=LORA, dataset=dataset, training=training)
    assert result.status == 0, result.err
    assert "held-out reward" in result.out
    assert {entry["split"] for entry in completions(folder)} == {"train", "eval"}
    evaluated = run_cli("evaluate", folder, "--max-new-tokens", "4", "--scorer", "exact_match", "--format", "json")
    assert evaluated.status == 0, evaluated.err
    found = json.loads(evaluated.out)["columns"]["tuned"]
    assert found["exact_match"]["value"] == 0.0
    assert not any("loss" in name for name in found)
    report = (folder / "report.html").read_text()
    assert "Answers that were trained on" in report
    assert "repetition_penalty" in report
