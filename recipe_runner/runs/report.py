"""`report.html`: what a run was, what it did and what it can do, on one page; or several runs, compared.

Everything is read from the run folder: `recipe-run report` writes the page again at any time.
"""

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from recipe_runner import __version__
from recipe_runner.files import hide_home, read_object, read_status, read_text, refuse_existing, share_path, write_text
from recipe_runner.pages.charts import COLOURS, Curve, draw_chart, draw_histogram
from recipe_runner.pages.frame import count_rows, describe_batches, write_facts, write_grid, write_page
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import Mark, Problem, as_warning
from recipe_runner.problems.words import make_visible
from recipe_runner.recipe.document import parse_document
from recipe_runner.runs.folder import is_active, recipe_changes
from recipe_runner.runs.golden import read_golden
from recipe_runner.runs.metrics import COMPLETIONS, measure_series, read_metrics
from recipe_runner.stages import PIPELINE, STAGES

FILE = "report.html"
SHOWN = 3  # answers on the page
WARNINGS = 5  # on the page
LONGEST = 400  # characters of a text that is shown at once
# What damaged files may come to.
UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, OSError)
# What is drawn: title, measures (training, then held-out), whether equal ratios are equal distances.
CHARTS = (
    ("loss", ("loss", "eval_loss"), False),
    ("learning rate", ("learning_rate",), False),
    ("gradient norm", ("grad_norm",), True),
    ("tokens a second", ("tokens_per_second",), False),
    ("token accuracy", ("mean_token_accuracy", "eval_mean_token_accuracy"), False),
    ("reward margin", ("rewards/margins", "eval_rewards/margins"), False),
    ("pairs ranked right", ("rewards/accuracies", "eval_rewards/accuracies"), False),
    ("margin of the scores", ("margin", "eval_margin"), False),
    ("pairs ranked right by their scores", ("accuracy", "eval_accuracy"), False),
    ("distance from the reference (KL)", ("kl",), False),
    ("tokens of an answer", ("completions/mean_length",), False),
)
RISING = ("accurac", "margin", "eval_reward", *(key for stage in STAGES.values() for key in stage.shown))  # not losses
FINAL = {  # of a table that compares runs: name -> measure, the last value of which counts
    "training loss": "loss",
    "held-out loss": "eval_loss",
    "held-out token accuracy": "eval_mean_token_accuracy",
    "held-out reward margin": "eval_rewards/margins",
    "held-out pairs ranked right": "eval_rewards/accuracies",
    "pairs ranked right by held-out scores": "eval_accuracy",
    "held-out margin of scores": "eval_margin",
}
# And of stages whose answers are rewarded: what they log while they train, and of held-out prompts.
FINAL |= {key: key for stage in STAGES.values() if stage.rewarded for key in stage.shown}
FINAL |= {name: key for stage in STAGES.values() if stage.rewarded for key, name in stage.measures.items()}


@dataclass(frozen=True)
class Run:
    """What is read of a run.

    Attributes:
        folder: The run folder.
        values: The recipe as it was resolved.
        status: What `status.json` says.
        environment: What `environment.json` says.
        logged: The lines of `metrics.jsonl`, with tokens a second.
        evaluation: The figures of the latest evaluation; empty without one.
        answers: The file of its answers; None without one.
    """

    folder: Path
    values: Mapping[str, Any]
    status: Mapping[str, Any]
    environment: Mapping[str, Any]
    logged: Sequence[dict[str, Any]]
    evaluation: Mapping[str, Any]
    answers: Path | None

    @property
    def state(self) -> str:
        """Its status; `killed` where it calls itself running, and has no process."""
        status = str(self.status.get("status"))
        return "killed" if status == "running" and not is_active(self.folder) else status

    @property
    def name(self) -> str:
        """The recipe's name and the run's."""
        return f"{self.values.get('name', '?')} {self.folder.name}"

    @property
    def seconds(self) -> float | None:
        """From the start to the last that was heard of it."""
        try:
            begun, changed = (
                datetime.fromisoformat(str(self.status[key])).timestamp() for key in ("started", "updated")
            )
        except (KeyError, ValueError, OverflowError):
            return None
        last = [float(entry["time"]) for entry in self.logged[-1:] if "time" in entry]
        return max(changed, *last, begun) - begun

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((entry["step"] for entry in self.logged), default=0)


