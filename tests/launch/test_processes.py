"""Several processes on one machine: the same training as with one, one voice, and an end when one of them fails."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import HF_HOME, ROOT
from shared import LORA, NF4, losses, metrics, status, write_rows

ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": HF_HOME.name,
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
PAIRS = [{"prompt": f"say {n}", "chosen": f"it is {n}", "rejected": f"no idea, ask again {n}"} for n in range(40)]
ZERO = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
    "use_cpu": True,
    "mixed_precision": "no",
    "main_process_port": 0,
}


def zero(stage):
    """The shipped configuration of a ZeRO stage, for two processes on a CPU."""
    shipped = yaml.safe_load((ROOT / "accelerate_configs" / f"deepspeed_zero{stage}.yaml").read_text())
    return ZERO | {"deepspeed_config": shipped["deepspeed_config"]}


LAUNCHES = {
    "ddp": yaml.safe_load((ROOT / "accelerate_configs" / "cpu_2proc.yaml").read_text()) | {"main_process_port": 0},
    "zero2": zero(2),
    "zero3": zero(3),
}


@pytest.fixture
def launch(small_recipe, tmp_path, run_cli, monkeypatch):
    """Runs a small recipe, by a launcher in processes of its own; returns what came out and its run folder, if any."""

    def launch(
        *arguments,
        launcher=None,
        apart=False,
        stage="sft",
        training=None,
        rows=None,
        name="tiny",
        start=False,
        **sections,
    ):
        rows = PAIRS if stage == "dpo" and rows is None else rows
        training = {"learning_rate": 2e-3, "max_length": 64} | (training or {})
        training = {key: value for key, value in training.items() if value is not None}
        sections = {"peft": LORA, "run": {"output_dir": str(tmp_path / "runs"), "global_batch_size": 4}} | sections
        recipe = small_recipe(stage, rows, name, training=training, **sections)
        command = [sys.executable, "-m", "recipe_runner", str(recipe), *arguments]
        if launcher:
            file = tmp_path / f"{launcher}.yaml"
            file.write_text(yaml.safe_dump(LAUNCHES[launcher]))
            command += ["--accelerate-config", str(file)]
        options = {"cwd": tmp_path, "env": ENVIRONMENT, "text": True}
        if not (launcher or start or apart):
            monkeypatch.chdir(tmp_path)
            result = run_cli(recipe, *arguments)
            done = subprocess.CompletedProcess(command, result.status, result.out, result.err)
            return done, max((tmp_path / "runs" / name).glob("*"), default=None)
        if start:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        done = subprocess.run(command, capture_output=True, timeout=300, **options)
        return done, max((tmp_path / "runs" / name).glob("*"), default=None)

    return launch


def launch_several(launcher, commands, folder):
    """Runs several commands in the two processes of one launch: starting these is what takes most of the time."""
    file = folder / f"{launcher}.yaml"
    file.write_text(yaml.safe_dump(LAUNCHES[launcher]))
    worker = ROOT / "tests" / "launch" / "several_worker.py"
    command = ["accelerate", "launch", "--config_file", str(file), str(worker), *commands]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("launcher", LAUNCHES)
def test_the_same_training_on_any_number_of_processes(launch, tmp_path, launcher):
    """Same global batch and seed: per-step losses and adapters of one process and of two agree; and both answer."""
    from safetensors.torch import load_file

    settings = {f"{stage}_{bits}": (stage, bits) for stage in ("sft", "dpo") for bits in (None, "nf4")}
    alone, recipes = {}, []
    for name, (stage, bits) in settings.items():
        asked = {"prompts": ["say hello"], "every": 2, "max_new_tokens": 4}
        run = {"output_dir": str(tmp_path / "runs"), "global_batch_size": 4, "samples": asked}
        done, alone[name] = launch(stage=stage, quantization=NF4 if bits else None, name=name, run=run)
        assert done.returncode == 0, done.stderr
        assert "of 4 rows: 2 per device x 2 accumulated x 1 process;" in done.stdout
        recipes.append(str(tmp_path / f"{name}.yaml"))
    done = launch_several(launcher, recipes, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 4 rows: 2 per device x 1 accumulated x 2 processes") == 4
    assert done.stdout.count("run folder") == 4
    assert done.stderr.count("warning[many-truncated]") == 2  # of sft: once, not once a process
    assert done.stderr.count("warning[unusual-learning-rate]") == 2  # of dpo
    for name, before in alone.items():
        folder = max((tmp_path / "runs" / name).iterdir())
        assert folder != before
        assert status(folder)["status"] == "completed"
        assert losses(folder) == pytest.approx(losses(before), rel=1e-3), name
        assert [entry["step"] for entry in metrics(folder) if "samples" in entry] == [2, 4]
        golden = [
            [json.loads(line) for line in (of / "golden.jsonl").read_text().splitlines()] for of in (before, folder)
        ]
        assert all(row["answer_ids"] for row in golden[1])
        assert [row["prompt_ids"] for row in golden[0]] == [row["prompt_ids"] for row in golden[1]]
        one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (before, folder))
        assert one.keys() == two.keys()
        for tensor in one:
            assert float((one[tensor].float() - two[tensor].float()).abs().max()) < 2e-3, (name, tensor)


def test_judged_rows_and_reward_models_are_the_same_on_two_processes(launch, tmp_path):
    """KTO estimates its KL term within the batches of a device, which are the same; a mean of two is taken later."""
    from safetensors.torch import load_file

    pairs = {"dataset": {"format": "preference"}, "rows": PAIRS}
    settings = {"judged": ("kto", pairs, 5e-3), "scores": ("reward", {"rows": PAIRS}, 1e-3)}
    alone, recipes = {}, []
    for name, (stage, more, _) in settings.items():
        done, alone[name] = launch(stage=stage, name=name, training={"per_device_train_batch_size": 2}, **more)
        assert done.returncode == 0, done.stderr
        recipes.append(str(tmp_path / f"{name}.yaml"))
    done = launch_several("ddp", recipes, tmp_path)
    assert done.returncode == 0, done.stderr
    for name, before in alone.items():
        folder = max((tmp_path / "runs" / name).iterdir())
        assert folder != before, (name, done.stderr)
        assert losses(folder) == pytest.approx(losses(before), rel=settings[name][2]), name
        one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (before, folder))
        assert one.keys() == two.keys()
        for tensor in one:
            assert float((one[tensor].float() - two[tensor].float()).abs().max()) < 5e-3, (name, tensor)


def test_vision_models_train_the_same_on_two_processes(seeing_recipe, run_cli, tmp_path, monkeypatch):
    """Rows with an image, two, and none: a process may have none in a batch; also where what sees is trained."""
    from safetensors.torch import load_file

    settings = {
        "idefics3_sft": ("idefics3", "sft", {}),
        "idefics3_dpo": ("idefics3", "dpo", {}),
        "gemma3_sft": ("gemma3", "sft", {}),
        "connector": ("idefics3", "sft", {"unfreeze": ["model.connector.*"]}),
    }
    alone, recipes = {}, []
    monkeypatch.chdir(tmp_path)
    for name, (model_type, stage, more) in settings.items():
        run = {"output_dir": str(tmp_path / "runs"), "global_batch_size": 2}
        training = {"per_device_train_batch_size": 1, "learning_rate": 2e-3}
        recipe = seeing_recipe(model_type, stage, name=name, peft=LORA, run=run, training=training, **more)
        result = run_cli(recipe)
        assert result.status == 0, result.err
        alone[name] = max((tmp_path / "runs" / name).iterdir())
        recipes.append(str(recipe))
    done = launch_several("ddp", recipes, tmp_path)
    assert done.returncode == 0, done.stderr
    for name, before in alone.items():
        folder = max((tmp_path / "runs" / name).iterdir())
        assert folder != before, (name, done.stderr)
        assert losses(folder) == pytest.approx(losses(before), rel=1e-3), name
        one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (before, folder))
        assert one.keys() == two.keys()
        for tensor in one:
            assert float((one[tensor].float() - two[tensor].float()).abs().max()) < 2e-3, (name, tensor)


@pytest.mark.parametrize("stage", ["rloo", "grpo"])
def test_prompts_reach_every_process_and_their_answers_are_judged_together(launch, small_recipe, tmp_path, stage):
    """The same prompts in each step as on one process; all answers are kept, in whole groups; the reward is of all."""
    rewards = [{"name": "length", "max": 6}, {"name": "repetition_penalty", "ngram_size": 1, "weight": 0.5}]
    training = {"max_completion_length": 12, "num_generations": 4, "max_steps": 3, "max_length": None}
    training |= {"per_device_train_batch_size": 8, "logging_steps": 1}
    rows = [{"prompt": f"say {n}", "wanted": f"it is {n}"} for n in range(12)]
    options = {"stage": stage, "rows": rows, "rewards": rewards, "dataset": {"reward_columns": ["wanted"]}}
    run = {"output_dir": str(tmp_path / "runs")}
    done, before = launch(name="tried", training=training, run=run, **options)
    assert done.returncode == 0, done.stderr
    training["per_device_train_batch_size"] = 4
    training = {key: value for key, value in training.items() if value is not None}
    small_recipe(name="tried", training=training, run=run, peft=LORA, **options)
    done = launch_several("ddp", [f"{tmp_path / 'tried.yaml'} --resume never"], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = max((tmp_path / "runs" / "tried").iterdir())
    read = [
        [json.loads(line) for line in (of / "completions.jsonl").read_text().splitlines()] for of in (before, folder)
    ]
    for step in (1, 2, 3):
        one, two = (sorted(entry["prompt"] for entry in of if entry["step"] == step) for of in read)
        assert len(two) == 8
        assert one == two
        given = [entry["rewards"] for entry in read[1] if entry["step"] == step]
        mean = sum(of["length"] + 0.5 * of["repetition_penalty"] for of in given) / len(given)
        logged = next(entry for entry in metrics(folder) if entry["step"] == step and "loss" in entry)
        assert logged["reward"] == pytest.approx(mean, abs=1e-4)


ADALORA = {"method": "adalora", "init_r": 6, "target_r": 2, "target_modules": "all-linear"}
WAYS = {  # of tuning, and the launchers that can't have them
    "bottleneck": ({"peft": {"method": "bottleneck", "bottleneck_size": 8}}, ()),
    "hybrid": ({"peft": LORA, "unfreeze": ["norms", "layers[-1]"]}, ()),
    "partial": ({"peft": None, "unfreeze": ["norms", "lm_head"]}, ("zero2",)),
    "prompt": ({"peft": {"method": "prompt_tuning", "num_virtual_tokens": 4}}, ("zero2",)),
    "adalora": ({"peft": ADALORA}, ("zero2", "zero3")),
    "eva": ({"peft": LORA | {"init_lora_weights": "eva"}}, ("zero2", "zero3")),
    "ia3": (
        {"peft": {"method": "ia3", "target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
        (),
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHES)
def test_every_way_of_tuning_is_the_same_on_two_processes(launch, tmp_path, launcher):
    from safetensors.torch import load_file

    alone, recipes = {}, []
    for name, (sections, not_for) in WAYS.items():
        if launcher in not_for:
            continue
        done, alone[name] = launch(name=name, **sections)
        assert done.returncode == 0, done.stderr
        recipes.append(str(tmp_path / f"{name}.yaml"))
    done = launch_several(launcher, recipes, tmp_path)
    assert done.returncode == 0, done.stderr
    for name, before in alone.items():
        folder = max((tmp_path / "runs" / name).iterdir())
        assert folder != before, (name, done.stderr)
        assert status(folder)["status"] == "completed", (name, done.stderr)
        assert losses(folder) == pytest.approx(losses(before), rel=1e-3), name
        (one,), (two,) = (list(run.glob("*/*.safetensors")) for run in (before, folder))
        one, two = load_file(one), load_file(two)
        assert one.keys() == two.keys()
        for tensor in one:
            assert float((one[tensor].float() - two[tensor].float()).abs().max()) < 2e-3, (name, tensor)


@pytest.mark.parametrize("launcher", LAUNCHES)
def test_the_longest_batch_leaves_no_trace_on_two_processes(small_recipe, tmp_path, launcher):
    """Gradients of a part of a step are kept in places of DeepSpeed's own: none may be left for the first step."""
    recipes = {}
    for stage in ("sft", "dpo"):
        for first in (True, False):
            name = f"{stage}_{first}".lower()
            run = {"output_dir": str(tmp_path / "runs"), "longest_batch_first": first}
            training = {"learning_rate": 2e-3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
            rows = PAIRS if stage == "dpo" else None
            file = small_recipe(stage, rows, name, training=training, peft=LORA | {"lora_dropout": 0.2}, run=run)
            recipes[name] = str(file)
    done = launch_several(launcher, recipes.values(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tried in") == 2
    weights = {}
    for name in recipes:
        (folder,) = (tmp_path / "runs" / name).iterdir()
        weights[name] = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        assert len(losses(folder)) == 4
    assert weights["sft_true"] == weights["sft_false"]
    assert weights["dpo_true"] == weights["dpo_false"]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def workers(process):
    """Processes of a launch that run the recipe, by rank."""
    import psutil

    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "recipe_runner" in child.cmdline():
                found[int(child.environ().get("RANK", -1))] = child
        except psutil.Error:
            continue  # it has just ended
    return found


def begun(tmp_path, steps=2):
    return lambda: [
        file for file in tmp_path.glob("runs/*/*/metrics.jsonl") if file.read_text().count('"loss"') >= steps
    ]


@pytest.fixture
def long_run(launch, tmp_path):
    """A run on two processes that goes on until it is stopped; nothing of it is left behind."""
    started = []

    def long_run(**training):
        process = launch(launcher="ddp", start=True, training={"max_steps": 100_000, **training})
        started.append(process)
        (metrics,) = wait_for(begun(tmp_path))
        return process, workers(process), metrics.parent

    yield long_run
    for process in started:
        process.kill()


def ended(process, ranks, seconds):
    _, err = process.communicate(timeout=seconds)
    wait_for(lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks.values()), 30)
    assert "Traceback" not in err
    return err


def test_sigterm_to_a_launch_leaves_a_checkpoint_and_143(long_run, launch):
    process, ranks, folder = long_run()
    process.send_signal(signal.SIGTERM)
    err = ended(process, ranks, 60)
    assert process.returncode == 143, err
    assert err.count("continue with: --resume") == 1
    assert status(folder)["status"] == "interrupted"
    assert (Path(status(folder)["checkpoint"]) / "complete").is_file()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_launcher_and_processes_alike_is_one_signal(long_run, number, code):
    """Ctrl-C reaches all of them, and so does the scheduler's SIGTERM; the launcher then passes it on once more."""
    process, ranks, folder = long_run()
    for one in (process, *ranks.values()):
        one.send_signal(number)
    err = ended(process, ranks, 60)
    assert process.returncode == code, err
    assert (Path(status(folder)["checkpoint"]) / "complete").is_file()


def test_a_signal_to_one_rank_stops_all_as_that_signal(long_run):
    """A scheduler may tell one machine only."""
    process, ranks, folder = long_run()
    ranks[1].send_signal(signal.SIGTERM)
    err = ended(process, ranks, 60)
    assert process.returncode == 143, err
    assert (Path(status(folder)["checkpoint"]) / "complete").is_file()


def test_a_signal_while_a_rank_looks_for_one_does_not_stop_it_alone(monkeypatch):
    """It looked, saw none, and has not told the others of its own: they would wait for its gradients for ever."""
    from torch.distributed import HashStore
    from transformers import TrainerControl, TrainerState

    from recipe_runner.training import callbacks

    class Store(HashStore):
        def check(self, keys):
            found = super().check(keys)
            one(signal.SIGTERM, None)
            return found

    store = Store()
    monkeypatch.setattr(callbacks, "_get_default_store", lambda: store)
    one, other = (callbacks.Interruption(speaks=False) for _ in range(2))
    stopped = []
    for step in (1, 2, 3):
        for rank in (one, other):
            control = TrainerControl()
            rank.on_step_end(SimpleNamespace(world_size=2), TrainerState(global_step=step), control)
            stopped.append(control.should_training_stop)
            store.check = super(Store, store).check
    assert stopped == [False, False, False, False, True, True]


def test_one_process_is_launched_without_a_go_between(launch, tmp_path):
    (tmp_path / "cpu.yaml").write_text((ROOT / "accelerate_configs" / "cpu.yaml").read_text())
    process = launch("--accelerate-config", "cpu.yaml", start=True, training={"max_steps": 100_000})
    wait_for(begun(tmp_path))
    assert workers(process) == {}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_rank_that_dies_ends_the_run(long_run):
    process, ranks, folder = long_run()
    ranks[1].kill()
    err = ended(process, ranks, 60)
    assert process.returncode == 128 + signal.SIGKILL, err
    assert "error[process-lost] rank 1 was ended by SIGKILL, and so were the others" in err
    assert status(folder)["status"] != "completed"


def test_a_rank_that_hangs_ends_the_run_in_the_stated_time(long_run):
    process, ranks, folder = long_run(ddp_timeout=8)
    ranks[1].suspend()
    began = time.monotonic()
    err = ended(process, ranks, 100)
    assert time.monotonic() - began < 60  # the launcher gives a process 30 seconds to end by itself
    assert process.returncode == 1
    assert "error[process-lost] another process died, or hung for 8 s (training.ddp_timeout)" in err
    assert status(folder)["status"] == "failed"


def test_what_is_wrong_is_said_once_by_a_launch(launch):
    done, folder = launch(launcher="ddp", rows=[{"instruction": "a", "output": "b"}])
    assert done.returncode == 1
    assert done.stderr.count("error[too-few-rows]") == 1
    assert "2 processes, but 1 rows" in done.stderr
    assert "Traceback" not in done.stderr
    assert folder is None


def test_a_port_that_is_taken(launch, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = ["--num-machines", "2", "--main-process-ip", "127.0.0.1", "--main-process-port"]
        done, _ = launch(*options, str(taken.getsockname()[1]), launcher="ddp")
    assert done.returncode == 1
    assert "error[port-in-use]" in done.stderr
    assert "Traceback" not in done.stderr


def interrupted(folder, step):
    """Makes a completed run look like one that was killed after a checkpoint."""
    for path in [folder / "adapter", *(folder / "checkpoints").glob("checkpoint-*")]:
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)
    (folder / "status.json").write_text('{"status": "running"}')


def test_resuming_on_more_processes_takes_the_same_steps_or_is_refused(launch, tmp_path):
    training = {"max_steps": 6, "save_steps": 3}
    grouped = training | {"train_sampling_strategy": "group_by_length"}
    plain = {"run": {"output_dir": str(tmp_path / "runs")}}  # without a global batch size
    folders = {}
    for name, sections in (
        ("same", {"training": training}),
        ("grouped", {"training": grouped}),
        ("plain", {"training": training} | plain),
    ):
        _, folders[name] = launch(name=name, **sections)
    whole = losses(folders["same"])
    for folder in folders.values():
        interrupted(folder, 3)
    uneven = "same.yaml --set run.global_batch_size=6"
    done = launch_several("ddp", [uneven, *(f"{name}.yaml --resume auto" for name in folders)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "error[global-batch-size]" in done.stderr
    assert "6 rows can't be shared evenly by 2 processes of 2 rows each" in done.stderr
    assert "Resuming with 2 and 4, begun with 1 processes and steps of 4 rows" in done.stdout
    assert f"Completed: {folders['same']}" in done.stdout
    assert losses(folders["same"]) == pytest.approx(whole, rel=1e-3)
    assert done.stderr.count("error[world-size-changed]") == 2
    assert "rows grouped by length would come in another order" in done.stderr
    assert "set run.global_batch_size: 2" in done.stderr
    assert {name: status(folder)["status"] for name, folder in folders.items()} == {
        "same": "completed",
        "grouped": "running",  # refused before anything was touched
        "plain": "running",
    }


def test_a_stream_is_shared_by_the_processes_and_gone_on_with(launch, tmp_path):
    """Each process reads its own rows; together they read what one would; resumed, each goes on where it was."""
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(60)]
    dataset = {"format": "instruction", "streaming": True}
    training = {"max_steps": 20, "save_steps": 10, "logging_steps": 1}
    done, alone = launch(rows=rows, dataset=dataset, training=training)
    assert done.returncode == 0, done.stderr
    done = launch_several("ddp", ["tiny.yaml"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rows of the stream in all" in done.stdout
    folder = max((tmp_path / "runs" / "tiny").iterdir())
    assert folder != alone
    whole, checkpoint = losses(folder), folder / "checkpoints" / "checkpoint-10"
    at = [json.loads((checkpoint / f"stream-{n}.json").read_text()) for n in range(2)]
    assert [place["skip"] + place["position"]["given"] for place in at] == [20, 20]
    interrupted(folder, 10)
    done, _ = launch("--resume", folder, rows=rows, dataset=dataset, training=training)
    assert "error[world-size-changed]" in done.stderr
    assert "each process goes on with its own part of the stream" in done.stderr
    done = launch_several("ddp", [f"tiny.yaml --resume {folder}"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == whole


def test_resuming_on_changed_data_is_refused(launch, tmp_path):
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(40)]
    training = {"max_steps": 4, "save_steps": 2}
    _, folder = launch(rows=rows, training=training)
    interrupted(folder, 2)
    done, _ = launch("--resume", "auto", rows=[*rows, rows[0]], training=training)
    assert done.returncode == 1
    assert f"error[data-changed] dataset: {tmp_path / 'rows.jsonl'} is not what the run in" in done.stderr


def progressed(tmp_path, step):
    """The metrics of the run that is killed, once it has gone beyond a step."""
    files = list(tmp_path.glob("runs/killed/*/metrics.jsonl"))
    return [file for file in files if f'"step": {step + 1},' in file.read_text()]


def test_killed_at_random_moments_the_run_loses_nothing(launch, tmp_path, report_figure):
    """Ten times SIGKILL, at seeded moments of training and saving: the losses are those of an uninterrupted run."""
    import torch
    from safetensors.torch import load_file

    training = {"max_steps": 150, "save_steps": 2, "save_total_limit": 1, "learning_rate": 1e-3}
    sections = {
        "training": training,
        "peft": LORA | {"lora_dropout": 0.1},
        "run": {"output_dir": str(tmp_path / "runs")},
    }
    done, whole = launch(name="whole", apart=True, **sections)
    assert done.returncode == 0, done.stderr
    chance, kills, reached = random.Random(0), 0, []
    while kills < 10:
        process = launch("--resume", "auto", name="killed", start=True, **sections)
        resumed = max(reached, default=0)
        (metrics,) = wait_for(lambda n=resumed: progressed(tmp_path, n))
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.communicate()
        kills += 1
        folder = metrics.parent
        complete = list(folder.glob("checkpoints/*/complete"))
        assert complete or not reached, "the only good checkpoint is gone"
        reached += [int(marker.parent.name.rpartition("-")[2]) for marker in complete]
        for marker in complete:
            assert load_file(marker.parent / "adapter_model.safetensors")
            assert torch.load(marker.parent / "optimizer.pt", weights_only=True)
            assert json.loads((marker.parent / "trainer_state.json").read_text())["global_step"]
    done, folder = launch("--resume", "auto", name="killed", apart=True, **sections)
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(whole)
    assert len(losses(whole)) == 150
    report_figure(f"{kills} SIGKILLs in 150 steps: the same losses, bit for bit")


def test_a_pipeline_on_two_processes(launch, tmp_path, write_recipe, tiny_phi3):
    write_rows(tmp_path / "text.jsonl", [{"text": f"a page {n} about it"} for n in range(60)])
    same = {"model": {"name_or_path": str(tiny_phi3)}, "peft": LORA}
    training = {"max_steps": 2, "max_length": 96, "logging_steps": 1, "per_device_train_batch_size": 1}
    write_recipe(
        "one",
        stage="pretrain",
        dataset={"format": "text", "train": {"source": "text.jsonl"}},
        training=training,
        **same,
    )
    write_recipe("two", training=training, **same)
    recipe = {"schema_version": 1, "name": "chain", "stage": "pipeline", "stages": ["one.yaml", "two.yaml"]}
    (tmp_path / "chain.yaml").write_text(json.dumps(recipe))
    (tmp_path / "ddp.yaml").write_text(yaml.safe_dump(LAUNCHES["ddp"]))
    command = [sys.executable, "-m", "recipe_runner", "chain.yaml", "--accelerate-config", "ddp.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "chain").iterdir()
    assert [stage["status"] for stage in status(folder)["stages"]] == ["completed"] * 2
    assert done.stdout.count("run folder") == 2
    assert len(list(folder.glob("[12]/*/*"))) == 2


def test_fsdp2_configuration_is_what_accelerate_builds_from_our_file(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    for name in ("fsdp2", "fsdp2_qlora", "multi_node_fsdp2"):
        options = ["--config_file", str(ROOT / "accelerate_configs" / f"{name}.yaml"), "--main_process_port", "0"]
        options += ["--main_process_ip", "10.0.0.1", "--machine_rank", "1", "x.py"]
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(options))
        for key, value in prepare_multi_gpu_env(arguments).items():
            if key.startswith(("FSDP_", "ACCELERATE_")):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
        assert plugin.activation_checkpointing is False
        assert plugin.cpu_ram_efficient_loading is True


def test_an_adapter_trains_the_same_when_torch_shards_the_model(tiny_phi3, tmp_path):
    """FSDP2 itself, on gloo: the losses of one process, with half of the weights on each of two."""
    found = {}
    for count in (1, 2):
        result = tmp_path / f"{count}.json"
        command = (
            f"torchrun --standalone --nproc-per-node {count} {ROOT}/tests/launch/fsdp2_worker.py {tiny_phi3} {result}"
        )
        done = subprocess.run(command.split(), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found[count] = json.loads(result.read_text())
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)
    assert found[1]["losses"][-1] < found[1]["losses"][0]
    assert found[2]["share"] == pytest.approx(0.5, abs=0.02)
