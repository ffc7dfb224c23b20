"""Whole runs, through the command line, on a tiny Phi-3: every method and format, resuming, and every way to fail."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import EXAMPLES, HF_HOME
from shared import CHAT, INT8, LORA, NF4, SHAREGPT, TEXT, break_off, losses, metrics, status, write_rows

from recipe_runner.recipe.document import read_document


@pytest.mark.parametrize(
    ("quantization", "peft"),
    [(None, None), (None, LORA), (NF4, LORA), (INT8, LORA)],
    ids=["full", "lora", "qlora", "lora-int8"],
)
@pytest.mark.parametrize(
    ("rows", "dataset"),
    [(None, {}), (CHAT, {"format": "chat"}), (SHAREGPT, {"format": "chat"}), (TEXT, {"format": "text"})],
    ids=["instruction", "chat", "sharegpt", "text"],
)
def test_every_method_learns_every_format(run_recipe, quantization, peft, rows, dataset):
    training = {"max_steps": 12, "packing": dataset.get("format") == "text", "max_length": 128}
    result, folder = run_recipe(rows=rows, dataset=dataset, quantization=quantization, peft=peft, training=training)
    assert result.status == 0, result.err
    assert status(folder)["status"] == "completed"
    found = losses(folder)
    assert sum(found[-3:]) < 0.97 * sum(found[:3])


def test_run_folder_holds_what_explains_and_repeats_the_run(run_recipe, tiny_phi3, tmp_path):
    result, folder = run_recipe(peft=LORA, metadata={"tags": ["tiny"]})
    assert result.status == 0, result.err
    names = "README.md adapter checkpoints environment.json metrics.jsonl recipe.yaml resolved.yaml status.json"
    assert {file.name for file in folder.iterdir()} == {*names.split(), "golden.jsonl", "report.html"}
    assert (folder / "recipe.yaml").read_text() == (tmp_path / "tiny.yaml").read_text()
    assert read_document(folder / "resolved.yaml").values["model"]["name_or_path"] == str(tiny_phi3)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["trl"]
    assert environment["data"]["train"]["rows_kept"] == 240
    assert environment["dataset_fingerprint"]
    assert [entry["step"] for entry in metrics(folder) if "loss" in entry] == [1, 2, 3, 4]
    adapter = {file.name for file in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= adapter
    header = "---\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- trl\n- sft\n- tiny\n---"
    assert (folder / "README.md").read_text().startswith(header)


def test_resolved_recipe_of_a_run_repeats_it(run_recipe, run_cli):
    _, first = run_recipe(peft=LORA)
    assert run_cli(first / "resolved.yaml").status == 0
    second = max(first.parent.iterdir())
    assert second != first
    assert losses(second) == losses(first)


def test_plan_says_what_will_happen(run_recipe):
    training = {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 0.05, "save_strategy": "no"}
    result, folder = run_recipe(peft=LORA, quantization=NF4, training=training)
    assert "(lora adapter on a 4-bit nf4 base)" in result.out
    assert re.search(r"trainable  [\d,]+ of [\d,]+ parameters", result.out)
    assert "240 rows: 240 kept, 0 dropped, 0 truncated" in result.out
    assert "steps      3 of 4 rows: 2 per device x 2 accumulated x 1 process; " in result.out
    assert "float32 weights, no mixed precision (a CPU)" in result.out
    assert str(folder) in result.out
    assert status(folder)["step"] == 3


def test_adapter_can_be_loaded_by_itself_and_gives_the_trained_model(run_recipe, tiny_phi3):
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    _, folder = run_recipe(peft=LORA)
    batch = torch.arange(5, 30)[None]
    with torch.no_grad():
        trained = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")(input_ids=batch).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_phi3)(input_ids=batch).logits
    assert (trained - base).abs().max() > 0.01


def test_full_model_can_be_loaded_by_itself(run_recipe):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder = run_recipe()
    assert AutoModelForCausalLM.from_pretrained(folder / "model").num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template


def test_qlora_goes_on_learning_after_evaluations(run_recipe):
    """bitsandbytes on AVX512-BF16 CPUs stops the gradient at the first evaluation, without a word."""
    training = {"max_steps": 30, "eval_strategy": "steps", "eval_steps": 5}
    quiet = {"max_steps": 30, "eval_strategy": "epoch"}
    _, evaluated = run_recipe(quantization=NF4, peft=LORA, dataset={"eval": {"fraction": 0.05}}, training=training)
    found = losses(evaluated)
    assert sum("eval_loss" in entry for entry in metrics(evaluated)) == 6
    _, plain = run_recipe(quantization=NF4, peft=LORA, dataset={"eval": {"fraction": 0.05}}, training=quiet)
    assert found == pytest.approx(losses(plain), rel=1e-4)
    assert sum(found[-5:]) < 0.98 * sum(found[5:10])  # after the first evaluation


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
def test_resumed_run_equals_an_uninterrupted_one(run_recipe, tmp_path, quantization):
    training = {"max_steps": 6, "save_steps": 2}
    sections = {"peft": LORA | {"lora_dropout": 0.1}, "quantization": quantization, "training": training}
    _, whole = run_recipe(**sections)
    expected = losses(whole)
    broken = break_off(whole, 3)
    result, folder = run_recipe("--resume", "auto", **sections)
    assert result.status == 0, result.err
    assert folder == broken
    assert losses(broken) == expected
    assert status(broken)["status"] == "completed"


def test_a_run_that_was_killed_after_its_last_step_trains_no_step_more(run_recipe):
    from safetensors.torch import load_file

    training = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    _, folder = run_recipe(peft=LORA, training=training)
    before = load_file(folder / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(folder / "adapter")
    (folder / "status.json").write_text('{"status": "running"}')
    result, again = run_recipe("--resume", "auto", peft=LORA, training=training)
    assert (result.status, again) == (0, folder), result.err
    assert max(entry["step"] for entry in metrics(folder)) == 4
    after = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)


def test_a_run_that_another_process_is_in_is_left_alone(run_recipe):
    from recipe_runner.runs.folder import lock_run

    training = {"max_steps": 4, "save_steps": 2}
    _, folder = run_recipe(peft=LORA, training=training)
    (folder / "status.json").write_text('{"status": "running"}')
    with lock_run(folder):
        result, _ = run_recipe("--resume", "auto", peft=LORA, training=training)
    assert result.status == 1
    assert f"error[run-active] another process is in the run in {folder}" in result.err
    assert status(folder)["status"] == "running"
    assert run_recipe("--resume", "auto", peft=LORA, training=training)[0].status == 0


def test_old_checkpoints_go_but_for_the_last_and_the_best(tmp_path):
    from recipe_runner.runs.folder import rotate_checkpoints

    for step in (2, 4, 6, 10):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / "complete").touch()
    rotate_checkpoints(tmp_path, None, None)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
    rotate_checkpoints(tmp_path, 1, str(tmp_path / "checkpoints" / "checkpoint-4"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-4"]


def test_half_written_checkpoint_is_not_resumed_from(run_recipe, tmp_path):
    training = {"max_steps": 4, "save_steps": 2}
    _, whole = run_recipe(peft=LORA, training=training)
    (whole / "status.json").write_text('{"status": "running"}')
    (whole / "checkpoints" / "checkpoint-4" / "complete").unlink()
    (whole / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    result, folder = run_recipe("--resume", whole, peft=LORA, training=training)
    assert result.status == 0, result.err
    assert folder == whole
    assert [entry["step"] for entry in metrics(whole) if "loss" in entry] == [1, 2, 3, 4]


def lose(file):
    file.unlink()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(("damage", "said"), [(lose, "is missing"), (flip, "is not what was written")])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "adapter_model.safetensors", "rng_state.pth"])
def test_a_damaged_checkpoint_is_not_resumed_from(run_recipe, damage, said, name):
    training = {"max_steps": 6, "save_steps": 2}
    _, whole = run_recipe(peft=LORA, training=training)
    wanted = [entry["loss"] for entry in metrics(whole) if "loss" in entry]
    (whole / "status.json").write_text('{"status": "running"}')
    shutil.rmtree(whole / "adapter")
    damage(whole / "checkpoints" / "checkpoint-6" / name)
    result, folder = run_recipe("--resume", "auto", peft=LORA, training=training)
    assert (result.status, folder) == (0, whole), result.err
    assert f"checkpoint-6 is damaged ({name} {said}); going on from {whole}/checkpoints/checkpoint-4" in result.err
    assert [entry["loss"] for entry in metrics(whole) if "loss" in entry] == wanted
    assert (whole / "checkpoints" / "checkpoint-6.damaged").is_dir()  # nothing is lost


def test_a_checkpoint_that_is_vouched_for_by_nothing_is_not_resumed_from(run_recipe):
    """An empty optimizer.pt below an empty list of files: torch would find the end of the file, as of a terminal."""
    training = {"max_steps": 6, "save_steps": 2}
    _, whole = run_recipe(peft=LORA, training=training)
    (whole / "status.json").write_text('{"status": "running"}')
    shutil.rmtree(whole / "adapter")
    last = whole / "checkpoints" / "checkpoint-6"
    (last / "optimizer.pt").write_bytes(b"")
    (last / "complete").write_text("{}")
    result, folder = run_recipe("--resume", "auto", peft=LORA, training=training)
    assert (result.status, folder) == (0, whole), result.err
    assert "checkpoint-6 is damaged (complete does not name its files); going on from" in result.err


def test_a_run_without_an_intact_checkpoint_says_so(run_recipe):
    training = {"max_steps": 2, "save_steps": 2}
    _, whole = run_recipe(peft=LORA, training=training)
    (whole / "status.json").write_text('{"status": "running"}')
    lose(whole / "checkpoints" / "checkpoint-2" / "optimizer.pt")
    result, _ = run_recipe("--resume", whole, peft=LORA, training=training)
    assert result.status == 1
    assert "error[checkpoint-damaged]" in result.err
    assert "optimizer.pt is missing" in result.err


def test_folders_of_other_names_beside_the_checkpoints_do_no_harm(run_recipe):
    training = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1}
    _, whole = run_recipe(peft=LORA, training=training)
    shutil.copytree(whole / "checkpoints" / "checkpoint-4", whole / "checkpoints" / "checkpoint-4.bak")
    (whole / "checkpoints" / "checkpoint-final").mkdir()
    (whole / "status.json").write_text('{"status": "running"}')
    training["max_steps"] = 4
    result, folder = run_recipe("--resume", "auto", peft=LORA, training=training)
    assert (result.status, folder) == (0, whole), result.err
    assert (whole / "checkpoints" / "checkpoint-4.bak").is_dir()


def test_auto_takes_the_run_that_was_started_last_whatever_its_name(run_recipe, tmp_path):
    training = {"max_steps": 4, "save_steps": 2}
    _, first = run_recipe(peft=LORA, training=training)
    renamed = first.rename(first.with_name("zz-my-first-run"))
    run_recipe(peft=LORA, training=training)
    (second,) = set(renamed.parent.iterdir()) - {renamed}
    for run in (renamed, second):
        told = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps(told | {"status": "interrupted"}))
    result, _ = run_recipe("--resume", "auto", peft=LORA, training=training)
    assert result.status == 0, result.err
    assert (status(renamed)["status"], status(second)["status"]) == ("interrupted", "completed")


def test_auto_starts_anew_when_there_is_nothing_to_resume(run_recipe):
    first = run_recipe("--resume", "auto", peft=LORA)[1]
    second = run_recipe("--resume", "auto", peft=LORA)[1]
    assert status(first)["status"] == status(second)["status"] == "completed"
    assert first != second


def test_resuming_with_another_recipe_is_refused_and_says_the_difference(run_recipe):
    _, folder = run_recipe(peft=LORA, training={"save_steps": 2})
    (folder / "status.json").write_text('{"status": "interrupted"}')
    before = sorted(folder.rglob("*"))
    result, _ = run_recipe("--resume", folder, peft=LORA, training={"save_steps": 2, "learning_rate": 0.5})
    assert result.status == 1
    assert "error[recipe-changed]" in result.err
    assert "training.learning_rate: 0.01 -> 0.5" in result.err
    assert sorted(folder.rglob("*")) == before


@pytest.fixture
def resume_changed(run_recipe, tiny_phi3, tmp_path, tokenizer):
    """Changes something that a run was made from, and resumes it."""

    def resume_changed(change, **sections):
        base = shutil.copytree(tiny_phi3, tmp_path / "base")
        (tmp_path / "own.jinja").write_text(tokenizer.chat_template)
        sections |= {"model": {"name_or_path": str(base)}, "peft": LORA}
        _, folder = run_recipe(**sections)
        shutil.rmtree(folder / "adapter")
        shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
        (folder / "status.json").write_text('{"status": "interrupted"}')
        change(base)
        return run_recipe("--resume", "auto", **sections)[0]

    return resume_changed


def _other_weights(base):
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor * 1.5 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def _other_configuration(base):
    changed = json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (base / "config.json").write_text(json.dumps(changed))


def _other_tokenizer(base):
    text = (base / "tokenizer.json").read_text()
    vocabulary = json.loads(text)["model"]["vocab"]
    one, other = (next(word for word, number in vocabulary.items() if number == wanted) for wanted in (300, 301))
    swapped = json.loads(text)
    swapped["model"]["vocab"] |= {one: 301, other: 300}
    (base / "tokenizer.json").write_text(json.dumps(swapped))


def _other_template(base):
    (base.parent / "own.jinja").write_text((base.parent / "own.jinja").read_text().replace("<|user|>", "<|system|>"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_other_weights, "the base model's weights"),
        (_other_configuration, "the base model's config.json"),
        (_other_tokenizer, "the tokenizer (or its chat template)"),
        (_other_template, "the tokenizer (or its chat template)"),
    ],
)
def test_a_run_never_goes_on_from_another_model_than_it_began_with(resume_changed, change, what):
    result = resume_changed(change, training={"save_steps": 2, "chat_template_path": "own.jinja"})
    assert result.status == 1
    assert f"error[model-changed] model.name_or_path: {what} is not what the run in " in result.err


def test_a_run_whose_model_has_not_changed_goes_on(resume_changed):
    assert resume_changed(lambda _: None, training={"save_steps": 2}).status == 0


@pytest.mark.parametrize(("state", "code"), [("completed", "run-completed"), ("failed", "no-checkpoint")])
def test_a_run_that_cannot_be_resumed_says_why(run_recipe, state, code):
    _, folder = run_recipe(peft=LORA)
    shutil.rmtree(folder / "checkpoints")
    (folder / "status.json").write_text(json.dumps({"status": state}))
    assert f"error[{code}]" in run_recipe("--resume", folder, peft=LORA)[0].err
    assert "error[not-a-run]" in run_recipe("--resume", folder.parent / "nowhere", peft=LORA)[0].err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_leaves_a_checkpoint_and_its_exit_status(write_recipe, tiny_phi3, tmp_path, number, code):
    training = {"max_steps": 100_000, "logging_steps": 1}
    recipe = write_recipe(model={"name_or_path": str(tiny_phi3)}, peft=LORA, training=training)
    process = subprocess.Popen(
        [sys.executable, "-m", "recipe_runner", str(recipe)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert "Preparing" in process.stdout.readline()
    process.stdout.close()  # as `| head -1` does: the run goes on
    process.stdout = None
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/tiny/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    (folder,) = tmp_path.glob("runs/tiny/*")
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"continue with: --resume {folder}" in err
    assert status(folder)["status"] == "interrupted"
    checkpoint = Path(status(folder)["checkpoint"])
    assert (checkpoint / "adapter_model.safetensors").is_file()
    done = subprocess.run(
        [sys.executable, "-m", "recipe_runner", str(recipe), "--resume", str(folder), "--set", "training.max_steps=3"],
        capture_output=True,
        text=True,
    )
    assert "error[recipe-changed]" in done.stderr


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_training_stops_and_keeps_the_last_good_checkpoint(run_recipe, monkeypatch, what):
    from safetensors.torch import load_file
    from trl import SFTTrainer

    if what == "gradient":  # a loss that is finite, with a gradient that is not
        training_step = SFTTrainer.training_step

        def step(self, *arguments, **options):
            loss = training_step(self, *arguments, **options)
            if self.state.global_step == 3:
                next(p for p in self.model.parameters() if p.requires_grad).grad[:] = float("nan")
            return loss

        monkeypatch.setattr(SFTTrainer, "training_step", step)
    diverging = {"learning_rate": 1e30, "optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 50}
    training = {"save_steps": 1} | (diverging if what == "loss" else {"max_steps": 6})
    result, folder = run_recipe(training=training)
    assert result.status == 1
    assert re.search(rf"error\[non-finite\] the {what} of step \d+ is not a finite number", result.err)
    assert "Traceback" not in result.err
    assert status(folder)["status"] == "failed"
    assert status(folder)["checkpoint"] in result.err
    state = load_file(Path(status(folder)["checkpoint"]) / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("damage", [{"status.json": ""}, {"status.json": "{}"}, {"resolved.yaml": None}])
def test_a_damaged_run_folder_is_no_bug(run_recipe, damage):
    training = {"save_steps": 2}
    _, folder = run_recipe(peft=LORA, training=training)
    (folder / "status.json").write_text('{"status": "failed"}')
    for name, text in damage.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    assert "error[not-a-run]" in run_recipe("--resume", folder, peft=LORA, training=training)[0].err
    result, newest = run_recipe("--resume", "auto", peft=LORA, training=training)
    assert result.status == 0, result.err
    assert newest != folder


def test_auto_continues_an_older_run_when_the_newest_has_no_checkpoint(run_recipe, tmp_path):
    training = {"save_steps": 2}
    _, folder = run_recipe(peft=LORA, training=training)
    (folder / "status.json").write_text('{"status": "failed"}')
    newer = folder.with_name("99999999-000000-000000")
    newer.mkdir()
    for name in ("resolved.yaml", "status.json"):
        shutil.copy(folder / name, newer)
    run_recipe("--resume", "auto", peft=LORA, training=training, metadata={"tags": ["another"]})
    assert status(folder)["status"] == "completed"
    assert status(newer)["status"] == "failed"


BAD = {
    "unknown-key": {"training": {"learning_rat": 1}},
    "wrong-source": {"dataset": {"train": {"source": "missing.jsonl"}}},
    "precision-unavailable": {"training": {"fp16": True}},
    "model-not-found": {"model": {"name_or_path": "/nowhere"}},
    "hub-unreachable": {"model": {"name_or_path": "nobody/no-such-model"}},
    "missing-column": {"dataset": {"train": {"source": "rows.jsonl", "columns": {"output": "answer"}}}},
    "wrong-row-shape": {"dataset": {"format": "chat", "train": {"source": "rows.jsonl"}}, "rows": [{"messages": 3}]},
    "empty-dataset": {"dataset": {"train": {"source": "rows.jsonl"}}, "rows": [{"instruction": "", "output": ""}]},
    "target-not-found": {"peft": {"method": "lora", "target_modules": ["c_proj", "o_proj"]}},
    "peft-refused": {"peft": {"method": "road", "target_modules": "all-linear", "group_size": 7}},
    "training-refused": {"training": {"lr_scheduler_type": "reduce_lr_on_plateau"}},
    "tracker-missing": {"training": {"report_to": ["wandb"]}},
    "output-not-writable": {"run": {"output_dir": "/proc/runs"}},
}


@pytest.mark.parametrize("code", BAD)
def test_what_the_user_got_wrong_is_one_line_before_the_weights_and_leaves_nothing_behind(run_recipe, code, tmp_path):
    sections = {"rows": [{"instruction": "a", "output": "b"}]} | BAD[code]
    result, folder = run_recipe(**sections)
    assert result.status == 1
    (line,) = [line for line in result.err.splitlines() if "error[" in line]
    assert re.match(rf"(/.*tiny\.yaml:\d+:\d+: )?error\[{code}\] \S+: ", line), line
    assert "Traceback" not in result.err + result.out
    assert folder is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "tiny.yaml"]


def test_a_failure_after_the_weights_is_recorded(run_recipe, monkeypatch):
    from recipe_runner.problems.errors import user_error
    from recipe_runner.training import verify

    def differs(*arguments):
        raise user_error("saved-model-differs", "made up")

    monkeypatch.setattr(verify, "verify_saved", differs)
    result, folder = run_recipe(peft=LORA)
    assert result.status == 1
    assert status(folder)["status"] == "failed"
    assert "made up" in status(folder)["error"]


def test_a_bug_is_exit_status_3_with_a_log_and_a_failed_run(run_recipe, monkeypatch):
    from recipe_runner.training import card

    monkeypatch.setattr(card, "write_card", lambda *arguments: 1 / 0)
    result, folder = run_recipe(peft=LORA)
    assert result.status == 3
    assert status(folder)["status"] == "failed"
    log = Path(re.search(r"traceback is in (\S+\.log)", result.err)[1])
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


@pytest.mark.parametrize(
    ("file", "text"), [("config.json", '{"model_type": "nonsense"}'), ("config.json", "{"), ("tokenizer.json", "{")]
)
def test_a_damaged_model_folder_is_one_line_before_the_weights(run_recipe, tiny_phi3, tmp_path, file, text):
    shutil.copytree(tiny_phi3, tmp_path / "model")
    (tmp_path / "model" / file).write_text(text)
    result, folder = run_recipe(model={"name_or_path": str(tmp_path / "model")})
    assert result.status == 1, result.err
    assert re.search(r"error\[(model-config|tokenizer-not-found)\] model.name_or_path: ", result.err)
    assert folder is None


def damaged(tiny_phi3, tmp_path, damage):
    shutil.copytree(tiny_phi3, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "none":
        weights.unlink()
    else:  # pickled weights only
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(weights), tmp_path / "model" / "pytorch_model.bin")
        weights.unlink()
    return str(tmp_path / "model")


@pytest.mark.parametrize("damage", ["cut", "none", "pickled"])
def test_weights_that_cannot_be_loaded_are_one_line_and_a_failed_run(run_recipe, tiny_phi3, tmp_path, damage):
    result, folder = run_recipe(model={"name_or_path": damaged(tiny_phi3, tmp_path, damage)})
    assert result.status == 1
    assert "error[model-not-loaded] model.name_or_path: " in result.err
    assert "Traceback" not in result.err
    assert status(folder)["status"] == "failed"


@pytest.mark.parametrize(
    ("training", "key", "message"),
    [
        ({"optim": "lomo"}, "optim", "lomo: You need to install `lomo_optim`"),
        ({"optim_args": "beta1=0.8"}, "optim_args", "adamw_torch_fused has no option 'beta1'; options: none"),
        ({"optim": "sgd", "optim_args": "momentm=0.9"}, "optim_args", "'momentm'; did you mean 'momentum'?"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,nesterov"}, "optim_args", "expected name=value, name=value"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "optim_args", "sgd: Nesterov momentum requires a momentum"),
        ({"optim": "rmsprop_bnb", "optim_args": "alfa=0.9"}, "optim_args", "unexpected keyword argument 'alfa'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs", "takes: num_cycles, min_lr, min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs", "takes: num_decay_steps"),
        ({"lr_scheduler_kwargs": {"nonsense": 1}}, "lr_scheduler_kwargs", "linear takes: no options"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "high"}},
            "lr_scheduler_kwargs",
            "polynomial takes: lr_end, power",
        ),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_had_is_said_at_its_key(run_recipe, training, key, message):
    result, folder = run_recipe(peft=LORA, training=training)
    assert result.status == 1, result.err
    (line,) = [line for line in result.err.splitlines() if "error[" in line]
    assert f"training.{key}: " in line
    assert message in line
    assert folder is None  # before the weights


@pytest.mark.parametrize(
    "training",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"},
        {"optim": "ademamix", "optim_args": "beta3=0.99,t_alpha=10"},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}},
    ],
    ids=lambda training: training.get("optim", "schedule"),
)
def test_options_of_optimizer_and_schedule_are_taken(run_recipe, training):
    assert run_recipe(peft=LORA, training=training)[0].status == 0


def test_what_never_comes_in_the_steps_of_the_rows_is_said(run_recipe):
    rows = [{"instruction": f"Say {n}.", "output": f"it is {n}"} for n in range(8)]
    data = {"eval": {"fraction": 0.25}}
    training = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 50}
    result, _ = run_recipe(rows=rows, peft=LORA, dataset=data, training=training)
    assert result.status == 0, result.err
    assert (
        "warning[never-evaluated] training.eval_steps: the first evaluation would come after step 50, of " in result.err
    )
    result, _ = run_recipe(rows=rows, peft=LORA, dataset=data, training=training | {"warmup_steps": 100})
    assert result.status == 1
    assert "error[warmup-length] training.warmup_steps: a warm-up of 100 steps in " in result.err


def test_an_attention_that_does_not_exist_is_said(run_recipe):
    result, _ = run_recipe(peft=LORA, model={"attn_implementation": "nonsense"})
    assert result.status == 1, result.err
    assert "error[model-config] model.attn_implementation: " in result.err


def test_pickled_weights_load_when_the_recipe_says_so(run_recipe, tiny_phi3, tmp_path):
    model = {"name_or_path": damaged(tiny_phi3, tmp_path, "pickled"), "use_safetensors": False}
    assert run_recipe(model=model)[0].status == 0


@pytest.fixture
def limit_files():
    """As a quota does: the system refuses files that become larger than a number of bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_room_for_prepared_data_is_said(run_recipe, limit_files, monkeypatch):
    from recipe_runner.training import prepare

    read = prepare.open_sources
    monkeypatch.setattr(prepare, "open_sources", lambda *arguments: limit_files(2000) or read(*arguments))
    result, folder = run_recipe(peft=LORA, rows=[{"instruction": f"Say {n}.", "output": "x" * n} for n in range(99)])
    assert (result.status, folder) == (1, None), result.err
    assert re.search(rf"error\[disk-full\] \S*{HF_HOME.name}\S*: File too large; ", result.err)