def read_run(folder: Path) -> Run:
    """Reads a run folder, of a run that may have failed.

    Raises:
        UserError: It is none.
    """
    try:
        values = parse_document(read_text(folder / "resolved.yaml"), str(folder / "resolved.yaml")).values
    except (OSError, ValueError, UserError) as error:
        fix = "name a run folder: one with status.json and resolved.yaml"
        raise user_error("not-a-run", f"{folder} is no run folder", fix) from error
    evaluation = latest_evaluation(folder)
    return Run(
        folder,
        values,
        read_object(folder / "status.json") | {"status": read_status(folder)},
        read_object(folder / "environment.json"),
        add_speed([clean(entry) for entry in read_metrics(folder)]),
        read_object(evaluation) if evaluation else {},
        evaluation.parent / "answers.jsonl" if evaluation else None,
    )


def latest_evaluation(run: Path) -> Path | None:
    """The figures of the latest evaluation of a run: `results.json`; None where it has none."""
    return max(run.glob("evaluations/*/results.json"), default=None)


def clean(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the metrics with the numbers that can be drawn, and the samples."""
    kept = {key: value for key, value in entry.items() if _is_number(value) and key != "step"}
    samples = entry.get("samples")
    if isinstance(samples, list) and samples and all(isinstance(sample, dict) for sample in samples):
        kept["samples"] = samples
    return {"step": min(abs(int(entry["step"])), 10**15), **kept}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def add_speed(logged: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the metrics, those of steps with tokens a second since the one before, without evaluations."""
    found, before, beside = [], None, 0.0
    for entry in logged:
        beside += float(entry.get("eval_runtime") or 0) + float(entry.get("samples_runtime") or 0)
        if "loss" in entry and "num_tokens" in entry:
            if before and entry["num_tokens"] > before["num_tokens"]:
                taken = float(entry.get("time", 0)) - float(before.get("time", 0)) - beside
                if taken > 0:
                    entry = entry | {"tokens_per_second": (entry["num_tokens"] - before["num_tokens"]) / taken}
            before, beside = entry, 0.0
        found.append(entry)
    return found


def _tell(error: Exception) -> str:
    """What went wrong, for a message that has a code of its own."""
    return error.problems[0].message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def leave_report(folder: Path) -> None:
    """Writes the report of a run that has ended; where that fails, it is said, and the run is what it was."""
    try:
        write_report(folder)
    except Exception as error:  # the run is what counts: its result is there, or its own error is said
        message, fix = _tell(error), f"recipe-run report {folder} writes it again"
        print(as_warning(Problem("report-not-written", message, Mark(str(folder / FILE)), (), fix)), file=sys.stderr)


def write_report(folder: Path, output: Path | None = None, force: bool = False) -> Path:
    """Writes the report of a run, and returns where it is.

    Args:
        folder: The run folder.
        output: The page; None for the one in the run folder, which is written again.
        force: Whether a page that is there already is written again, too.

    Raises:
        UserError: It is no run folder, or the page is there already.
    """
    if output and not force:
        refuse_existing(output, "choose another --output")
    page = output or folder / FILE
    write_text(page, describe_run(read_run(folder), page.absolute().parent))
    return page


def describe_run(run: Run, place: Path) -> str:
    """The page of a run. Everything that comes from data or recipe is escaped.

    Args:
        run: What was read.
        place: The folder that the page is for, from where links begin.
    """
    title = str(run.values.get("name", run.folder.name))
    charts = [*CHARTS[:1], *_source_charts(run.logged), *_judged_charts(run.logged), *CHARTS[1:]]
    sections: list[tuple[str, Callable[[], str]]] = [
        ("", lambda: _head(run)),
        ("Warnings", lambda: _warnings(run)),
        ("Before and after", lambda: "".join(_samples(run))),
        ("Answers that were trained on", lambda: "".join(_judged(run))),
        ("Curves", lambda: _curves([_run_chart(title, names, scale, run.logged) for title, names, scale in charts])),
        ("Evaluation", lambda: "".join(_evaluation(run.evaluation))),
        ("Stages", lambda: _stages(run, place)),
        ("Training data", lambda: _account(_data(run, "train"))),
        ("Evaluation data", lambda: _account(_data(run, "eval"))),
        ("Time and memory", lambda: write_facts(_measured(run))),
        ("Environment", lambda: write_facts(_environment(run))),
        ("Run it again", lambda: f"<pre>{_escape(command_of(run))}</pre>"),
        ("Recipe", lambda: _recipe(run)),
    ]
    parts = [f"<h1>{_escape(title)}</h1>"]
    for name, write in sections:
        parts += _section(name, write)
    return hide_home(write_page(f"{title}: report", parts))


def _section(title: str, write: Callable[[], str]) -> list[str]:
    """A part of a page with its title; where what it is made from is damaged, that is said in its place."""
    try:
        content = write()
    except (UserError, *UNREADABLE) as error:
        content = (
            f"<p class='warning'>This part can't be written, a file of the run is damaged: {_escape(_tell(error))}</p>"
        )
    return [f"<h2>{escape(title)}</h2>" * bool(title), content] if content else []


def _escape(text: Any) -> str:
    return escape(make_visible(str(text)))


def _head(run: Run) -> str:
    parts = [
        f"<p>{_escape(run.values.get('description') or '')}</p>",
        f'<p class="quiet">{_escape(_headline(run))}</p>',
    ]
    if error := run.status.get("error"):
        parts.append(f'<p class="error">{_escape(error)}</p>')
    return "".join(parts)


def _warnings(run: Run) -> str:
    found = run.environment.get("warnings") or []
    more = f"<p class='quiet'>and {len(found) - WARNINGS:,} more in environment.json</p>" * (len(found) > WARNINGS)
    return "".join(f"<p class='warning'>{_escape(str(text)[:LONGEST])}</p>" for text in found[:WARNINGS]) + more


def _source_charts(logged: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...], bool]]:
    """Charts of the losses of a mixture's sources, as `CHARTS`."""
    found = []
    for measure, title in (("loss/", "loss of each source"), ("eval_loss/", "held-out loss of each source")):
        names = dict.fromkeys(name for entry in logged for name in entry if name.startswith(measure))
        if names:
            found.append((title, tuple(names), False))
    return found


