"""`recipe-run explain`: every key of the schema and every error code has an answer."""

import json
import re

import pytest

from recipe_runner.methods import METHODS
from recipe_runner.recipe import schema
from recipe_runner.recipe.library import shelf
from recipe_runner.stages import STAGES


def test_upstream_key_shows_type_default_choices_help_and_class(run_cli):
    out = run_cli("explain", "training.packing_strategy").out
    assert out.startswith("training.packing_strategy (stage pretrain)\n  Strategy for packing sequences.")
    assert 'default: "bfd_split"' in out
    assert "choices: bfd, bfd_split, wrapped" in out
    assert 'default: "bfd"' in out
    assert re.search(r"from: +SFTConfig, trl \d+\.\d+\.\d+", out)


def test_a_key_that_stages_understand_differently_is_explained_for_each(run_cli):
    out = run_cli("explain", "training.loss_type").out
    assert "choices: nll, dft" in out
    assert "from:    SFTConfig" in out
    assert "'sppo_hard'" in out
    assert "from:    DPOConfig" in out
    heads = [line for line in out.splitlines() if line.startswith("training.")]
    assert heads[:2] == ["training.loss_type (stage pretrain, sft)", "training.loss_type (stage dpo)"]
    named = [name for line in heads for name in re.search(r"stage ([\w, ]+)", line)[1].split(", ")]
    assert sorted(named) == sorted(set(STAGES) - {"rloo", "distillation"})  # which have one loss


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("training.learning_rate", "exclusiveMinimum 0"),
        ("training.seed", "instead: run.seed"),
        ("peft", "keys: method"),
        ("dataset.train.0.columns", "Role of a column"),
        ("dataset.eval.fraction", "held out"),
        ("run.seed", "default: 42"),
        ("quantization.bnb_4bit_quant_type", "choices: nf4, fp4"),
        ("unknown-key", "unknown-key: there is no such key"),
        ("renamed-key", "what to do: write the new name"),
        ("hub-unreachable", "the hub does not answer"),
        ("rewards.0.key", "Of json_equal"),
        ("stages.reward_from", "reward model takes the place"),
        ("json_equal", "json_equal is a choice of rewards.name"),
        ("rloo", "rloo is a choice of stage"),
        ("ppo", "ppo is no choice of stage: TRL removed its PPO trainer; use 'rloo' or 'grpo'"),
        ("nf4", "nf4 is a choice of quantization.bnb_4bit_quant_type"),
        ("vera", "vera is a choice of peft.method"),
        ("xlora", "xlora is no choice of peft.method: it routes"),
    ],
)
def test_keys_and_codes_are_explained(run_cli, name, text):
    result = run_cli("explain", name)
    assert result.status == 0
    assert text in result.out


def test_every_key_that_may_be_set_is_explained(run_cli):
    for section in schema.SECTIONS:
        for key in schema.section_keys(section):
            lines = run_cli("explain", f"{section}.{key}").out.splitlines()
            assert lines[0].startswith(f"{section}.{key}")
            assert len(lines) > 1


def test_every_documented_code_is_explained(run_cli):
    text = (shelf() / "docs" / "errors.md").read_text()
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    for code in re.findall(r"`([a-z0-9-]+)`", " ".join(rows)):
        assert run_cli("explain", code).out.startswith(f"{code}: ")


def test_an_unknown_name_suggests_the_nearest(run_cli):
    result = run_cli("explain", "training.packing_stratgy")
    assert result.status == 1
    assert "did you mean 'training.packing_strategy'?" in result.err


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["valdate", "x.yaml"], 2, "there is no command and no recipe 'valdate'; did you mean 'validate'?"),
        (["previw"], 2, "did you mean 'preview'?"),
        (["chat"], 1, "no shipped recipe 'chat'; `recipe-run list chat` shows the 10 that are like it"),
        (["phi3_chat"], 1, "no shipped recipe 'phi3_chat'; did you mean 'phi3_chat_qlora'?"),
        (["phi3_chat_qlra"], 1, "did you mean 'phi3_chat_qlora'?"),
        (["mine"], 1, "did you mean 'mine.yaml'?"),
        (["validate", "mine"], 1, "did you mean 'mine.yaml'?"),
        (["zzz"], 1, "no shipped recipe 'zzz'; `recipe-run list` shows them"),
    ],
    ids=str,
)
def test_a_name_that_is_not_there_gets_the_nearest(run_cli, tmp_path, monkeypatch, arguments, status, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("")
    result = run_cli(*arguments)
    assert (result.status, said in result.out + result.err) == (status, True), result.err


def test_a_source_lists_its_keys(run_cli):
    said = " ".join(run_cli("explain", "dataset.train").out.split())
    keys = (
        "source, subset, split, revision, columns, sample_by, field, delimiter, format, encoding, limit, weight, epochs"
    )
    assert f"keys: {keys}" in said


def test_other_validators_say_what_replaces_a_renamed_key():
    import jsonschema

    bundle = json.loads((shelf() / "schema" / "recipe.bundle.schema.json").read_text())
    recipe = {"schema_version": 1, "name": "a", "stage": "sft", "training": {"max_seq_length": 5}}
    found = list(jsonschema.Draft202012Validator(bundle).iter_errors(recipe))
    assert any("use 'max_length'" in error.message for error in found)


def test_the_table_of_methods_says_what_the_records_say():
    """All but the trained part, which `scripts/make_methods_table.py` measures."""
    page = (shelf() / "docs" / "methods.md").read_text().partition("<!-- end of table -->")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `") and " % |" in line]
    told = {row[0].split("`")[1]: ("three steps only" in row[0], *row[2:]) for row in rows}
    words = {True: "yes", False: "no"}
    assert told == {
        name: (method.tried, words[method.merges], words[method.quantized], method.latency, method.trains, method.paper)
        for name, method in METHODS.items()
    }