@pytest.mark.parametrize(
    ("sections", "limit", "file"),
    [
        ({"training": {"save_steps": 1, "optim": "adafactor"}}, 20_000, "checkpoints/checkpoint-1/"),  # safetensors
        ({"peft": LORA, "training": {"save_steps": 1}}, 16_000, "checkpoints/checkpoint-1"),  # tokenizers
        ({"peft": LORA | {"r": 1}, "training": {"save_steps": 1}}, 10_500, "checkpoints/checkpoint-1/"),  # torch
        ({"training": {"save_strategy": "no", "optim": "adafactor"}}, 20_000, "model.partial/"),
    ],
    ids=["weights", "tokenizer", "optimizer", "result"],
)
def test_a_disk_without_room_is_said_with_file_and_disk(run_recipe, limit_files, sections, limit, file, monkeypatch):
    from recipe_runner.training import trainers

    build = trainers.build_trainer
    monkeypatch.setattr(trainers, "build_trainer", lambda *arguments: limit_files(limit) or build(*arguments))
    result, folder = run_recipe(**sections)
    assert result.status == 1, result.err
    (line,) = [line for line in result.err.splitlines() if "error[" in line]
    assert f"error[disk-full] {folder}/{file}" in line
    assert re.search(r": File too large; [\d,]+ of [\d,]+ bytes are free there; make room; start the run again", line)
    assert status(folder)["status"] == "failed"
    assert "File too large" in status(folder)["error"]
    assert not (folder / "model").exists()
    assert not (folder / "adapter").exists()


