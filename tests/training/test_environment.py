"""Which precision a run takes, by what its device can do; devices that are not here are faked by torch's answers."""

from types import SimpleNamespace

import pytest

from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.resolve import load_recipe


@pytest.fixture
def choose(write_recipe, monkeypatch):
    """Chooses the precision of a recipe on a machine with a kind of device."""
    import torch

    from recipe_runner.training import environment

    def choose(kind, has_bf16=True, adapter=True, launcher="no", **training):
        device = SimpleNamespace(type=kind) if kind else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        monkeypatch.setattr(torch.xpu, "get_device_name", lambda *_: "Some Arc")
        monkeypatch.setattr(environment, "is_bf16_available", lambda: has_bf16)
        recipe = load_recipe(str(write_recipe(training=training)))
        return environment.choose_precision(recipe.training, None, adapter, launcher)

    return choose


@pytest.mark.parametrize(
    ("kind", "bf16", "said"),
    [
        ("cuda", True, "bfloat16 weights, bf16 mixed precision (Some GPU has bfloat16 units)"),
        ("cuda", False, "float32 weights, no mixed precision (Some GPU has no bfloat16 units)"),
        ("xpu", True, "bfloat16 weights, bf16 mixed precision (Some Arc has bfloat16 units)"),
        ("mps", True, "bfloat16 weights, bf16 mixed precision (this machine's mps device has bfloat16 units)"),
        ("mps", False, "float32 weights, no mixed precision (this machine's mps device has no bfloat16 units)"),
        (None, True, "float32 weights, no mixed precision (a CPU)"),
    ],
)
def test_precision_is_that_of_the_device(choose, kind, bf16, said):
    assert str(choose(kind, bf16)) == said


def test_a_cpu_that_is_asked_for_is_taken_on_any_machine(choose):
    assert str(choose("xpu", use_cpu=True)) == "float32 weights, no mixed precision (a CPU)"
    assert choose("mps", use_cpu=True).bf16 is False


@pytest.mark.parametrize(
    ("kind", "key"), [("mps", "tf32"), ("xpu", "tf32"), (None, "fp16"), (None, "bf16"), (None, "tf32")]
)
def test_what_the_device_lacks_is_refused(choose, kind, key):
    with pytest.raises(UserError, match=f"does not have {key}"):
        choose(kind, **{key: True})


def test_processes_join_over_gloo_on_a_cpu_only(monkeypatch):
    import torch

    from recipe_runner.launch import processes

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: SimpleNamespace(type="xpu"))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("joined over gloo"))
    assert processes.join_processes(use_cpu=False, timeout_seconds=8) == {}
    assert processes.device_kind(use_cpu=False) == "xpu"
    assert processes.device_kind(use_cpu=True) == "cpu"


def test_the_accelerators_of_any_maker_are_recorded(monkeypatch, tmp_path):
    import torch

    from recipe_runner.training.environment import describe_environment

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: SimpleNamespace(type="xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda index: f"Arc {index}")
    assert describe_environment(tmp_path)["gpus"] == ["Arc 0", "Arc 1"]
