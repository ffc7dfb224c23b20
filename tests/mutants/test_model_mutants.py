"""Broken copies of model folders and chat templates: whatever a file of the user's causes below us is no bug."""

import json
import shutil

import pytest
from mutate import Answers, mutate_bytes, mutate_json, time_limit
from shared import CHAT, LORA

# Sizes that a configuration can name, and this machine can hold.
SIZES = [None, True, 0, -1, 1, 3, 1.5, 10**9, "", "x", [], {}, [1], "auto"]
SAID = ["{{ bos_token }}", "{{ 1 / 0 }}", "{{ nosuch }}", "{{ raise_exception('no') }}", "{% if %}", "{% for x in 3 %}"]
SAID += [
    "{{ messages[9] }}",
    "{{ messages | tojson }}",
    "{{ messages.content }}",
    "{% endfor %}",
    "{#",
    "{{",
    "\x00",
    "{{ x.y.z }}",
]
SAID += [
    "{% set messages = [] %}",
    "{{ [1] + 'a' }}",
    "{{ 'a' * 3 }}",
    "{% break %}",
    "{{ loop.index }}",
    "<|end|>",
    "\ud7ff",
]


def mutate_folder(folder, chance):
    """Breaks one file of a folder, or takes one away; returns what was done."""
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    kind = chance.random()
    if kind < 0.1:
        file.unlink()
        what = "removed"
    elif kind < 0.15:
        file.unlink()
        file.mkdir()
        what = "a folder"
    elif kind < 0.7 and file.suffix == ".json":
        value = json.loads(file.read_text())
        what = mutate_json(value, chance, SIZES)
        file.write_text(json.dumps(value))
    else:
        data, what = mutate_bytes(file.read_bytes(), chance)
        file.write_bytes(data)
    return f"{file.relative_to(folder)}: {what}"


@pytest.mark.mutants(24, 500)
def test_model_folders(small_recipe, run_cli, tiny_phi3, tmp_path, mutants, report_figure):
    model = tmp_path / "model"
    training = {"max_steps": 1, "max_length": 64}
    sections = {"rows": CHAT, "dataset": {"format": "chat"}, "model": {"name_or_path": str(model)}, "peft": LORA}
    recipe = small_recipe(training=training, **sections)
    answers = Answers("model folders", mutants.seed)
    for _ in range(mutants.count):
        shutil.copytree(tiny_phi3, model)
        what = mutate_folder(model, answers.chance)
        with time_limit(what):
            answers.add(what, run_cli(recipe, "--resume", "never"))
        shutil.rmtree(model)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    answers.check(report_figure)


def mutate_template(text, chance):
    """Cuts, repeats or replaces a part between marks, or writes something between them."""
    parts = text.replace("{", "\0{").replace("}", "}\0").split("\0")
    at = chance.randrange(len(parts))
    match chance.choice(["remove", "repeat", "insert", "insert", "replace", "bytes"]):
        case "remove":
            del parts[at]
        case "repeat":
            parts.insert(at, parts[at])
        case "insert":
            parts.insert(at, chance.choice(SAID))
        case "replace":
            parts[at] = chance.choice(SAID)
        case _:
            return mutate_bytes(text.encode(), chance)[0]
    return "".join(parts).encode()


@pytest.mark.mutants(60, 300)
def test_templates(small_recipe, run_cli, tokenizer, tmp_path, mutants, report_figure):
    template = tmp_path / "chat.jinja"
    training = {"chat_template_path": template.name, "max_length": 64}
    recipe = small_recipe(rows=CHAT, dataset={"format": "chat"}, training=training)
    answers = Answers("chat templates", mutants.seed)
    for _ in range(mutants.count):
        template.write_bytes(mutate_template(tokenizer.chat_template, answers.chance))
        with time_limit(template.read_bytes()):
            result = run_cli("preview", recipe)
        answers.add(template.read_bytes(), result)
        if not result.status and "say 3" not in run_cli("preview", recipe, "--row", 4).out:
            answers.wrong.append(f"accepted, and a question is lost: {template.read_bytes()}")
    answers.check(report_figure)