def test_a_status_is_written_where_a_disk_has_no_room_for_a_second_file(tmp_path, monkeypatch):
    from recipe_runner import files

    files.write_status(tmp_path, "running")
    started = status(tmp_path)["started"]

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_text", full)
    files.write_status(tmp_path, "failed", error="x" * 100_000)
    assert (status(tmp_path)["status"], status(tmp_path)["started"]) == ("failed", started)
    assert (tmp_path / "status.json").stat().st_size < 4096  # in the block that the old one has


def test_out_of_memory_names_what_to_lower(run_recipe, monkeypatch):
    import torch
    from trl import SFTTrainer

    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(SFTTrainer, "training_step", exhausted)
    result, folder = run_recipe(peft=LORA)
    assert result.status == 1
    assert "error[out-of-memory]" in result.err
    assert "per_device_train_batch_size" in result.err
    assert status(folder)["status"] == "failed"


def test_memory_that_a_cpu_does_not_have_is_said_as_that(run_recipe, monkeypatch):
    import torch
    from trl import SFTTrainer

    monkeypatch.setattr(SFTTrainer, "training_step", lambda *_: torch.empty(1 << 60))
    result, folder = run_recipe(peft=LORA)
    assert result.status == 1
    assert "error[out-of-memory] " in result.err
    assert status(folder)["status"] == "failed"


