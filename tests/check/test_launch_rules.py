"""Launch configurations: read strictly, and checked against a recipe, from a file and from the environment."""

import json
import os
import subprocess

import pytest
import yaml
from conftest import ROOT
from shared import DEEPSPEED, FSDP, IN_8BIT, UNQUANTIZED, ZERO3, with_section

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


CONTRADICTIONS = [
    ("fsdp-quantized-storage", FSDP, ()),
    ("fsdp-quantized-storage", FSDP, ("quantization={load_in_4bit: true}",)),
    ("method-not-sharded", DEEPSPEED, ("peft={method: adalora, target_modules: all-linear}",)),
    ("method-not-sharded", FSDP, ("peft.init_lora_weights=eva",)),
    ("method-not-sharded", ZERO3, ("training.peft_optimizer={name: loraplus, loraplus_lr_ratio: 8}",)),
    ("samples-not-sharded", FSDP, ("run.samples={prompts: [hello], every: 10}",)),
    (
        "samples-not-sharded",
        ZERO3,
        (
            "run.samples={prompts: [hello], every: 10}",
            "peft={method: prompt_tuning, num_virtual_tokens: 4}",
            "training.packing=false",
        ),
    ),
    ("sharded-8bit", FSDP, IN_8BIT),
    ("sharded-8bit", ZERO3, IN_8BIT),
    ("deepspeed-optimizer", with_section(DEEPSPEED, "deepspeed_config", offload_optimizer_device="cpu"), ()),
    ("launcher-precision", DEEPSPEED | {"mixed_precision": "fp16"}, ("training.bf16=true",)),
    ("launcher-precision", DEEPSPEED | {"mixed_precision": "bf16"}, ("training.bf16=false",)),
    ("pinned-by-launcher", with_section(DEEPSPEED, "deepspeed_config", gradient_accumulation_steps=4), ()),
    ("pinned-by-launcher", with_section(DEEPSPEED, "deepspeed_config", gradient_clipping=0.5), ()),
    ("checkpointing-twice", with_section(FSDP, "fsdp_config", fsdp_activation_checkpointing=True), UNQUANTIZED),
    ("fsdp1-deprecated", with_section(FSDP, "fsdp_config", fsdp_version=1), UNQUANTIZED),
    ("saves-nothing", with_section(FSDP, "fsdp_config", fsdp_state_dict_type="SHARDED_STATE_DICT"), UNQUANTIZED),
    ("saves-nothing", with_section(ZERO3, "deepspeed_config", zero3_save_16bit_model=False), ()),
    ("one-process-only", {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}, ()),
    ("one-process-only", {"distributed_type": "NO", "num_processes": 2}, ()),
    ("one-process-only", FSDP | {"use_cpu": True}, UNQUANTIZED),
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
    with pytest.raises(UserError, match="not a JSON object"):
        read_launch(file)


def test_a_json_file_is_a_launch_configuration_too(tmp_path):
    file = tmp_path / "launch.json"
    file.write_text('{\n\t"distributed_type": "MULTI_GPU", "num_processes": 2}')
    assert read_launch(file).values["num_processes"] == 2


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