def _judged_charts(logged: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...], bool]]:
    """Charts of what answers were given by rewards, in all and by each, as `CHARTS`."""
    keys = dict.fromkeys(key for stage in STAGES.values() if stage.rewarded for key in stage.shown)
    found = [(key, (key, f"eval_{key}"), False) for key in keys if any(key in entry for entry in logged)]
    each = dict.fromkeys(name for entry in logged for name in entry if re.fullmatch(r"rewards/.+/mean", name))
    return found + ([("each of the rewards", tuple(each), False)] if len(each) > 1 and found else [])


def _judged(run: Run) -> Iterator[str]:
    """What the model answered in its first and in its last step, with what each answer was given."""
    lines = [line for line in read_metrics(run.folder, COMPLETIONS) if line.get("split") == "train"]
    steps = list(dict.fromkeys(line["step"] for line in lines))
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        of_step = [line for line in lines if line["step"] == step]
        alike = [line for line in of_step if line.get("prompt") == of_step[0].get("prompt")][:SHOWN]
        told = {}
        for number, line in enumerate(alike, 1):
            given = ", ".join(f"{name} {_short(value)}" for name, value in (line.get("rewards") or {}).items())
            told[f"step {step}, answer {number}{f' ({given})' * bool(given)}"] = line.get("completion")
        yield _answers(str(of_step[0].get("prompt")), "", told)


def _short(value: Any) -> str:
    return f"{value:.3g}" if _is_number(value) else "-"


