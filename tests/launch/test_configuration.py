"""Launch configurations as accelerate reads them: from a file, from the environment, on this machine."""

import pytest
import yaml
from conftest import ROOT
from shared import DEEPSPEED, FSDP, IN_8BIT, UNQUANTIZED, ZERO3, with_section

from recipe_runner.launch.configuration import launch_from_environment, read_launch
from recipe_runner.launch.rules import check_launch
from recipe_runner.recipe.resolve import load_recipe

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_reads_a_shipped_configuration_as_we_do(file):
    from accelerate.commands.config.config_args import load_config_from_file

    theirs, ours = load_config_from_file(str(file)), read_launch(file)
    for key, value in ours.values.items():
        assert getattr(theirs, key) == value, key
    pinned = ("gradient_accumulation_steps", "gradient_clipping")
    assert not ours.is_deepspeed or all(ours.values["deepspeed_config"][key] == "auto" for key in pinned)


@pytest.mark.parametrize(
    ("values", "overrides", "code"),
    [
        (FSDP, (), "fsdp-quantized-storage"),
        (ZERO3, IN_8BIT, "sharded-8bit"),
        (with_section(DEEPSPEED, "deepspeed_config", gradient_accumulation_steps=4), (), "pinned-by-launcher"),
        (with_section(FSDP, "fsdp_config", fsdp_activation_checkpointing=True), UNQUANTIZED, "checkpointing-twice"),
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
    ("a: 1\n", "launch-file", "this is not a launch configuration of accelerate"),
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


def test_more_processes_than_devices(run_cli, monkeypatch):
    import torch

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    err = run_cli("train", "phi3_chat_qlora", "--accelerate-config", "ddp").err
    assert "error[too-many-processes]" in err
    assert "starts 4 processes on this machine, which has 2 GPUs; --num-processes 2" in err
