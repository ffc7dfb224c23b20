"""What a study shows: the figures of its variants side by side, as JSON, text, Markdown, a plot and a page."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipe_runner.files import write_json, write_text
from recipe_runner.pages.frame import write_facts, write_grid, write_page
from recipe_runner.pages.plots import Plot, Point, in_page, plot_bars, plot_points, write_file
from recipe_runner.problems.words import align
from recipe_runner.results.statistics import Measure, estimate, resample
from recipe_runner.studies.runs import Outcome, as_json
from recipe_runner.studies.study import Study

RESULTS, TABLE, PLOT, PAGE = "results.json", "table.md", "plot.svg", "report.html"
ONES = ("trained", "total", "size_bytes", "peak_memory_bytes", "step_seconds", "tokens_per_second")
SEED = 0  # of the resamples
ACCURACY = ("token accuracy", "chosen is likelier", "pairs ranked right")  # what the plot shows, the first there is
SIDE = 2  # measures side by side in a terminal, each with its interval
BASIS = 1e6  # bytes in a MB
MIB = 1 << 20


def summarize(study: Study, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The figures of each variant: means over its seeds, with the interval over rows and the spread over seeds."""
    rows = []
    for variant in study.variants:
        own = [outcome for outcome in outcomes if outcome.variant.name == variant.name]
        measured = [outcome.figures for outcome in own if not outcome.failure]
        if not own:
            continue
        row: dict[str, Any] = {"name": variant.name, "overrides": list(variant.overrides)}
        row["failures"] = [outcome.failure for outcome in own if outcome.failure]
        row["seeds"] = [outcome.seed for outcome in own if not outcome.failure]
        row |= {name: _spread([of[name] for of in measured if of.get(name) is not None]) for name in ONES}
        kinds = dict.fromkeys(kind for of in measured for kind in of.get("latency", {}))
        row["latency"] = {
            kind: _spread([of["latency"][kind]["token"] for of in measured if kind in of.get("latency", {})])
            for kind in kinds
        }
        row["measures"] = {
            name: _estimate(_mean([of["measures"][name] for of in measured]))
            | {"seeds": [_value(of["measures"][name]) for of in measured]}
            for name in (measured[0]["measures"] if measured else ())
        }
        rows.append(row)
    _compare(rows, study, outcomes)
    return rows


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """The median of a figure over seeds, the least and the most of it."""
    return {"value": statistics.median(values), "low": min(values), "high": max(values)} if values else None


def _value(of: Mapping[str, Any]) -> float:
    return float(sum(of["sums"]) / max(sum(of["parts"]), 1e-9))


def _mean(of_seeds: Sequence[Mapping[str, Any]]) -> Measure:
    """A measure of the same rows, as the mean over seeds."""
    sums = np.mean([of["sums"] for of in of_seeds], axis=0)
    return Measure(sums, np.array(of_seeds[0]["parts"], dtype=float))


def _estimate(measure: Measure) -> dict[str, Any]:
    value, drawn = resample({"": measure}, SEED)[""]
    return dataclasses.asdict(estimate(value, drawn))


def _compare(rows: list[dict[str, Any]], study: Study, outcomes: Sequence[Outcome]) -> None:
    """Adds to each variant how its measures differ from the baseline's, row by row."""
    by_name = {
        row["name"]: [o.figures for o in outcomes if o.variant.name == row["name"] and not o.failure] for row in rows
    }
    base = by_name.get(study.baseline, [])
    for row in rows:
        for name, told in row["measures"].items():
            if row["name"] == study.baseline or not base or name not in base[0]["measures"]:
                continue
            own = _mean([of["measures"][name] for of in by_name[row["name"]]])
            other = _mean([of["measures"][name] for of in base])
            if len(own.sums) == len(other.sums) and (own.parts == other.parts).all():
                told["difference"] = _estimate(Measure(own.sums - other.sums, own.parts))


def write_results(study: Study, outcomes: Sequence[Outcome], folder: Path) -> None:
    """Writes everything that is known into the study's folder."""
    rows = summarize(study, outcomes)
    machine: dict[str, Any] = next((outcome.figures["machine"] for outcome in outcomes if not outcome.failure), {})
    values = {
        "name": study.name,
        "description": study.description,
        "baseline": study.baseline,
        "evaluate": dict(study.evaluate),
        "machine": machine,
        "variants": rows,
        "runs": [{key: of for key, of in as_json(outcome).items() if key != "measures"} for outcome in outcomes],
    }
    write_json(folder / RESULTS, values, shared=True)
    write_text(folder / TABLE, write_markdown(rows))
    plots = draw(rows)
    if plots:
        write_text(folder / PLOT, write_file(plots, f"study {study.name}"))
    write_text(folder / PAGE, _write_page(study, rows, plots, machine))