def _curves(charts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _data(run: Run, split: str) -> Mapping[str, Any]:
    found = (run.environment.get("data") or {}).get(split) or {}
    return dict(found)


def _recipe(run: Run) -> str:
    text = read_text(run.folder / "resolved.yaml")
    return f"<details><summary>as it was run</summary><pre>{_escape(text)}</pre></details>"


def _headline(run: Run) -> str:
    values, model = run.values, run.values.get("model") or {}
    method = (values.get("peft") or {}).get("method") or "full fine-tuning"
    base = share_path(str(model.get("name_or_path", "")))
    told = [str(values.get("stage", "")), *([base, str(method)] if base else []), run.state]
    step = [] if values.get("stage") == PIPELINE else [f"step {run.step:,}"]
    return "; ".join([*filter(None, told), *step, f"recipe-run {__version__}"])


def _run_chart(title: str, names: Sequence[str], logarithmic: bool, logged: Sequence[dict[str, Any]]) -> str:
    labels: Sequence[str] = ("training", "held-out") if len(names) > 1 else (title,)
    if any("/" in name and name.partition("/")[0] in ("loss", "eval_loss") for name in names):
        labels = [name.partition("/")[2] for name in names]
    if all(name.startswith("rewards/") and name.endswith("/mean") for name in names):
        labels = [name.removeprefix("rewards/").removesuffix("/mean") for name in names]
    curves = [
        Curve(label, measure_series(logged, name), place, name.startswith("eval_"))
        for place, (label, name) in enumerate(zip(labels, names, strict=True))
    ]
    return draw_chart(title, [curve for curve in curves if curve.points], logarithmic)


def _samples(run: Run) -> Iterator[str]:
    """What the model answered before and after training: samples of the run, else an evaluation's, else golden rows."""
    logged = [entry for entry in run.logged if entry.get("samples")]
    if logged:
        first, last = logged[0], logged[-1]
        for before, after in list(zip(first["samples"], last["samples"], strict=False)):
            told = {f"step {first['step']}": before.get("answer")} if len(logged) > 1 else {}
            yield _answers(
                str(before.get("prompt")), before.get("wanted"), told | {f"step {last['step']}": after.get("answer")}
            )
        return
    answers: list[Mapping[str, Any]] = []
    if run.answers:
        with run.answers.open(encoding="utf-8") as stream:
            answers = [json.loads(line) for line in itertools.islice(stream, SHOWN)]
    if any("answer" in of for row in answers for of in row["columns"].values()):
        for row in answers:
            told = {name: of.get("answer") for name, of in row["columns"].items()}
            yield _answers(_last_turn(row.get("prompt")), row.get("wanted"), told)
        return
    for golden in [golden for golden in read_golden(run.folder) if golden.answer_ids][:SHOWN]:
        told = {"before": golden.before} if golden.before is not None else {}
        after = golden.answer + " ..." * (not golden.ended)
        yield _answers(_last_turn(golden.content), golden.wanted, told | {"after": after})


def _last_turn(content: Any) -> str:
    return str(content[-1].get("content", "")) if isinstance(content, list) and content else str(content or "")


def _answers(prompt: str, wanted: Any, told: Mapping[str, Any]) -> str:
    facts = {"asked": prompt, "wanted": str(wanted or "")} | {name: str(text or "") for name, text in told.items()}
    rows = (
        f'<tr><th>{_escape(name)}</th><td class="answer">{_fold(text)}</td></tr>'
        for name, text in facts.items()
        if text or name not in ("asked", "wanted")
    )
    return f"<table>{''.join(rows)}</table>"


def _fold(text: str) -> str:
    """A text; of a long one the begin, and the whole where it is asked for."""
    if len(text) <= LONGEST:
        return _escape(text)
    return f"<details><summary>{_escape(text[:LONGEST])} ...</summary>{_escape(text)}</details>"


def _evaluation(found: Mapping[str, Any]) -> Iterator[str]:
    """The table of an evaluation, and of each of its sources."""
    if not found:
        return
    data = ", ".join(Path(str(name)).name for name in found.get("data", []))
    yield f"<p class='quiet'>{found.get('rows', 0):,} rows of {escape(data)}; in brackets the 95 % interval</p>"
    for name, part in ({"": found} | dict(found.get("by_source") or {})).items():
        yield f"<p>{escape(Path(name).name)}</p>" if name else ""
        columns = dict(part.get("columns") or {})
        if part.get("difference"):
            columns["tuned minus base"] = part["difference"]
        names = dict.fromkeys(measure for of in columns.values() for measure in of)
        rows = [[measure, *(_estimate(of.get(measure)) for of in columns.values())] for measure in names]
        yield write_grid(["", *columns], rows)
    for name, measures in (found.get("tasks") or {}).items():
        rows = [[task, *(f"{key} {value:.4g}" for key, value in of.items())] for task, of in measures.items()]
        yield f"<p>lm-eval, {escape(name)}</p>" + write_grid(["task", *[""] * max(len(row) - 1 for row in rows)], rows)


def _estimate(found: Any) -> str:
    if not isinstance(found, dict) or found.get("value") is None:
        return "-"
    value, low, high = (found.get(key) for key in ("value", "low", "high"))
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else "")


