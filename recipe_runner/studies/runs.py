"""Runs the variants of a study one after another, and goes on where an interrupted study stopped."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe_runner.files import hash_file, list_runs, read_object, read_status, write_json
from recipe_runner.problems.errors import Interrupted, UserError
from recipe_runner.recipe.local import is_file_source, list_files
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.runs.folder import find_outdated, last_checkpoint, recipe_changes
from recipe_runner.runs.metrics import measure_speed
from recipe_runner.studies.study import Study, Variant

FIGURES = "figures.json"
INTERRUPTED = (130, 143)  # exit statuses of a run that a signal has ended


@dataclass(frozen=True)
class Outcome:
    """What came of a variant with one seed.

    Attributes:
        variant: What ran.
        seed: With which seed.
        figures: What was measured; empty where something failed.
        failure: Why there is nothing, in one line.
    """

    variant: Variant
    seed: int | None
    figures: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def run_study(
    study: Study, folder: Path, tell: Callable[[str], None], then: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Runs and measures every variant with every seed.

    What is there from before, made by the same recipe on the same data, is kept; a run that was interrupted goes on.

    Args:
        study: What is run.
        folder: Of the study.
        tell: Is told what happens.
        then: Is given everything that is known, after each variant.

    Raises:
        Interrupted: A signal has ended a run.
    """
    outcomes: list[Outcome] = []
    done: dict[tuple[str, int | None], Path] = {}
    trained = [variant for variant in study.variants if not variant.merged_from]
    merged = [variant for variant in study.variants if variant.merged_from]
    tasks = [(variant, seed) for seed in study.seeds for variant in (*trained, *merged)]
    for number, (variant, seed) in enumerate(tasks, 1):
        tell(f"{number} of {len(tasks)}: {variant.name}{'' if seed is None else f', seed {seed}'}")
        place = folder / variant.slug / ("run" if seed is None else f"seed-{seed}")
        try:
            if variant.merged_from:
                outcome = _run_merged(study, variant, seed, done, place)
            else:
                recipe = variant.load(seed, place)
                if recipe.stages:
                    raise _Failed("a pipeline is no variant: name one of its stages")
                run = _train(variant, seed, recipe, place)
                done[(variant.name, seed)] = run
                outcome = Outcome(variant, seed, _measure(study, seed, run, None, place))
        except UserError as error:
            outcome = Outcome(variant, seed, failure=str(error.problems[0]))
        except _Failed as error:
            outcome = Outcome(variant, seed, failure=str(error))
        tell(f"  {outcome.failure}" if outcome.failure else f"  {_in_short(outcome.figures)}")
        outcomes.append(outcome)
        then(outcomes)
    return outcomes


class _Failed(Exception):
    """A step of a variant failed; the message says why, in one line."""


def _in_short(figures: Mapping[str, Any]) -> str:
    parts = [f"{name} {sum(of['sums']) / max(sum(of['parts']), 1):.4f}" for name, of in figures["measures"].items()]
    return ", ".join(parts)


def _train(variant: Variant, seed: int | None, recipe: Recipe, place: Path) -> Path:
    """The completed run of a variant: one that is there, or a new one, or one that goes on.

    Raises:
        Interrupted: A signal has ended it.
    """
    if run := _find_completed(recipe):
        return run
    unfinished = [
        run
        for run in list_runs(recipe.home)
        if last_checkpoint(run) and read_status(run) not in ("completed", "damaged") and not _differs(run, recipe)
    ]
    arguments = [part for override in variant.arguments(seed, place) for part in ("--set", override)]
    command = ["train", variant.recipe, *arguments, "--resume", str(unfinished[-1]) if unfinished else "never"]
    _call(["-m", "recipe_runner", *command], place / "train.log")
    run = _find_completed(recipe)
    if run is None:
        raise _Failed(f"it did not complete: {place / 'train.log'}")
    return run


