"""Every way to launch, as people type it: from a checkout, from an installed wheel, with accelerate."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from shared import write_rows

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def sh(command, folder, **environment):
    return subprocess.run(
        command, shell=True, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def overrides(tiny_phi3, tmp_path):
    """What a Phi-3 recipe needs to be run as it is, without a hub: a tiny Phi-3 and rows of the right shape."""
    rows = {
        "chat": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        "instruct": {"instruction": "hi", "input": "", "output": "hello"},
        "text": {"text": "a document about nothing"},
        "dpo": {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
    }

    def overrides(kind):
        file = tmp_path / f"{kind}.jsonl"
        write_rows(file, [rows[kind]] * (400 if kind == "text" else 40))
        source = f"{{source: {file}}}"
        return (
            f"--set model.name_or_path={tiny_phi3} --set 'dataset.train={source}' --set 'dataset.eval={source}' "
            f"--set training.num_train_epochs=1 --output-dir {tmp_path / 'runs'}"
        )

    return overrides


def completed(result, tmp_path, name):
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs" / name).iterdir()
    assert json.loads((folder / "status.json").read_text())["status"] == "completed"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    return folder


@pytest.mark.parametrize("kind", ["chat", "instruct", "text", "dpo"])
def test_shipped_phi3_recipe_runs_as_it_is_on_a_tiny_phi3(kind, overrides, tmp_path):
    name = f"phi3_{kind}_qlora"
    result = sh(f"accelerate launch recipe-run recipes/{name}.yaml {overrides(kind)}", ROOT)
    folder = completed(result, tmp_path, name)
    assert "4-bit nf4 base" in result.stdout
    assert "eval_loss" in (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "command",
    [
        "recipe-run recipes/phi3_text_qlora.yaml",
        "python -m recipe_runner recipes/phi3_text_qlora.yaml",
        "accelerate launch --config_file accelerate_configs/cpu.yaml recipe-run recipes/phi3_text_qlora.yaml",
    ],
)
def test_other_commands_from_the_repository_root(command, overrides, tmp_path):
    result = sh(f"{command} {overrides('text')}", ROOT)
    completed(result, tmp_path, "phi3_text_qlora")
    assert "default-launch-config" not in result.stderr
    assert ("launcher   accelerate, accelerate_configs/cpu.yaml" in result.stdout) == ("cpu.yaml" in command)


def test_no_python_launch_from_anywhere(overrides, tmp_path):
    command = f"accelerate launch --no_python recipe-run phi3_text_qlora {overrides('text')}"
    completed(sh(command, tmp_path), tmp_path, "phi3_text_qlora")


def test_a_configuration_of_the_machine_that_nobody_named_is_told(overrides, tmp_path):
    home = tmp_path / "home"
    (home / "accelerate").mkdir(parents=True)
    text = (ROOT / "accelerate_configs" / "cpu.yaml").read_text()
    (home / "accelerate" / "default_config.yaml").write_text(text)
    command = f"recipe-run recipes/phi3_text_qlora.yaml {overrides('text')}"
    result = sh(f"accelerate launch {command}", ROOT, HF_HOME=str(home))
    assert f"{home}/accelerate/default_config.yaml: warning[default-launch-config]" in result.stderr
    assert f"launcher   accelerate, with this machine's own configuration: {home}" in result.stdout


def test_the_shipped_pipeline_runs_as_it_is_on_a_tiny_model(tiny_phi3, tmp_path):
    command = f"recipe-run smollm2_desk_pipeline --set model.name_or_path={tiny_phi3} --output-dir {tmp_path / 'runs'}"
    result = sh(command, ROOT)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs" / "smollm2_desk_pipeline").iterdir()
    report = (folder / "README.md").read_text()
    assert "held-out pairs ranked right" in report
    assert [stage["status"] for stage in json.loads((folder / "status.json").read_text())["stages"]] == [
        "completed"
    ] * 3


def test_two_processes_train_one_run_on_data_that_was_prepared_before(overrides, tmp_path):
    """Two gloo processes on a CPU, as torchrun starts them: one run folder, one summary, both in step.

    The data was prepared outside the launcher; neither process makes it again, nor writes another entry.
    """
    home = {"HF_HOME": str(tmp_path / "home")}
    prepared = sh(f"recipe-run prepare phi3_text_qlora {overrides('text')}".split(" --output-dir")[0], ROOT, **home)
    assert prepared.returncode == 0, prepared.stderr
    entries = tmp_path / "home" / "recipe-runner" / "prepared"
    (entry,) = [folder for folder in entries.iterdir() if folder.is_dir()]
    written = (entry / "manifest.json").stat().st_mtime_ns
    command = f"torchrun --nproc-per-node 2 -m recipe_runner phi3_text_qlora {overrides('text')}"
    result = sh(command, ROOT, ACCELERATE_USE_CPU="true", **home)
    completed(result, tmp_path, "phi3_text_qlora")
    assert "2 processes" in result.stdout
    assert result.stdout.count("run folder") == 1
    assert [folder for folder in entries.iterdir() if folder.is_dir()] == [entry]
    assert (entry / "manifest.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["cpu", "single_gpu"])
def test_launch_configurations_are_what_accelerate_reads(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert config.num_processes == 1
    assert config.use_cpu == (name == "cpu")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = f"python -m pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir {folder} {ROOT}"
    built = sh(command, folder)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_holds_the_shelf_and_works_in_an_empty_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    names = {str(file.relative_to(ROOT)) for file in (ROOT / "recipes").glob("*.yaml")}
    names |= {
        "schema/recipe.schema.json",
        "accelerate_configs/cpu.yaml",
        "recipes/data/tickets_train.jsonl",
        "docs/errors.md",
    }
    assert all((tmp_path / "site" / "recipe_runner" / "_shelf" / name).is_file() for name in names)
    empty = tmp_path / "empty"
    empty.mkdir()
    python_path = {"PYTHONPATH": str(tmp_path / "site")}
    listed = sh("python -m recipe_runner list --format json", empty, **python_path)
    assert {row["name"] for row in json.loads(listed.stdout)} == {
        file.stem for file in (ROOT / "recipes").glob("*.yaml")
    }
    assert all(row["file"].startswith(str(tmp_path / "site")) for row in json.loads(listed.stdout))
    checked = sh("python -m recipe_runner validate phi3_chat_qlora smollm2_tickets_lora", empty, **python_path)
    assert (checked.returncode, checked.stdout) == (0, "2 recipes, 0 errors, 0 warnings\n")


def test_wrong_command_line_is_exit_status_2(tmp_path):
    for command in (
        "recipe-run",
        "recipe-run validate",
        "recipe-run validate --nonsense x",
        "recipe-run list --nothing",
    ):
        result = sh(command, tmp_path)
        assert result.returncode == 2, command
        assert "Traceback" not in result.stderr


def test_subcommand_wins_over_a_file_of_its_name(tmp_path):
    (tmp_path / "list").write_text("not a recipe")
    assert "phi3_chat_qlora" in sh("recipe-run list", tmp_path).stdout