def _measured(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The variants that have figures, and the names of all measures."""
    good = [row for row in rows if row["measures"]]
    return good, list(dict.fromkeys(name for row in good for name in row["measures"]))


def _quality_cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [row["name"], *(_cell(row["measures"].get(name)) for name in names)]


def write_text_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was learned, and what it cost, for a terminal."""
    good, names = _measured(rows)
    parts = []
    for place in range(0, len(names), SIDE):  # tables of 80 columns
        shown = names[place : place + SIDE]
        parts.append("\n".join(align([["", *shown], *(_quality_cells(row, shown) for row in good)], 80)))
    if good:
        parts.append("\n".join(align([COST_HEAD, *(_cost_cells(row) for row in good)], 80)))
    failed = [f"{row['name']}: {failure}" for row in rows for failure in row["failures"]]
    return "\n\n".join([*parts, *(["\n".join(failed)] if failed else [])])


COST_HEAD = ["", "trained", "saved MB", "MiB", "s/step", "tokens/s", "ms/token", "merged"]


def _cost_cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        _share(row),
        _one(row["size_bytes"], BASIS, ",.1f"),
        _one(row["peak_memory_bytes"], MIB, ",.0f"),
        _one(row["step_seconds"], 1, ".3f"),
        _one(row["tokens_per_second"], 1, ",.0f"),
        _one(row["latency"].get("result"), 1, ".1f"),
        _one(row["latency"].get("merged"), 1, ".1f"),
    ]


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['trained']['value'] / row['total']['value']:.2%}" if row["trained"] else "-"


def _one(told: Mapping[str, float] | None, unit: float, form: str) -> str:
    return f"{told['value'] / unit:{form}}" if told else "-"


def _cell(told: Mapping[str, Any] | None) -> str:
    return f"{told['value']:.3f} [{told['low']:.3f}, {told['high']:.3f}]" if told else "-"


def write_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole table, for a page of documentation."""
    good, names = _measured(rows)
    head = ["variant", "trained", *names, "saved MB", "memory MiB", "s/step", "tokens/s"]
    head += ["ms/token", "merged ms/token", "base ms/token"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for row in good:
        (name, trained, *cost), (_, *quality) = _cost_cells(row), _quality_cells(row, names)
        cells = [name, trained, *quality, *cost]
        lines.append(f"| {' | '.join([*cells, _one(row['latency'].get('base'), 1, '.1f')])} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """The plots of a study: accuracy over the trained share, memory, time of a step, time of a token."""
    good = [row for row in rows if row["measures"]]
    plots = []
    shown = next((name for name in ACCURACY if any(name in row["measures"] for row in good)), "")
    points = [
        Point(
            row["name"],
            100 * row["trained"]["value"] / row["total"]["value"],
            *(told[k] for k in ("value", "low", "high")),
        )
        for row in good
        if row["trained"] and row["trained"]["value"] and (told := row["measures"].get(shown))
    ]
    if points:
        plots.append(plot_points(f"{shown} on held-out rows", "trained parameters, % of all (logarithmic)", points))
    for title, key, unit, form in (
        ("peak memory while training, MiB", "peak_memory_bytes", MIB, ",.0f"),
        ("seconds a step (median)", "step_seconds", 1, ".3f"),
        ("saved, MB", "size_bytes", BASIS, ",.1f"),
    ):
        bars = [(row["name"], row[key]["value"], _one(row[key], unit, form)) for row in good if row[key]]
        if bars:
            plots.append(plot_bars(title, bars))
    tokens = [
        (f"{row['name']}{', merged' * (kind == 'merged')}", of["value"], f"{of['value']:.1f}")
        for row in good
        for kind, of in row["latency"].items()
        if kind != "base" and of
    ]
    if tokens:
        plots.append(plot_bars("milliseconds a token when answering (median)", tokens))
    return plots


def _write_page(
    study: Study, rows: Sequence[Mapping[str, Any]], plots: Sequence[Plot], machine: Mapping[str, Any]
) -> str:
    """The page of a study."""
    good, names = _measured(rows)
    quality = [_quality_cells(row, names) for row in good]
    differences = [
        [row["name"], *(_cell((row["measures"].get(name) or {}).get("difference")) for name in names)]
        for row in good
        if any("difference" in told for told in row["measures"].values())
    ]
    seeds = [
        [row["name"], *(", ".join(f"{v:.4f}" for v in row["measures"][name]["seeds"]) for name in names)]
        for row in good
        if len(row["seeds"]) > 1
    ]
    failed = [[row["name"], failure] for row in rows for failure in row["failures"]]
    overrides = [[row["name"], ", ".join(row["overrides"]) or "the recipe as it is"] for row in rows]
    return write_page(
        f"study {study.name}",
        [
            f"<h1>Study {study.name}</h1>",
            write_facts({"asks": study.description, "machine": ", ".join(f"{k} {v}" for k, v in machine.items())}),
            "<h2>What was learned</h2><p>Held-out rows; 95 % interval over rows.</p>",
            write_grid(["", *names], quality),
            f"<h2>Beside {study.baseline}</h2>{write_grid(['', *names], differences)}" if differences else "",
            f"<h2>Each seed</h2>{write_grid(['', *names], seeds)}" if seeds else "",
            f"<h2>What it cost</h2>{write_grid(COST_HEAD, [_cost_cells(row) for row in good])}",
            *(in_page(plot) for plot in plots),
            f"<h2>Failed</h2>{write_grid(['', 'why'], failed)}" if failed else "",
            f"<h2>What was set</h2>{write_grid(['', '--set'], overrides)}",
        ],
    )