def _find_completed(recipe: Recipe) -> Path | None:
    """The latest completed run of a recipe on its data as it is now."""
    runs = [run for run in list_runs(recipe.home) if read_status(run) == "completed" and not _differs(run, recipe)]
    return runs[-1] if runs else None


def _differs(run: Path, recipe: Recipe) -> bool:
    """Whether a run was made with another recipe, or on other data."""
    if recipe_changes(run, recipe.values):
        return True
    local = [source.source for source in recipe.dataset.sources if is_file_source(source.source)]
    return bool(find_outdated(run, {str(file): hash_file(file) for name in local for file in list_files(name)}))


def _run_merged(
    study: Study, variant: Variant, seed: int | None, done: Mapping[tuple[str, int | None], Path], place: Path
) -> Outcome:
    """Measures another variant's adapter, merged into its base."""
    run = done.get((variant.merged_from, seed))
    if run is None:
        raise _Failed(f"'{variant.merged_from}' has no run that could be merged")
    merged, mark = place / "merged", place / "merged.json"
    if read_object(mark).get("run") != str(run) or not merged.is_dir():
        shutil.rmtree(merged, ignore_errors=True)
        _call(["-m", "recipe_runner", "merge", str(run), "--output", str(merged)], place / "merge.log")
        write_json(mark, {"run": str(run)})
    return Outcome(variant, seed, _measure(study, seed, run, merged, place))


def _measure(study: Study, seed: int | None, run: Path, merged: Path | None, place: Path) -> dict[str, Any]:
    """The figures of a result; those that are there, where they are of the same run and asked in the same way.

    The time of a token is that of the first seed: it is no matter of chance.
    """
    asked: dict[str, Any] = {"run": str(run), "merged": str(merged) if merged else None}
    asked |= {"evaluate": dict(study.evaluate), "latency": study.latency and seed == study.seeds[0]}
    data = study.evaluate.get("data")
    known = {**asked, "data": hash_file(Path(data)) if data else None}
    if (found := read_object(place / FIGURES)).get("of") == known:
        return {key: value for key, value in found.items() if key != "of"}
    made = place / "measured.json"
    made.unlink(missing_ok=True)
    write_json(place / "task.json", asked | {"output": str(made)})
    _call(["-m", "recipe_runner.studies.measure", str(place / "task.json")], place / "measure.log")
    figures = read_object(made) | _read_training(run)
    write_json(place / FIGURES, figures | {"of": known})
    return figures


def _read_training(run: Path) -> dict[str, Any]:
    """What the run folder says of the training: parameters, memory, time of a step, tokens a second."""
    environment, status = read_object(run / "environment.json"), read_object(run / "status.json")
    figures: dict[str, Any] = dict(environment.get("parameters") or {})
    figures["peak_memory_bytes"] = (status.get("measured") or {}).get("peak_memory_bytes")
    figures["machine"] = {key: environment.get(key) for key in ("processor", "cpu_count", "gpus")}
    figures |= measure_speed(run)
    return figures


def _call(arguments: list[str], log: Path) -> None:
    """Runs Python in a process of its own, with its output in a file.

    Raises:
        Interrupted: A signal has ended it.
        _Failed: It failed; the message is its error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen([sys.executable, *arguments], stdout=stream, stderr=subprocess.STDOUT)
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the process, too: it saves a checkpoint
            status = process.wait()
            raise Interrupted("interrupted; the same command goes on from here", 2) from None
    if status in INTERRUPTED or status < 0:
        number = status - 128 if status > 0 else -status
        raise Interrupted(f"interrupted ({log}); the same command goes on from here", number)
    if status:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "error[" in line]
        raise _Failed(lines[0] if lines else f"it ended with status {status}: {log}")


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON values."""
    told = {"variant": outcome.variant.name, "seed": outcome.seed, "overrides": list(outcome.variant.overrides)}
    return told | ({"failure": outcome.failure} if outcome.failure else dict(outcome.figures))