def test_batches_that_would_all_be_dropped_are_refused(run_recipe):
    rows = [{"instruction": f"Say {n}.", "output": "yes"} for n in range(8)]
    for training, evaluation in (({"per_device_train_batch_size": 9}, {}), ({}, {"eval": {"fraction": 0.5}})):
        training |= {"dataloader_drop_last": True, "eval_strategy": "epoch" if evaluation else "no"}
        result, folder = run_recipe(rows=rows, peft=LORA, training=training, dataset=evaluation)
        assert (result.status, folder) == (1, None), result.err
        assert "error[too-few-rows] training.dataloader_drop_last: " in result.err
        assert "rows (after packing) make no whole batch of " in result.err


def test_a_run_that_stops_early_by_itself_is_not_complete(run_recipe, monkeypatch):
    from trl import SFTTrainer

    monkeypatch.setattr(SFTTrainer, "train", lambda self, **_: setattr(self.state, "max_steps", 4))
    result, folder = run_recipe(peft=LORA)
    assert result.status == 1
    assert "error[training-stopped] training ended after 0 of 4 steps" in result.err
    assert status(folder)["status"] == "failed"
    assert not (folder / "adapter").exists()


def test_activations_are_not_offloaded_from_a_cpu(run_recipe):
    result, folder = run_recipe(peft=LORA, training={"activation_offloading": True})
    assert (result.status, folder) == (1, None), result.err
    assert "error[training-refused] training.activation_offloading: activations are moved from an acc" in result.err


