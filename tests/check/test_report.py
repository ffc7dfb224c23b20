"""The page of a run, the list of runs: from what is in their folders, without the training stack."""

import html
import json
import math
import re

import pytest
from shared import write_rows

from recipe_runner.pages.charts import POINTS, Curve, draw_chart, thin


def write_run(home, name="tiny", run_id="20260101-000000", status="completed", steps=30, **details):
    """A run folder as a run leaves it, without weights."""
    folder = home / name / run_id
    folder.mkdir(parents=True)
    values = {"schema_version": 1, "name": name, "stage": "sft", "training": {"learning_rate": 1e-4}}
    values |= details.pop("values", {})
    (folder / "resolved.yaml").write_text(json.dumps(values))
    times = {"started": "2026-01-01T00:00:00+00:00", "updated": "2026-01-01T00:02:05+00:00"}
    (folder / "status.json").write_text(json.dumps({"status": status, **times, **details}))
    same = {"learning_rate": 1e-4, "grad_norm": 1.0}
    lines = [
        {"time": 1000.0 + step, "step": step, "loss": 2 / step, "num_tokens": 100 * step, **same}
        for step in range(1, steps + 1)
    ]
    lines.append({"time": 5000, "step": steps, "eval_loss": 0.5, "eval_runtime": 1.0})
    write_rows(folder / "metrics.jsonl", lines)
    (folder / "environment.json").write_text(json.dumps({"data": {"train": {"rows_read": 5, "tokens": 50}}}))
    return folder


def text_of(page):
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page.read_text().partition("</style>")[2])))


def test_a_report_says_what_the_run_was_and_did(run_cli, tmp_path):
    run = write_run(tmp_path / "runs", measured={"peak_memory_bytes": 3 * 2**30, "of": "tensors on cuda:0"})
    result = run_cli("report", run)
    assert (result.status, result.out) == (0, f"{run / 'report.html'} is written\n")
    text = text_of(run / "report.html")
    for said in ("sft", "completed", "step 30", "5 rows", "whole run 0:02:05", "3.00 GiB (tensors on cuda:0)",
                 "100 tokens a second (median)", f"recipe-run {run / 'resolved.yaml'}"):  # fmt: skip
        assert said in text, said
    page = (run / "report.html").read_text()
    assert [title for title in ("loss", "learning rate", "gradient norm") if f'aria-label="{title}"' in page] == [
        "loss", "learning rate", "gradient norm",
    ]  # fmt: skip
    assert "<script" not in page
    assert "http" not in page


def test_the_report_of_10000_steps_is_small_and_keeps_its_peaks(run_cli, tmp_path):
    run = write_run(tmp_path / "runs", steps=10_000)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    peak = json.loads(lines[5000]) | {"loss": 77.5}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:5000], json.dumps(peak), *lines[5001:]]) + "\n")
    assert run_cli("report", run).status == 0
    page = (run / "report.html").read_text()
    assert len(page) < 1_000_000
    chart = page.partition('aria-label="loss"')[2].partition("</svg>")[0]
    heights = [float(point.partition(",")[2]) for point in re.search(r'points="([^"]+)"', chart)[1].split()]
    assert len(heights) <= POINTS
    assert min(heights) == 10  # the peak reaches the top of the picture


def test_a_curve_is_thinned_to_its_lows_and_highs():
    points = [(step, math.sin(step)) for step in range(5000)] + [(5000, 9.0)]
    kept = thin(points)
    assert len(kept) <= POINTS
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert thin(points[:10]) == points[:10]


@pytest.mark.parametrize("points", [[], [(1, float("nan"))], [(1, None)], [(1, "x")]])
def test_a_curve_without_a_number_is_no_chart(points):
    assert draw_chart("loss", [Curve("loss", points)]) == ""


