"""Broken copies of the shipped launch configurations: each is answered, and never as a bug."""

import json

import pytest
import yaml
from conftest import ROOT
from mutate import Answers, mutate_bytes, mutate_json, time_limit

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.mutants(150, 500)
def test_launch_files(run_cli, tmp_path, mutants, report_figure):
    file = tmp_path / "launch.yaml"
    answers = Answers("launch files", mutants.seed)
    for _ in range(mutants.count):
        text = answers.chance.choice(CONFIGS).read_text()
        if answers.chance.random() < 0.6:
            values = yaml.safe_load(text)
            what = mutate_json(values, answers.chance)
            data = (yaml.safe_dump(values) if answers.chance.random() < 0.5 else json.dumps(values)).encode()
        else:
            data, what = mutate_bytes(text.encode(), answers.chance)
        file.write_bytes(data)
        with time_limit(data):
            result = run_cli("validate", "phi3_chat_qlora", "--accelerate-config", file)
        answers.add(f"{what}: {data}", result)
    answers.check(report_figure)