def test_a_new_recipe_trains(run_cli, tmp_path, tiny_phi3):
    data = write_rows(tmp_path / "rows.jsonl", CHAT * 5)
    file = tmp_path / "mine.yaml"
    run_cli("new", file, "--format", "chat", "--method", "qlora", "--model", tiny_phi3, "--data", data)
    result = run_cli(file, "--output-dir", tmp_path / "runs", "--set", "training.max_steps=2")
    assert result.status == 0, result.err


def test_output_dir_may_have_any_name(write_recipe, run_cli, tmp_path):
    result = run_cli(write_recipe(model={"name_or_path": "/nowhere"}), "--output-dir", tmp_path / "runs 😀: x")
    assert "error[model-not-found]" in result.err


def test_packages_that_a_recipe_needs_and_this_machine_lacks_are_told(run_cli):
    file = EXAMPLES / "warned" / "missing_packages.yaml"
    expected = re.findall(r"# expect: (\S+) (\S+) (.*)", file.read_text())
    lines = run_cli("validate", file).out.splitlines()[:-1]
    assert len(lines) == len(expected) == 3
    for line, (place, code, message) in zip(lines, expected, strict=True):
        assert line.startswith(f"{file}:{place}: warning[{code}] {message}")


def test_progress_is_a_table_with_the_first_and_the_last_step(run_recipe):
    held_out = {"eval": {"fraction": 0.25}}
    training = {"max_steps": 5, "logging_steps": 100, "eval_strategy": "steps", "eval_steps": 3}
    result, folder = run_recipe(peft=LORA, dataset=held_out, training=training)
    assert result.status == 0, result.err
    lines = [line.split() for line in result.out.splitlines()]
    begin = lines.index(["step", "loss", "rate", "tokens/s", "left"])
    table = lines[begin + 1 : begin + 6]
    assert [row[0] for row in table] == ["1", "3", "5", "5", "5"]
    assert [row[1] for row in table][1:4:2] == ["held-out", "held-out"]
    assert float(table[0][2]) > float(table[2][2])  # the rate falls
    assert table[2][4] == "0:00:00"
    assert table[4][1:3] == ["steps", "in"]
    assert "{'loss'" not in result.out + result.err
    card = (folder / "README.md").read_text()
    assert re.search(r"Training loss: [\d.]+ at step 1, [\d.]+ at step 5\n", card)


def test_one_step_has_one_loss(run_recipe):
    _, folder = run_recipe(peft=LORA, training={"max_steps": 1})
    assert re.search(r"Training loss: [\d.]+ at step 1\n", (folder / "README.md").read_text())


def test_a_batch_larger_than_the_data_is_said_as_it_is(run_recipe):
    rows = [{"instruction": "a", "output": "b"}] * 3
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    result, _ = run_recipe(rows=rows, peft=LORA, training=batch)
    assert "steps      1 of all 3 rows: up to 2 per device x 4 accumulated x 1 process; 1 epochs" in result.out