def _stages(run: Run, place: Path) -> str:
    rows = []
    for number, stage in enumerate(run.status.get("stages") or [], 1):
        page = os.path.relpath(run.folder.absolute() / str(stage.get("run")) / FILE, place)
        link = f'<a href="{escape(page)}">{escape(str(stage["name"]))}</a>' if stage.get("run") else ""
        told = (str(number), link or escape(str(stage.get("name"))), escape(str(stage.get("stage"))))
        rows.append(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in (*told, escape(str(stage.get("status"))))) + "</tr>"
        )
    return f"<table class='grid'>{''.join(rows)}</table>" if rows else ""


def _account(account: Mapping[str, Any]) -> str:
    if not account:
        return ""
    sources = [f"{Path(str(of.get('name'))).name}: {of.get('rows', 0):,} rows" for of in account.get("sources") or []]
    facts = count_rows(account) | {
        "batches": describe_batches(account.get("batches") or {}, account.get("max_length")),
        "sources": "; ".join(sources) if len(sources) > 1 else "",
        "noted": "; ".join(f"{rows:,} rows {escape(what)}" for what, rows in (account.get("noted") or {}).items()),
    }
    histogram = account.get("histogram") or {}
    picture = draw_histogram(histogram.get("counts") or [], histogram.get("edges") or [], account.get("max_length"))
    return write_facts(facts) + picture


def _measured(run: Run) -> dict[str, str]:
    """Time and memory of a run, as far as they were measured."""
    trained = [float(entry["train_runtime"]) for entry in run.logged if "train_runtime" in entry]
    speeds = sorted(value for _, value in measure_series(run.logged, "tokens_per_second"))
    sampled = sum(float(entry.get("samples_runtime") or 0) for entry in run.logged)
    return {
        "started": str(run.status.get("started", ""))[:19].replace("T", " "),
        "whole run": _duration(run.seconds),
        "training": _duration(sum(trained)) if trained and run.state == "completed" else "",
        "samples": f"{_duration(sampled)} of it" if sampled else "",
        "speed": f"{speeds[len(speeds) // 2]:,.0f} tokens a second (median)" if speeds else "",
        "peak memory": describe_memory(run.status.get("measured")),
    }


def describe_memory(measured: Any) -> str:
    """The peak memory that a run measured; empty where it did not."""
    if not isinstance(measured, dict) or not measured.get("peak_memory_bytes"):
        return ""
    return f"{measured['peak_memory_bytes'] / 2**30:.2f} GiB ({measured.get('of', '')})"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 60 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _environment(run: Run) -> dict[str, str]:
    found = run.environment
    versions = found.get("versions") or {}
    processes = found.get("processes") or {}
    return {
        "precision": str(found.get("precision") or ""),
        "hardware": "; ".join(
            found.get("gpus") or [f"{found['cpu_count']} CPU cores"] if found.get("cpu_count") else []
        ),
        "processes": f"{processes.get('world_size', 1)}, {processes.get('global_batch_size', '?')} rows a step"
        if processes
        else "",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "python": str(found.get("python") or ""),
        "platform": str(found.get("platform") or ""),
        "commit": str(found.get("git_commit") or ""),
    }


