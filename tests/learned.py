"""Runs that really learned: a tiny model that answers four questions by heart."""

import contextlib
import io
import json
import sys

import pytest
from shared import write_rows

WORDS = ("one", "two", "three", "four")
ROWS = [{"instruction": f"say {word}", "output": f"{word} it is"} for word in WORDS]
SYSTEM = "Be brief."
# The head of a random model is too small to be sure of anything: it is trained, too.
ADAPTER = {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}
TRAINING = {
    "max_steps": 100,
    "learning_rate": 0.02,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "eval_on_start": True,
    "logging_steps": 20,
}


def call(*arguments):
    """Runs `recipe-run ARGUMENTS` in this process, for fixtures that several tests share."""
    from recipe_runner.cli import main

    before, sys.argv = sys.argv, ["recipe-run", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
            main()
    finally:
        sys.argv = before
    assert caught.value.code == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="session")
def train(tmp_path_factory, tiny_phi3):
    """Writes rows and a recipe, trains by it, and returns the run folder."""

    def train(name, rows=ROWS, form="instruction", train_on="completion", stage="sft", **sections):
        folder = tmp_path_factory.mktemp(name)
        data = {"format": form, "train": {"source": write_rows(folder / "rows.jsonl", rows).name}}
        data |= {"eval": {"source": "rows.jsonl"}} | ({"train_on": train_on} if train_on else {})
        recipe = {
            "schema_version": 1,
            "name": name,
            "stage": stage,
            "model": {"name_or_path": str(tiny_phi3)} | sections.pop("model", {}),
            "peft": ADAPTER,
            "dataset": data | sections.pop("dataset", {}),
            "training": TRAINING | sections.pop("training", {}),
            "run": {"output_dir": str(folder / "runs")} | sections.pop("run", {}),
        } | sections
        file = folder / f"{name}.yaml"
        file.write_text(json.dumps({key: value for key, value in recipe.items() if value is not None}))
        call(file)
        return next((folder / "runs" / name).iterdir())

    return train


@pytest.fixture(scope="session")
def learned(train):
    """The run of an adapter that answers its four rows by heart, with a system prompt."""
    return train("learned", dataset={"system": SYSTEM})


@pytest.fixture(scope="session")
def whole(train):
    """The run of a whole model that was trained on the same rows."""
    return train("whole", peft=None, training={"learning_rate": 0.005}, dataset={"system": SYSTEM})


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a run folder, to be damaged."""
    import shutil

    return lambda run: shutil.copytree(run, tmp_path / "copies" / run.name)
