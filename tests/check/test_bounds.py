"""Whatever a file of at most a megabyte holds: `validate` answers within two seconds and 200 megabytes."""

import json
import os
import random
import subprocess
import sys

import pytest

SECONDS, MEGABYTES = 2, 200
MEGABYTE = 1_000_000
HEAD = "schema_version: 1\nname: nasty\ndescription: x\nstage: sft\nmodel: {name_or_path: a/b}\n"
DATA = "dataset: {format: text, train: {source: a/b}}\n"
INSTRUCTION = "dataset:\n  format: instruction\n  train: {source: a/b}\n  template: "

# Answers `validate` for each line of stdin, in a process of its own: status, seconds of CPU time, megabytes.
SERVER = """
import os, sys
from recipe_runner.cli import main
import recipe_runner.cli.validate, recipe_runner.problems.writers, recipe_runner.launch.configuration
import recipe_runner.recipe.resolve
from recipe_runner.recipe import schema
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("answer.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
        sys.argv = ["recipe-run", "validate", *line.split()]
        main()
    _, status, usage = os.wait4(child, 0)
    print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, flush=True)
"""


def repeat(part, most=MEGABYTE):
    """A part as often as a megabyte, or some other number of bytes, holds it."""
    return part * (most // len(part.encode()))


def count(form, number):
    """A form with numbers in it."""
    return "".join(form.format(i) for i in range(number))


# Nesting, aliases, keys, texts: each has made a reader, a schema or a message slow somewhere.
NASTY = {
    "brackets": lambda n: repeat("[", n),
    "brackets_below": lambda n: "training: " + repeat("[", n),
    "braces": lambda n: repeat("{", n),
    "braces_with_keys": lambda n: repeat("{a: ", n),
    "dashes": lambda n: repeat("- ", n),
    "questions": lambda n: repeat("? ", n),
    "mappings_as_keys": lambda n: "a: " + "{" * min(n, 48) + "}" * min(n, 48),
    "unknown_keys": lambda n: HEAD + DATA + count("key_{}: 1\n", n // 20),
    "unknown_keys_of_training": lambda n: HEAD + DATA + "training:\n" + count("  learning_rat{}: 1\n", n // 30),
    "unknown_columns": lambda n: (
        HEAD
        + "dataset:\n  format: text\n  train:\n    source: a/b\n    columns:\n"
        + count("      colum{}: x\n", n // 30)
    ),
    "extended": lambda n: "extends: phi3_chat_qlora\npeft:\n  rank_pattern:\n" + count("    x{}: 4\n", n // 50),
    "extended_unknown": lambda n: "extends: phi3_chat_qlora\ntraining:\n" + count("  learning_rat{}: 1\n", n // 50),
    "aliases": lambda n: "a: &a [1]\nb: [" + repeat("*a,", n) + "]\n",
    "aliases_of_mappings": lambda n: "a: &a {x: {y: 1}}\n" + count("b{}: *a\n", n // 20),
    "alias_bomb": lambda n: (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, min(n, 30)))
    ),
    "anchors": lambda n: count("k{0}: &a{0} [{0}]\n", n // 30),
    "duplicates": lambda n: repeat("a: 1\n", n),
    "documents": lambda n: repeat("---\n", n),
    "lines": lambda n: repeat("\n", n),
    "returns": lambda n: repeat("a: 1\r", n),
    "comments": lambda n: repeat("# x\n", n),
    "byte_order_marks": lambda n: repeat("\ufeff", n),
    "digits": lambda n: HEAD + DATA + "run: {seed: " + repeat("1", n) + "}",
    "backslashes": lambda n: 'a: "' + repeat("\\", n),
    "long_key": lambda n: '? "' + repeat("learning_rate", n) + '"\n: 1\n',
    "long_name": lambda n: HEAD.replace("nasty", repeat("a_", n)) + DATA,
    "long_model": lambda n: HEAD.replace("a/b", repeat("a-", n) + "/b") + DATA,
    "long_source": lambda n: HEAD + DATA.replace("a/b", repeat("a.", n) + "/b!"),
    "long_path": lambda n: HEAD + DATA.replace("a/b", "./" + repeat("../", n) + "x.jsonl"),
    "long_extends": lambda n: "extends: " + repeat("../", n) + "x.yaml\n",
    "long_output_dir": lambda n: HEAD + DATA + "run: {output_dir: " + repeat("~/", n) + "}\n",
    "tags": lambda n: count("a{}: !x 1\n", n // 20),
    "wrong_items": lambda n: HEAD + DATA + "peft: {method: lora, target_modules: [" + repeat("[1],", n // 8) + "]}\n",
    "mixed_items": lambda n: HEAD + DATA + "tags: [" + repeat("1,a,", n // 8) + "]\n",
    "pattern": lambda n: HEAD + DATA + 'peft: {method: lora, target_modules: "' + repeat("(a*)*", n) + '"}\n',
    "sources": lambda n: (
        HEAD + "dataset:\n  format: text\n  train:\n" + count("  - {{source: a/b{}, weight: 1}}\n", n // 200)
    ),
    "missing_files": lambda n: (
        HEAD + "dataset:\n  format: text\n  train:\n" + count("  - {{source: x{}.txt, weight: 1}}\n", n // 200)
    ),
    "stages": lambda n: (
        "schema_version: 1\nname: nasty\nstage: pipeline\nstages: [" + repeat("phi3_chat_qlora,", n) + "]"
    ),
    "outputs": lambda n: HEAD + INSTRUCTION + '"{instruction}' + repeat("{output}", n) + '{input}"\n',
    "pairs_of_places": lambda n: HEAD + INSTRUCTION + '"' + repeat("{instruction}{output}", n) + '{input}"\n',
    "open_braces": lambda n: HEAD + INSTRUCTION + '"{instruction}' + repeat("{", n) + '"\n',
    "words_in_braces": lambda n: HEAD + INSTRUCTION + '"{instruction}' + repeat("{a", n) + '{output}"\n',
}
LAUNCH = "distributed_type: MULTI_GPU\nnum_processes: 2\n"
NASTY_LAUNCH = {
    "launch_brackets.json": lambda n: repeat("[", n),
    "launch_objects.json": lambda n: repeat('{"a":', n),
    "launch_unknown.yaml": lambda n: LAUNCH + count("num_machine{}: 1\n", n // 30),
    "launch_text.yaml": lambda n: LAUNCH + "main_process_ip: " + repeat("1.", n) + "\n",
    "launch_brackets.yaml": lambda n: LAUNCH + "fsdp_config: " + repeat("[", n) + "\n",
    "launch_1_1.yaml": lambda n: LAUNCH + count("k{}: no\n", n // 30),
}


@pytest.fixture
def ask(tmp_path):
    """Asks `validate` for some arguments: exit status, seconds, megabytes."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def ask(*arguments):
            server.stdin.write(" ".join(map(str, arguments)) + "\n")
            server.stdin.flush()
            status, seconds, megabytes = server.stdout.readline().split()
            return int(status), float(seconds), float(megabytes)

        yield ask
        server.stdin.close()


def test_any_file_of_a_megabyte_is_answered_soon(ask, tmp_path, report_figure):
    """Each kind at full size and at two sizes by chance (seed 1): bounds may lie between."""
    sizes, slowest, largest, asked = random.Random(1), (0.0, ""), (0.0, ""), 0
    (tmp_path / "good.yaml").write_text(HEAD.replace("nasty", "good") + DATA)
    for name, make in {**NASTY, **NASTY_LAUNCH}.items():
        for size in (MEGABYTE * 9 // 10, sizes.randrange(1_000, 90_000), sizes.randrange(90_000, 900_000)):
            file = tmp_path / (name if name in NASTY_LAUNCH else "nasty.yaml")
            file.write_text(make(size))
            arguments = ("good.yaml", "--accelerate-config", name) if name in NASTY_LAUNCH else (file,)
            status, seconds, megabytes = ask(*arguments)
            said = (tmp_path / "answer.txt").read_text()
            assert status in (0, 1), (name, size, said[-500:])
            assert seconds < SECONDS, (name, size, seconds)
            assert megabytes < MEGABYTES, (name, size, megabytes)
            slowest, largest = max(slowest, (seconds, name)), max(largest, (megabytes, name))
            asked += 1
    told = f"slowest {slowest[0]:.2f} s ({slowest[1]}), largest {largest[0]:.0f} MB ({largest[1]})"
    report_figure(f"{asked} nasty files (seed 1): all answered; {told}")


@pytest.mark.parametrize("what", ["device", "pipe", "deep", "folder"])
def test_what_a_recipe_names_may_be_no_file(ask, write_recipe, tmp_path, what):
    """`extends`, data, a template, a launch file, a model's configuration: a device never ends, a pipe never begins."""

    def place(file):
        file.parent.mkdir(exist_ok=True)
        if what == "device":
            file.symlink_to("/dev/zero")
        elif what == "pipe":
            os.mkfifo(file)
        elif what == "folder":
            file.mkdir()
        else:
            file.write_text("[" * 200_000 + "]" * 200_000)
        return file

    model, peft = tmp_path / "model", {"method": "lora", "target_modules": ["q_proj"]}
    place(model / "config.json")
    recipes = {
        "model": write_recipe("model", model={"name_or_path": str(model)}, peft=peft, training={"max_length": 64}),
        "template": write_recipe("template", training={"chat_template_path": str(place(tmp_path / "x.jinja"))}),
        "extends": tmp_path / "extends.yaml",
        "itself": place(tmp_path / "itself.yaml"),
    }
    place(tmp_path / "data.jsonl")
    recipes["data"] = write_recipe("data", dataset={"train": {"source": "data.jsonl"}})
    recipes["extends"].write_text(json.dumps({"extends": str(place(tmp_path / "base.yaml"))}))
    answers = {name: ask(file) for name, file in recipes.items()}
    good = write_recipe("good")
    answers |= {
        f"launch{suffix}": ask(good, "--accelerate-config", place(tmp_path / f"l{suffix}"))
        for suffix in (".json", ".yaml")
    }
    assert all(seconds < SECONDS and megabytes < MEGABYTES for _, seconds, megabytes in answers.values()), answers
    statuses = {name: status for name, (status, _, _) in answers.items()}
    fine = {"model", "data", "template"} if what == "deep" else {"model"}  # their contents are read when they are used
    assert statuses == {name: 0 if name in fine else 1 for name in answers}


def test_a_file_that_waits_for_data_is_not_waited_for(tmp_path):
    """As /proc/kmsg, which calls itself a regular file: here a pipe that somebody holds open, and writes nothing to."""
    from recipe_runner.files import read_begin

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pipe, os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="it waits for data that may never come"):
            read_begin(pipe, 10)
    finally:
        os.close(reader)
        os.close(writer)