def command_of(run: Run) -> str:
    """The command that repeats a run."""
    processes = (run.environment.get("processes") or {}).get("world_size", 1)
    launcher = f"accelerate launch --num_processes {processes} " if processes > 1 else ""
    return f"{launcher}recipe-run {share_path(str(run.folder / 'resolved.yaml'))}"


def compare_runs(folders: Sequence[Path], output: Path, force: bool = False) -> Path:
    """Writes a page that compares runs: what their recipes say otherwise, a table, and their curves in one picture.

    Raises:
        UserError: A folder is no run, or the page is there already.
    """
    if not force:
        refuse_existing(output, "choose another --output")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise user_error("not-a-run", "a run is named twice", "name each once")
    runs = [read_run(folder) for folder in folders]
    names = [f"{number}: {run.name}" for number, run in enumerate(runs, 1)]
    parts = ["<h1>Runs compared</h1>"]
    parts += [f'<p class="c{place % COLOURS}">{_escape(name)}</p>' for place, name in enumerate(names)]
    changed: list[str] = []
    for name, run in zip(names[1:], runs[1:], strict=True):
        changes = recipe_changes(runs[0].folder, run.values)
        lines = "".join(f"<li>{escape(change)}</li>" for change in changes)
        changed.append(f"<p>{escape(name)}, beside 1:</p><ul>{lines or '<li>the same recipe</li>'}</ul>")
    numbers = ["", *[str(number) for number in range(1, len(runs) + 1)]]
    parts += _section("What their recipes say otherwise", lambda: "".join(changed))
    parts += _section("Figures", lambda: write_grid(numbers, _figures(runs)))
    charts = []
    judged = _judged_charts([entry for run in runs for entry in run.logged])[:1]
    for title, measures, logarithmic in (*CHARTS[:1], *judged, *CHARTS[1:]):
        for measure in measures:
            curves = [
                Curve(name, measure_series(run.logged, measure), place, measure.startswith("eval_"))
                for place, (name, run) in enumerate(zip(names, runs, strict=True))
            ]
            told = f"held-out {title}" if measure.startswith("eval_") else title
            charts.append(draw_chart(told, [curve for curve in curves if curve.points], logarithmic))
    parts += _section("Curves", lambda: _curves(charts))
    write_text(output, hide_home(write_page("Runs compared", parts)))
    return output


def _figures(runs: Sequence[Run]) -> list[list[str]]:
    """What is compared, a line a figure that at least one run has."""
    table: dict[str, list[str]] = {
        "stage": [str(run.values.get("stage", "")) for run in runs],
        "status": [str(run.status.get("status", "")) for run in runs],
        "steps": [f"{run.step:,}" for run in runs],
        "seconds": [f"{run.seconds:,.0f}" if run.seconds is not None else "" for run in runs],
        "speed": [_measured(run)["speed"].removesuffix(" (median)") for run in runs],
        "peak memory": [_measured(run)["peak memory"] for run in runs],
    }
    for name, measure in FINAL.items():
        series = [measure_series(run.logged, measure) for run in runs]
        table[name] = [f"{found[-1][1]:.4g}" if found else "" for found in series]
    for measure in dict.fromkeys(
        name for run in runs for name in (run.evaluation.get("columns") or {}).get("tuned", {})
    ):
        tuned = [(run.evaluation.get("columns") or {}).get("tuned", {}).get(measure) for run in runs]
        table[f"evaluation: {measure}"] = [_estimate(found) if found else "" for found in tuned]
    return [[name, *cells] for name, cells in table.items() if any(cells)]


def best_of(run: Run) -> tuple[str, float] | None:
    """The measure that counts for a run, and its best value: the held-out loss, else the training loss."""
    stage = STAGES.get(str(run.values.get("stage")))
    for measure in (*(stage.measures if stage else ()), *(stage.shown if stage and stage.rewarded else ()), "loss"):
        if series := measure_series(run.logged, measure):
            values = [value for _, value in series if math.isfinite(value)]
            higher = any(word in measure for word in RISING)
            if values:
                return measure, max(values) if higher else min(values)
    return None
