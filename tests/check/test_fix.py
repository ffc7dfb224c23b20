"""`validate --fix` changes what is certain, and not a character more."""

import json

import pytest

from recipe_runner.recipe.resolve import load_recipe

HEAD = (
    "schema_version: 1\nname: t\nstage: sft\nmodel: {name_or_path: a/b}\n"
    "dataset: {format: text, train: {source: a/b}}\n"
)


@pytest.fixture
def fix(run_cli, tmp_path):
    """Fixes a recipe with the given tail; returns the result and the new text of the tail."""

    def fix(tail, name="t", head=HEAD):
        file = tmp_path / f"{name}.yaml"
        file.write_bytes((head + tail).encode())
        result = run_cli("validate", "--fix", file)
        text = file.read_bytes().decode()
        assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]
        return result, text.removeprefix(head)

    return fix


@pytest.mark.parametrize(
    ("tail", "fixed"),
    [
        ("training:\n  max_seq_length: 9  # tokens\n", "training:\n  max_length: 9  # tokens\n"),
        ("training: # é\r\n  learning_rat:   2e-4\r\n", "training: # é\r\n  learning_rate:   2e-4\r\n"),
        ("training: {'learning_rat': 2e-4, max_step: 3}", "training: {'learning_rate': 2e-4, max_steps: 3}"),
        ("trainig: {evaluation_strategy: 'no'} # x\n", "training: {evaluation_strategy: 'no'} # x\n"),
        (
            "training: {packing: true, packing_strategy: 'bfd-requeue'}",
            "training: {packing: true, packing_strategy: 'bfd_split'}",
        ),
        ("training:\n  optim:  adamw_8bt # small\n", "training:\n  optim:  adamw_8bit # small\n"),
    ],
)
def test_certain_fixes_keep_comments_order_and_layout(fix, tail, fixed):
    result, text = fix(tail)
    assert text == fixed
    assert "--- " in result.out
    assert "+++ " in result.out


@pytest.mark.parametrize(
    "tail",
    [
        "training: {learning_rat: 1e-4, learning_rate: 2e-4}\n",  # the right key is there
        "training: {learning_rat: 1e-4, learning_rte: 2e-4}\n",  # two for one
        "training: {lr: 1e-4}\n",  # a guess
        "training: {adam_beta: 0.9}\n",  # adam_beta1, or adam_beta2?
        "training: {optim: adam}\n",  # which of them?
        "training: {warmup_ratio: 0.1}\n",  # renamed, with another meaning
        "training: {seed: 3}\n",  # belongs elsewhere
        "training: {max_steps: '3'}\n",
        "training: {max_seq_length: 9\n",  # not YAML
    ],
)
def test_what_is_not_certain_is_left_alone(fix, tail):
    result, text = fix(tail)
    assert text == tail
    assert result.status == 1


def test_the_name_is_made_the_files(fix):
    result, text = fix("", name="other", head=HEAD)
    assert result.status == 0
    assert text == HEAD.replace("name: t", "name: other")


def test_a_fixed_recipe_is_valid_and_left_alone_the_next_time(fix):
    result, text = fix("training: {max_seq_length: 9, learning_rat: 1e-4}\n")
    assert result.status == 0
    assert result.out.endswith("1 recipe, 0 errors, 0 warnings\n")
    again, same = fix(text)
    assert (again.out, same) == ("1 recipe, 0 errors, 0 warnings\n", text)


def test_an_error_of_the_base_is_not_mended_in_the_child(run_cli, tmp_path):
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text(HEAD.replace("name: t", "name: base") + "training: {max_seq_length: 9}\n")
    child.write_text("schema_version: 1\nname: child\nextends: base.yaml\n")
    before = base.read_text(), child.read_text()
    assert run_cli("validate", "--fix", child).status == 1
    assert (base.read_text(), child.read_text()) == before


@pytest.mark.parametrize(
    "name",
    [
        *(
            "123",
            "null",
            "true",
            "no",
            "1e3",
            "0x1f",
            "2024",
            "2024-01-01",
            "1.5",
            "~",
            "a-b.c",
            "x y",
            "größe",
            ".a",
            "-x",
        ),
        *("a: b", "#x", "a#b", "[x]", "it's", 'say "x"', "&a", "x" * 101, "a, b", "{x}", "- x", "😀"),
    ],
)
@pytest.mark.parametrize("written", ["other", "'other'", '"other"', "other # so far"])
def test_a_fixed_name_is_valid_under_any_file_name(run_cli, tmp_path, name, written):
    file = tmp_path / f"{name}.yaml"
    source = "dataset: {format: text, train: {source: a/b}}\n"
    file.write_text(f"schema_version: 1\nname: {written}\nstage: pretrain\nmodel: {{name_or_path: a/b}}\n{source}")
    before = file.read_text()
    run_cli("validate", "--fix", file)
    result = run_cli("validate", "--format", "json", file)
    problems = json.loads(result.out)
    assert result.status == 0
    if problems:
        assert [problem["code"] for problem in problems] == ["name-differs"]
        assert problems[0]["suggestion"].startswith("rename the file: ")
        assert file.read_text() == before
    else:
        assert load_recipe(str(file)).name == name