def test_a_chart_of_one_point_and_one_of_equal_values():
    for points in ([(3, 0.5)], [(1, 2.0), (2, 2.0)], [(0, 1e-12), (1, 1e12)]):
        chart = draw_chart("x", [Curve("x", points)], logarithmic=True)
        assert "nan" not in chart
        assert chart.count("<polyline") == 1


HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\x1b[2J\u202e"


def test_what_comes_from_recipe_and_data_is_escaped(run_cli, tmp_path):
    values = {"name": "tiny", "description": HOSTILE, "model": {"name_or_path": HOSTILE}, "peft": {"method": HOSTILE}}
    run = write_run(tmp_path / "runs", status="failed", error=HOSTILE, values=values)
    entry = {"step": 3, "samples": [{"prompt": HOSTILE, "wanted": HOSTILE, "answer": HOSTILE}]}
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(entry) + "\n")
    environment = {"warnings": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "gpus": [HOSTILE]}
    (run / "environment.json").write_text(json.dumps(environment))
    assert run_cli("report", run).status == 0
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page.partition("<h2>Recipe</h2>")[0]
    assert page.count("&lt;script&gt;") >= 8


def test_a_damaged_run_has_the_report_of_what_can_be_read(run_cli, tmp_path):
    run = write_run(tmp_path / "runs")
    (run / "environment.json").write_text("[1, 2")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 31, "lo')
    evaluation = run / "evaluations" / "one"
    evaluation.mkdir(parents=True)
    (evaluation / "results.json").write_text("{")
    assert run_cli("report", run).status == 0
    assert "step 30" in text_of(run / "report.html")


