"""The shelf: every recipe says what it should, the catalogue is the shelf's, and facts have sources."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from recipe_runner.recipe.catalogue import choose, read_catalogue, write_count
from recipe_runner.recipe.library import shipped_recipes
from recipe_runner.recipe.models import find_facts, read_count, read_models
from recipe_runner.recipe.resolve import load_recipe

NOT_TRAINED = "# Not trained at full size here: only executed small, by recipe-run smoke."
FILES = shipped_recipes()
ENTRIES = read_catalogue()


def test_the_shelf_is_one():
    """At least thirty recipes, of every kind of model, task, stage and method that the library is for."""
    assert len(ENTRIES) >= 30
    assert {entry.task for entry in ENTRIES} == set(
        json.loads((ROOT / "schema" / "recipe.schema.json").read_text())["$defs"]["metadata"]["properties"]["task"][
            "enum"
        ]
    )
    methods = {"full", "partial", "hybrid", "bottleneck", "lora", "dora", "qlora", "adalora", "ia3", "prefix_tuning"}
    assert methods | {"prompt_tuning", "p_tuning"} <= {entry.method for entry in ENTRIES}
    kinds = {facts.model_type for entry in ENTRIES if (facts := find_facts(entry.model))}
    assert {"phi3", "llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "mistral", "smollm3", "olmo2"} <= kinds


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_opens_with_its_command_and_its_hardware(file):
    schema, command, hardware, *more = file.read_text().splitlines()
    assert schema == "# yaml-language-server: $schema=../schema/recipe.schema.json", "the first line names the schema"
    said = rf"# (accelerate launch )?recipe-run recipes/{file.name}( --accelerate-config \w+)?"
    assert re.fullmatch(said, command), (
        f"the second line is its command: # accelerate launch recipe-run recipes/{file.name}"
    )
    assert hardware.startswith("# For "), "the third line is the hardware: # For one GPU of 8 GB with bfloat16."
    recipe = load_recipe(str(file))
    launch = (recipe.values["metadata"]).get("launch")
    assert command.endswith(f"--accelerate-config {launch}") == bool(launch)
    own = all(
        stage.model.folder for stage in (recipe.stages or (recipe,))
    )  # the demo model: trained here, and measured
    if recipe.values["metadata"].get("not_run"):
        assert more[0].startswith("# Not run at any size: "), "the fourth line says why it was never run"
        return
    assert (more[0] == NOT_TRAINED) != own, f"the fourth line is: {NOT_TRAINED}"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_recipe_names_licenses_task_and_rows(entry):
    assert entry.task
    assert entry.license
    assert entry.data_license
    assert entry.hardware
    assert entry.parameters, "its model has no facts in recipes/models.json"
    recipe = load_recipe(str(entry.file))
    for stage in recipe.stages or (recipe,):
        hub = [source.source for source in stage.dataset.sources if "/" in source.source and source.source[0] != "/"]
        sample = (stage.values.get("metadata") or {}).get("sample")
        assert bool(hub) == bool(sample), f"metadata.sample names three rows in the layout of {', '.join(hub)}"
        for source in stage.dataset.sources if sample else ():
            file = sample if isinstance(sample, str) else sample[source.source]
            rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
            assert len(rows) == 3, f"{file} has {len(rows)} rows, not three"
            assert set(source.columns.values()) <= set(rows[0]), source.source


@pytest.mark.parametrize("facts", read_models().values(), ids=lambda facts: facts.name)
def test_facts_have_sources(facts):
    named = {source["what"] for source in facts.sources}
    words = {word for name in named for word in name.replace(",", " ").split()}
    missing = {"config", "parameters", "license", "tokens"} - words
    assert not missing, f"no entry of sources has in its `what`: {', '.join(sorted(missing))}"
    assert all(source["where"] for source in facts.sources)
    assert facts.tokens["eos"] in facts.tokens["stops"] or facts.template
    assert not re.search(r"/work/|/tmp/|index id|corpus", json.dumps(facts.sources))
    if facts.template and not facts.template.startswith("trl/"):
        assert (ROOT / "recipes" / "templates" / facts.template).is_file()


def test_the_catalogue_is_not_stale():
    sys.path.insert(0, str(ROOT / "scripts"))
    from make_catalogue import write_catalogue

    assert (ROOT / "recipes" / "README.md").read_text() == write_catalogue(ENTRIES)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"words": ["gsm8k"]}, set()),
        (
            {"words": ["mathematics"]},
            {"phi3_grpo_qlora", "qwen25_05b_math_partial", "qwen3_06b_math_partial", "qwen3_17b_reasoning_qlora"},
        ),
        (
            {"words": ["mathmatics"]},
            {"phi3_grpo_qlora", "qwen25_05b_math_partial", "qwen3_06b_math_partial", "qwen3_17b_reasoning_qlora"},
        ),
        ({"words": ["law"]}, {"mistral_7b_law_qlora"}),
        (
            {"words": [], "stage": "dpo", "most": 2_000_000_000},
            {"llama32_1b_dpo_lora", "smollm2_replies_dpo", "smolvlm_256m_charts_dpo"},
        ),
        ({"words": [], "method": "dora"}, {"llama32_3b_instruct_dora"}),
        (
            {"words": [], "stage": "pipeline"},
            {"smollm2_desk_pipeline", "smollm2_desk_rl_pipeline", "smollm2_filing_grpo_pipeline"},
        ),
        ({"words": [], "model": "mistral", "task": "domain"}, {"mistral_7b_law_qlora"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_recipes_are_found(options, found):
    words, most = options["words"], options.get("most")
    assert {
        entry.name
        for entry in choose(ENTRIES, words, most, **{k: of for k, of in options.items() if k not in ("words", "most")})
    } == found


def test_list_says_what_was_not_found(run_cli):
    result = run_cli("list", "sentimnt", "--model", "lama")
    assert result.status == 1
    assert "error[no-recipes] none of" in result.err
    assert run_cli("list", "--max-params", "many").status == 2


@pytest.mark.parametrize(
    ("text", "number"), [("3.8B", 3_800_000_000), ("135M", 135_000_000), ("3,821,079,552", 3821079552)]
)
def test_numbers_of_parameters_are_read(text, number):
    assert read_count(text) == number


def test_numbers_of_parameters_are_written():
    assert [write_count(number) for number in (134_515_008, 999_885_952, 3_821_079_552, None)] == [
        "135M",
        "1B",
        "3.82B",
        "",
    ]


def test_a_copy_within_the_shelf_is_a_recipe_of_the_shelf():
    from recipe_runner.recipe.new import copy_shipped

    lines = copy_shipped(ROOT / "recipes" / "other.yaml", "llama32_1b_chat_lora").splitlines()
    assert lines[:4] == [
        "# yaml-language-server: $schema=../schema/recipe.schema.json",
        "# accelerate launch recipe-run recipes/other.yaml",
        "# For one GPU of 8 GB with bfloat16.",
        NOT_TRAINED,
    ]
    assert any("samples/" in line and str(ROOT) not in line for line in lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{,}", "it is no JSON"),
        ({"gated": ...}, "m/x: 'gated' is missing; give it true or false or null"),
        ({"parameters": 135}, "m/x: 'parameters' is 135; it is a text"),
        ({"parameters": "many"}, "m/x: 'many' is no number of parameters: write 3.8B or 135M"),
        ({"contxt": 1}, "m/x: unknown key 'contxt'; did you mean 'context'?"),
        ({"template": "mine.jinja"}, "m/x: there is no template mine.jinja; put it in recipes/templates/"),
    ],
    ids=["json", "missing", "type", "count", "unknown", "template"],
)
def test_facts_that_can_not_be_read_are_one_line(tmp_path, monkeypatch, text, said):
    from recipe_runner.problems.errors import UserError
    from recipe_runner.recipe import models

    if isinstance(text, dict):
        good = json.loads((ROOT / "recipes" / "models.json").read_text())["microsoft/Phi-3-mini-4k-instruct"]
        text = json.dumps({"m/x": {key: value for key, value in (good | text).items() if value is not ...}})
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "models.json").write_text(text)
    monkeypatch.setattr(models, "shelf", lambda: tmp_path)
    with pytest.raises(UserError) as caught:
        models.read_models.__wrapped__()
    assert f"models.json: error[model-facts] {said}" in str(caught.value)


def test_a_copy_is_valid_where_it_is(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_cli("copy", "smollm2_tickets_lora")
    assert result.status == 0, result.err
    assert run_cli("validate", "--strict", "smollm2_tickets_lora.yaml").status == 0
    text = (tmp_path / "smollm2_tickets_lora.yaml").read_text()
    assert str(ROOT / "recipes" / "data" / "tickets_train.jsonl") in text
    again = run_cli("copy", "smollm2_tickets_lora")
    assert (again.status, "error[file-exists]" in again.err) == (1, True)
    assert run_cli("copy", "smollm2_tickets_lora", "mine.yaml").status == 0
    assert "name: mine" in (tmp_path / "mine.yaml").read_text()
    assert run_cli("copy", "nothing_like_it").status == 1
