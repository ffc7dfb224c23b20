"""Broken copies of run folders: a resumed run trains as if nothing had been broken, or says what is."""

import json
import shutil

import pytest
from mutate import Answers, mutate_bytes, mutate_json, time_limit
from shared import CHAT, LORA, losses, status

from recipe_runner.files import hash_file


def mutate_run(folder, chance):
    """Breaks one or two files of a run folder, or takes them away; returns what was done."""
    told = []
    for _ in range(chance.choice([1, 1, 2])):
        file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        kind = chance.random()
        if kind < 0.15:
            file.unlink()
            what = "removed"
        elif kind < 0.2:
            file.unlink()
            file.mkdir()
            what = "a folder"
        elif kind < 0.25:
            shutil.rmtree(file.parent) if file.parent != folder else file.unlink()
            what = "removed with its folder"
        elif kind < 0.6 and file.suffix == ".json":
            value = json.loads(file.read_text())
            what = mutate_json(value, chance) if value else "as it was"
            file.write_text(json.dumps(value))
        else:
            data, what = mutate_bytes(file.read_bytes(), chance)
            file.write_bytes(data)
        told.append(f"{file.relative_to(folder)}: {what}")
    return "; ".join(told)


@pytest.mark.mutants(24, 500)
def test_run_folders(small_recipe, run_cli, tmp_path, mutants, report_figure):
    """The weights of a run that goes on are those of the run that was never broken, bit for bit."""
    training = {"max_steps": 3, "max_length": 64, "save_steps": 1, "save_total_limit": 3}
    recipe = small_recipe(rows=CHAT, dataset={"format": "chat"}, peft=LORA, training=training)
    home = tmp_path / "runs" / "tiny"
    assert run_cli(recipe).status == 0
    (whole,) = home.iterdir()
    weights, expected = hash_file(whole / "adapter" / "adapter_model.safetensors"), losses(whole)
    shutil.rmtree(whole / "adapter")
    shutil.rmtree(whole / "checkpoints" / "checkpoint-3")
    (whole / "status.json").write_text(json.dumps(status(whole) | {"status": "failed"}))
    kept = tmp_path / "kept"
    whole.rename(kept)
    answers = Answers("run folders", mutants.seed)
    for number in range(mutants.count):
        shutil.copytree(kept, whole)
        what = mutate_run(whole, answers.chance)
        with time_limit(what):
            result = run_cli(recipe, "--resume", whole if number % 2 else "auto")
        answers.add(what, result, "" if result.status else "trained")
        if result.status == 0:
            newest = max(home.iterdir())
            if (
                hash_file(newest / "adapter" / "adapter_model.safetensors") != weights
                or status(newest)["status"] != "completed"
            ):
                answers.wrong.append(f"{what}: trained something else: {losses(newest)}, not {expected}")
        shutil.rmtree(home)
        home.mkdir()
    answers.check(report_figure)