DAMAGED = {
    "metrics.jsonl": [
        {"step": 1, "loss": "x", "num_tokens": None},
        {"step": 2, "loss": 1e308, "time": "x"},
        {"step": 10**400},
    ],
    "environment.json": {"data": [1], "processes": 5, "gpus": 3, "warnings": 7, "versions": []},
    "status.json": {"status": "completed", "started": "yesterday", "updated": [], "measured": [1], "stages": 4},
    "golden.jsonl": [{"kind": 1}],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_costs_a_part_of_the_page_and_not_the_page(run_cli, tmp_path, name):
    run, value = write_run(tmp_path / "runs"), DAMAGED[name]
    rows = value if isinstance(value, list) else [value]
    (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_cli("report", run)
    assert (result.status, result.err) == (0, "")
    assert "Recipe" in text_of(run / "report.html")
    assert run_cli("runs", tmp_path).status == 0  # and no run hides the others


def test_lines_are_split_at_line_feeds_alone(run_cli, tmp_path):
    """A text may hold other characters that Python takes for the end of a line."""
    from recipe_runner.runs.golden import GoldenRow, read_golden, write_golden

    row = GoldenRow("as in the data", None, "a\u2028b\x85c", None, [1], [2], True, "d\u2029e", None, "")
    write_golden(tmp_path, [row, row])
    assert read_golden(tmp_path) == [row, row]


def test_runs_are_compared_by_their_recipes_first(run_cli, tmp_path):
    first = write_run(tmp_path / "runs", "one")
    second = write_run(tmp_path / "runs", "two", values={"training": {"learning_rate": 5e-4, "warmup_steps": 3}})
    output = tmp_path / "both.html"
    result = run_cli("report", first, second, "--output", output)
    assert result.status == 0, result.err
    text = text_of(output)
    assert "training.learning_rate: 0.0001 -> 0.0005" in text
    assert "training.warmup_steps: (unset) -> 3" in text
    assert text.index("What their recipes say otherwise") < text.index("Figures") < text.index("Curves")
    assert "held-out loss 0.5 0.5" in text
    assert output.read_text().count("<polyline") >= 2 * 4
    again = run_cli("report", first, second, "--output", output)
    assert (again.status, "error[file-exists]" in again.err) == (1, True)
    assert run_cli("report", first, second, "--output", output, "--force").status == 0


def test_what_is_no_run_is_one_line(run_cli, tmp_path):
    for name in (tmp_path, tmp_path / "nowhere", tmp_path / "no.yaml"):
        result = run_cli("report", name)
        assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert not list(tmp_path.glob("*.html"))


def test_runs_are_listed_with_how_they_went(run_cli, tmp_path):
    home = tmp_path / "runs"
    write_run(home, "good")
    write_run(home, "bad", status="failed", error="x")
    write_run(home, "killed", status="running")
    damaged = write_run(home, "damaged")
    (damaged / "resolved.yaml").unlink()
    result = run_cli("runs", home)
    assert result.status == 0, result.err
    assert re.search(r"^good +sft +completed +30 +eval_loss 0.5 +125\.0$", result.out, flags=re.MULTILINE)
    assert max(len(line) for line in result.out.splitlines() if not line.startswith("    ")) <= 80
    listed = {entry["name"]: entry for entry in json.loads(run_cli("runs", home, "--format", "json").out)}
    assert {name: entry["status"] for name, entry in listed.items()} == {
        "good": "completed", "bad": "failed", "killed": "killed", "damaged": "damaged",
    }  # fmt: skip
    assert listed["good"] == {
        "name": "good", "stage": "sft", "status": "completed", "steps": 30, "measure": "eval_loss", "best": 0.5,
        "seconds": 125.0, "folder": str(home / "good" / "20260101-000000"),
    }  # fmt: skip


def test_a_run_that_is_being_made_is_running(run_cli, tmp_path):
    from recipe_runner.runs.folder import lock_run

    run = write_run(tmp_path / "runs", status="running")
    with lock_run(run):
        assert json.loads(run_cli("runs", tmp_path, "--format", "json").out)[0]["status"] == "running"


def test_no_runs_are_no_error(run_cli, tmp_path):
    assert "holds no run" in run_cli("runs", tmp_path).out
    assert run_cli("runs", tmp_path, "--format", "json").out == "[]\n"
    assert run_cli("runs", tmp_path / "nowhere").status == 2


def test_the_first_look_for_runs_is_no_error(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_cli("runs")
    assert (result.status, "There are no runs yet" in result.out) == (0, True)


def test_a_failed_pipeline_keeps_the_stages_that_are_done(run_cli, tmp_path):
    pipeline = write_run(tmp_path / "runs", "chain", status="failed", values={"stage": "pipeline"})
    done = write_run(pipeline / "1", "first")
    failed = write_run(pipeline / "2", "second", status="failed")
    result = run_cli("runs", "rm", "--failed", "--yes", tmp_path / "runs")
    assert result.status == 0, result.err
    assert f"{pipeline} failed, and is kept: it holds runs that did not" in result.out
    assert done.is_dir()
    assert not failed.exists()
    (tmp_path / "link").symlink_to(write_run(tmp_path / "more", status="failed"))
    assert run_cli("runs", "rm", "--failed", "--yes", tmp_path / "link").status == 0
    assert not (tmp_path / "more").exists() or not list((tmp_path / "more").iterdir())


def test_failed_runs_are_removed_after_asking(run_cli, tmp_path, monkeypatch):
    home = tmp_path / "runs"
    good, bad = write_run(home, "good"), write_run(home, "bad", status="failed")
    beside = write_run(home, "bad", "20260102-000000", status="interrupted")
    answers = []
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda text: answers.pop())
    answers.append("n")
    refused = run_cli("runs", "rm", "--failed", home)
    assert (refused.status, bad.is_dir()) == (130, True)
    answers.append("y")
    result = run_cli("runs", "rm", "--failed", home)
    assert (result.status, bad.exists()) == (0, False), result.err
    assert "1 removed" in result.out
    assert good.is_dir()
    assert beside.is_dir()
    assert "no run that failed" in run_cli("runs", "rm", "--failed", home).out
    assert run_cli("runs", "rm", home).status == 2  # it says which, or removes nothing
