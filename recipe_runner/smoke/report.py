"""Many recipes: executed by one process or several, and the table of what came of them."""

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from recipe_runner.launch.process import set_up_process
from recipe_runner.problems.problem import Problem
from recipe_runner.problems.words import align, make_visible
from recipe_runner.smoke.outcome import CODE, Outcome


def smoke_all(files: Sequence[Path], steps: int, jobs: int) -> Iterator[Outcome]:
    """Executes recipes; each process executes several, one after another: imports are paid once.

    Args:
        files: Of recipes.
        steps: Of the optimizer.
        jobs: Number of processes; 1 for this one.

    Yields:
        Outcomes, in the order of the files.
    """
    if jobs == 1 or len(files) == 1:
        for file in files:
            yield _smoke(file, steps)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of small models wait more than they compute
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(files)), mp_context=context, initializer=set_up_process) as pool:
        asked = [(file, pool.submit(_smoke, file, steps)) for file in files]
        for file, future in asked:
            try:
                yield future.result()
            except BrokenProcessPool:
                yield Outcome(file, file.stem, [Problem(CODE, "run: a process was ended from outside (memory?)")])


def _smoke(file: Path, steps: int) -> Outcome:
    from recipe_runner.smoke.run import smoke  # here: the training stack

    return smoke(file, steps)


def write_line(outcome: Outcome, verbose: bool) -> str:
    """What came of a recipe, in a line; what is wrong, below it."""
    if outcome.not_run:
        return make_visible(f"not run {outcome.name}: {outcome.not_run}")
    state = "FAILED" if outcome.failed else "ok"
    lines = [f"{state:<7}{outcome.name} ({outcome.seconds:.1f} s)"]
    lines += [f"       {problem}" for problem in outcome.problems]
    if verbose:
        lines += [f"       model: {outcome.stand_in}", f"       rows: {outcome.rows}"]
        lines += [f"       changed: {told}" for told in outcome.changed]
        reasons: dict[str, int] = {}
        for why in outcome.excused.values():
            reasons[why] = reasons.get(why, 0) + 1
        lines += [f"       may have no gradient: {number} tensors, {why}" for why, number in reasons.items()]
    return make_visible("\n".join(lines))


def write_summary(outcomes: Sequence[Outcome], form: str) -> str:
    """All outcomes: a count as text, a table as Markdown, or JSON."""
    failed = sum(outcome.failed for outcome in outcomes)
    if form == "json":
        return json.dumps([_as_json(outcome) for outcome in outcomes], indent=1, ensure_ascii=False)
    seconds, left = sum(outcome.seconds for outcome in outcomes), sum(bool(outcome.not_run) for outcome in outcomes)
    executed = len(outcomes) - left
    count = f"{executed} executed, {failed} failed; {seconds / max(executed, 1):.1f} s each"
    count += f"; {left} not run, as {'it says' if left == 1 else 'they say'}" * bool(left)
    states = {True: "**failed**", False: "ok"}
    if form == "markdown":
        head = "| recipe | | seconds | rows | model |\n|---|---|---:|---|---|"
        lines = [
            f"| {o.name} | {'not run' if o.not_run else states[o.failed]} | {o.seconds:.1f} | {o.rows} | {o.stand_in} |"
            for o in outcomes
        ]
        told = [f"- `{o.name}`: {problem.told}" for o in outcomes for problem in o.problems]
        return "\n".join([head, *lines, "", count, *(["", *told] if told else [])])
    if not failed:
        return count
    rows = [["failed", "why"], *([o.name, o.problems[0].message[:120]] for o in outcomes if o.failed)]
    return "\n".join(["", *align(rows), "", count])


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "recipe": str(outcome.file),
        "name": outcome.name,
        "ok": not outcome.failed,
        "seconds": round(outcome.seconds, 2),
        "steps": outcome.steps,
        "rows": outcome.rows,
        "model": outcome.stand_in,
        "changed": outcome.changed,
        "excused": outcome.excused,
        "not_run": outcome.not_run,
        "problems": [problem.as_json() for problem in outcome.problems],
    }
