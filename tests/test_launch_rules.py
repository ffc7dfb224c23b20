"""Launch configurations: read strictly, and checked against a recipe, from a file and from the environment."""

import json
import os
import subprocess

import pytest
import yaml
from conftest import ROOT

from recipe_runner.cli import cli
from recipe_runner.launch import rules
from recipe_runner.launch.configuration import launch_from_environment, read_launch
from recipe_runner.launch.rules import apply_rules, check_launch
from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.resolve import load_recipe

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
NAMES = ["cpu", "cpu_2proc", "single_gpu", "ddp", "fsdp2", "fsdp2_qlora", "multi_node_fsdp2", "multi_node_zero3"]
NAMES += ["deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"]


def test_every_launch_configuration_is_there_and_explained():
    assert sorted(NAMES) == [file.stem for file in CONFIGS]
    for file in CONFIGS:
        text = file.read_text()
        comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        assert "Costs: " in comment
        assert f"--config_file accelerate_configs/{file.name}" in comment


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_reads_a_shipped_configuration_as_we_do(file):
    from accelerate.commands.config.config_args import load_config_from_file

    theirs, ours = load_config_from_file(str(file)), read_launch(file)
    for key, value in ours.values.items():
        assert getattr(theirs, key) == value, key
    pinned = ("gradient_accumulation_steps", "gradient_clipping")
    assert not ours.is_deepspeed or all(ours.values["deepspeed_config"][key] == "auto" for key in pinned)


COMMANDS = {  # what the comment of each file says, for the recipe it names
    "fsdp2": ["quantization=null"],
    "fsdp2_qlora": ["quantization.bnb_4bit_quant_storage=bfloat16"],
    "deepspeed_zero3_offload": ["quantization=null", "training.optim=adamw_torch"],
    "multi_node_fsdp2": ["quantization=null"],
}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_command_in_its_comment_contradicts_nothing(file):
    recipe = load_recipe("phi3_chat_qlora", COMMANDS.get(file.stem, ()))
    assert check_launch(read_launch(file), recipe) == []


DEEPSPEED = {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 2}}
ZERO3 = DEEPSPEED | {"deepspeed_config": {"zero_stage": 3, "zero3_save_16bit_model": True}}
FSDP = {
    "distributed_type": "FSDP",
    "num_processes": 2,
    "fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"},
}
INT8 = ("quantization={load_in_8bit: true}",)
PLAIN = ("quantization=null",)


def with_section(base, section, **keys):
    return base | {section: base[section] | keys}


CONTRADICTIONS = [
    ("fsdp-quantized-storage", FSDP, ()),
    ("fsdp-quantized-storage", FSDP, ("quantization={load_in_4bit: true}",)),
    ("sharded-8bit", FSDP, INT8),
    ("sharded-8bit", ZERO3, INT8),
    ("deepspeed-optimizer", with_section(DEEPSPEED, "deepspeed_config", offload_optimizer_device="cpu"), ()),
    ("launcher-precision", DEEPSPEED | {"mixed_precision": "fp16"}, ("training.bf16=true",)),
    ("launcher-precision", DEEPSPEED | {"mixed_precision": "bf16"}, ("training.bf16=false",)),
    ("pinned-by-launcher", with_section(DEEPSPEED, "deepspeed_config", gradient_accumulation_steps=4), ()),
    ("pinned-by-launcher", with_section(DEEPSPEED, "deepspeed_config", gradient_clipping=0.5), ()),
    ("checkpointing-twice", with_section(FSDP, "fsdp_config", fsdp_activation_checkpointing=True), PLAIN),
    ("fsdp1-deprecated", with_section(FSDP, "fsdp_config", fsdp_version=1), PLAIN),
    ("saves-nothing", with_section(FSDP, "fsdp_config", fsdp_state_dict_type="SHARDED_STATE_DICT"), PLAIN),
    ("saves-nothing", with_section(ZERO3, "deepspeed_config", zero3_save_16bit_model=False), ()),
    ("one-process-only", {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}, ()),
    ("one-process-only", {"distributed_type": "NO", "num_processes": 2}, ()),
    ("one-process-only", FSDP | {"use_cpu": True}, PLAIN),
    ("uneven-machines", {"distributed_type": "MULTI_GPU", "num_processes": 3, "num_machines": 2}, ()),
]


@pytest.mark.parametrize(("code", "values", "overrides"), CONTRADICTIONS, ids=lambda value: str(value)[:30])
def test_a_contradiction_is_found_by_validate_with_its_line(run_cli, tmp_path, code, values, overrides):
    file = tmp_path / "launch.yaml"
    file.write_text(yaml.safe_dump(values))
    sets = [part for override in overrides for part in ("--set", override)]
    result = run_cli("validate", "phi3_chat_qlora", "--accelerate-config", file, *sets)
    (line,) = [line for line in result.out.splitlines() if f"[{code}]" in line]
    assert line.startswith(f"{file}:")
    assert int(line.split(":")[1]) > 0
    assert result.status == (0 if code == "fsdp1-deprecated" else 1)


