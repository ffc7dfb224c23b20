"""Which precision a run takes, by what its device can do; devices that are not here are faked by torch's answers."""

import os
import subprocess
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


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Runs git in a folder, with nobody's configuration, and makes a repository with a commit there first."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)

    def git(folder, *command):
        if not folder.exists():
            folder.mkdir()
            (folder / "recipe.yaml").write_text("a: 1\n")
            git(folder, "init", "--quiet")
            git(folder, "add", ".")
            git(folder, "-c", "user.name=n", "-c", "user.email=n@example.org", "commit", "--quiet", "-m", "one")
        return subprocess.run(
            ["git", "-C", folder, *command], check=True, capture_output=True, text=True
        ).stdout.strip()

    return git


def test_commit_and_changes_of_a_repository_are_recorded(git, tmp_path):
    from recipe_runner.training.environment import describe_environment

    commit = git(tmp_path / "mine", "rev-parse", "HEAD")
    assert describe_environment(tmp_path / "mine")["git_commit"] == commit
    (tmp_path / "mine" / "recipe.yaml").touch()
    assert describe_environment(tmp_path / "mine")["git_commit"] == commit
    (tmp_path / "mine" / "recipe.yaml").write_text("a: 2\n")
    assert describe_environment(tmp_path / "mine")["git_commit"] == f"{commit}-dirty"
    assert describe_environment(tmp_path)["git_commit"] is None


@pytest.mark.parametrize("carrier", ["bare", "fsmonitor", "clean", "process", "hook", "submodule", "lazy fetch"])
def test_nothing_that_a_strangers_repository_configures_is_run(git, tmp_path, carrier):
    """Each carrier leaves a marker when it is run, as git itself does for all but the last; a name is still given."""
    from recipe_runner.training.environment import describe_environment

    marker, folder = tmp_path / "marker", tmp_path / "strange"
    evil = f"echo run >> {marker}; cat"
    git(folder, "status")
    home = folder
    if carrier == "bare":  # what a clone can carry: a folder that git takes for a repository
        home = folder / "recipes"
        home.mkdir()
        git(home, "init", "--quiet", "--bare", ".")
        for key, value in {"core.bare": "false", "core.worktree": "..", "core.fsmonitor": evil}.items():
            git(home, "config", "--file", "config", key, value)
    elif carrier == "submodule":
        inside = folder / "inside"
        git(inside, "status")
        git(folder, "-c", "advice.addEmbeddedRepo=false", "add", "inside")
        git(inside, "config", "core.fsmonitor", evil)
    elif carrier == "hook":
        hook = folder / ".git" / "hooks" / "post-index-change"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\n{evil}\n")
        hook.chmod(0o755)
    elif carrier == "lazy fetch":
        for key in ("url", "promisor"):
            git(folder, "config", f"remote.origin.{key}", {"url": f"ext::sh -c {evil}", "promisor": "true"}[key])
        git(folder, "config", "protocol.ext.allow", "always")
        blob = git(folder, "rev-parse", "HEAD:recipe.yaml")
        (folder / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
        (folder / "recipe.yaml").write_text("a: 3\n")
    elif carrier == "fsmonitor":
        git(folder, "config", "core.fsmonitor", evil)
    else:
        (folder / ".git" / "info").mkdir(exist_ok=True)
        (folder / ".git" / "info" / "attributes").write_text("* filter=evil\n")
        git(folder, "config", f"filter.evil.{carrier}", evil)
        git(folder, "config", "filter.evil.required", "true")
    (folder / "recipe.yaml").touch()
    os.utime(folder / "recipe.yaml", (1, 1))  # git must look into the file
    marker.unlink(missing_ok=True)
    commit = describe_environment(home)["git_commit"]
    assert not marker.exists()
    assert commit is None if carrier == "bare" else len(commit.removesuffix("-dirty")) == 40
    if carrier != "lazy fetch":
        os.utime(folder / "recipe.yaml", (2, 2))
        subprocess.run(["git", "-C", home, "describe", "--always", "--dirty"], capture_output=True)
        subprocess.run(["git", "-C", home, "status"], capture_output=True)
        assert marker.exists()  # the carrier works