def test_every_rule_is_tried_and_names_its_source():
    launch = launch_from_environment({"ACCELERATE_USE_FSDP": "true"})
    applied = dict(apply_rules(launch, load_recipe("phi3_chat_qlora")))
    assert {code for code, *_ in CONTRADICTIONS} == set(applied)
    assert all("Source: " in getattr(rules, found.gi_code.co_name).__doc__ for found in applied.values())


@pytest.mark.parametrize(
    ("values", "overrides", "code"),
    [
        (FSDP, (), "fsdp-quantized-storage"),
        (ZERO3, INT8, "sharded-8bit"),
        (with_section(DEEPSPEED, "deepspeed_config", gradient_accumulation_steps=4), (), "pinned-by-launcher"),
        (with_section(FSDP, "fsdp_config", fsdp_activation_checkpointing=True), PLAIN, "checkpointing-twice"),
        (DEEPSPEED | {"mixed_precision": "fp16"}, ("training.bf16=true",), "launcher-precision"),
    ],
)
def test_the_same_is_found_in_the_environment_that_accelerate_sets(tmp_path, values, overrides, code):
    """By accelerate's own functions: from our file to the environment of a process, and back."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = tmp_path / "launch.yaml"
    file.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "num_machines": 1, **values}))
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "--main_process_port", "0", "x.py"])
    )
    arguments.deepspeed_fields_from_accelerate_config = ""
    if values["distributed_type"] == "FSDP":
        environment = prepare_multi_gpu_env(arguments)
    else:
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    found = check_launch(launch_from_environment(environment), load_recipe("phi3_chat_qlora", overrides))
    assert code in [problem.code for problem in found]


BAD = [
    ("a: 1\n", "launch-file", "this is no launch configuration of accelerate"),
    ("num_processes: 2\nnum_procs: 3\n", "launch-unknown-key", "num_procs: unknown key; did you mean 'num_processes'?"),
    (
        "distributed_type: FSDP\nfsdp_config: {fsdp_vershion: 2}\n",
        "launch-unknown-key",
        "fsdp_config.fsdp_vershion: unknown key; did you mean 'fsdp_version'?",
    ),
    ("distributed_type: NO\n", "launch-file", "accelerate reads NO as false here (YAML 1.1); write 'NO', in quotes"),
    ("distributed_type: FSPD\n", "launch-file", "'FSPD' is not one of"),
    (
        "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: nowhere.json}\n",
        "launch-file",
        "the DeepSpeed file nowhere.json can't be read: No such file",
    ),
    ("[1", "yaml-syntax", ""),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: [1]\n", "launch-file", "is not of type 'object'"),
    ("distributed_type: FSDP\nfsdp_config: 3\n", "launch-file", "is not of type 'object'"),
    ("distributed_type: DEEPSPEED\ndeepspeed_config: {gradient_accumulation_steps: four}\n", "launch-file", "four"),
    ("distributed_type: 'NO'\nmain_training_function: 2024-01-01\n", "launch-file", "accelerate reads 2024-01-01"),
    ("distributed_type: 'NO'\nmain_process_ip: 2024-13-45\n", "launch-file", "accelerate can't read it"),
    ("num_processes: 0\ndistributed_type: MULTI_GPU\n", "launch-file", "less than the minimum of 1"),
    ("num_processes: 2\n", "launch-file", "'distributed_type' is a required property"),
    ("distributed_type: MULTI_GPU\ngpu_ids: 0\n", "launch-file", "is not of type 'string'"),
    ("distributed_type: 'NO'\ncompute_environment: FOO\n", "launch-file", "is not one of"),
]


@pytest.mark.parametrize(("text", "code", "said"), BAD)
def test_a_file_that_accelerate_would_misread_is_refused(run_cli, tmp_path, text, code, said):
    file = tmp_path / "launch.yaml"
    file.write_text(text)
    for command in (["validate", "phi3_chat_qlora"], ["train", "phi3_chat_qlora"]):
        result = run_cli(*command, "--accelerate-config", file)
        assert result.status == 1
        assert f"error[{code}]" in result.out + result.err
        assert said in result.out + result.err
        assert "Traceback" not in result.err


def test_a_deepspeed_file_is_looked_into(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {}, "zero_optimization": {"stage": 3}}))
    file = tmp_path / "launch.yaml"
    section = {"deepspeed_config_file": str(tmp_path / "ds.json")}
    file.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section}))
    found = check_launch(read_launch(file), load_recipe("phi3_chat_qlora"))
    assert {problem.code for problem in found} == {"deepspeed-optimizer", "saves-nothing"}
    told = {"fp16": {"enabled": True}, "train_batch_size": 999, "gradient_accumulation_steps": "four"}
    (tmp_path / "ds.json").write_text(json.dumps(told | {"zero_optimization": {"stage": 2}}))
    found = check_launch(read_launch(file), load_recipe("phi3_chat_qlora"))
    assert [problem.code for problem in found] == ["launcher-precision", "pinned-by-launcher", "pinned-by-launcher"]
    file.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section | {"zero_stage": 3}}))
    with pytest.raises(UserError, match="takes zero_stage from the DeepSpeed file"):
        read_launch(file)
    file.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section}))
    (tmp_path / "ds.json").write_text("[1]")
    with pytest.raises(UserError, match="no JSON object"):
        read_launch(file)


def test_names_and_missing_files(run_cli):
    err = run_cli("train", "phi3_chat_qlora", "--accelerate-config", "deepspeed_zero4").err
    assert "error[launch-file]" in err
    assert "did you mean 'deepspeed_zero" in err
    assert run_cli("train", "phi3_chat_qlora", "--num-processes", "2").status == 2
    assert "error[unreadable-file]" in run_cli("validate", "phi3_chat_qlora", "--accelerate-config", "no.yaml").out


def test_options_are_checked_like_the_file(run_cli):
    err = run_cli("train", "phi3_chat_qlora", "--accelerate-config", "single_gpu", "--num-processes", "4").err
    assert "error[one-process-only]" in err
    err = run_cli("train", "phi3_chat_qlora", "--accelerate-config", "multi_node_zero3", "--num-machines", "3").err
    assert "error[uneven-machines]" in err


def test_a_json_file_is_a_launch_configuration_too(tmp_path):
    file = tmp_path / "launch.json"
    file.write_text('{\n\t"distributed_type": "MULTI_GPU", "num_processes": 2}')
    assert read_launch(file).values["num_processes"] == 2


def test_more_processes_than_devices(run_cli, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    err = run_cli("train", "phi3_chat_qlora", "--accelerate-config", "ddp").err
    assert "error[too-many-processes]" in err
    assert "starts 4 processes on this machine, which has 2 GPUs; --num-processes 2" in err


STUBS = {
    "srun": 'shift; exec env SLURM_NODEID=1 "$@"',
    "scontrol": '[ "$1" = show ] && printf "node-a\\nnode-b\\n" || echo "$@" > "$OUT/scontrol"',
    "recipe-run": 'printf "%s\\n" "$@" > "$OUT/arguments"; exit "$STATUS"',
}


def run_script(command, tmp_path, status, **environment):
    """Runs an example with stubs for the scheduler and for us; returns its exit status and what we would be told."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, text in STUBS.items():
        stub = tmp_path / "bin" / name
        stub.write_text(f"#!/bin/bash\n{text}\n")
        stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment |= {"PATH": path, "OUT": str(tmp_path), "STATUS": str(status)}
    done = subprocess.run(["bash", *command], env=os.environ | environment, capture_output=True, text=True)
    assert not done.stderr
    arguments = (tmp_path / "arguments").read_text().splitlines()
    cli.get_command(None, "train").make_context("train", [*arguments])  # exits if it is not what we understand
    return done.returncode, arguments


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, True)])
def test_the_slurm_job_starts_each_machine_and_is_requeued_when_it_was_interrupted(tmp_path, status, requeued):
    job = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "77", "SLURM_NNODES": "2"}
    found, arguments = run_script([ROOT / "examples" / "slurm.sbatch"], tmp_path, status, **job)
    assert found == status
    assert (tmp_path / "scontrol").exists() == requeued
    assert arguments[:5] == ["phi3_chat_qlora", "--resume", "auto", "--accelerate-config", "multi_node_zero3"]
    options = dict(zip(arguments[5::2], arguments[6::2], strict=True))
    assert options == {
        "--num-machines": "2",
        "--num-processes": "8",
        "--machine-rank": "1",
        "--main-process-ip": "node-a",
        "--main-process-port": "20077",
    }


def test_the_skypilot_task_starts_each_machine(tmp_path):
    task = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    machines = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "4", "SKYPILOT_NODE_RANK": "1"}
    _, arguments = run_script(["-c", task["run"]], tmp_path, 0, SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", **machines)
    assert arguments[0] == "phi3_chat_qlora"
    assert arguments[arguments.index("--num-processes") + 1] == "8"
    assert arguments[arguments.index("--main-process-ip") + 1] == "10.0.0.1"
