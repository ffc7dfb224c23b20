"""`recipe-run smoke`: what it says of recipes that can't be executed, and what it leaves alone."""

import json

import pytest
from conftest import ROOT

from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.models import read_models

SAMPLES = ROOT / "recipes" / "samples"


@pytest.fixture
def recipe(write_recipe):
    """A small recipe on a model with facts, with sample rows for data on the hub."""

    def recipe(name="tiny", **sections):
        given = {
            "model": {"name_or_path": "Qwen/Qwen2.5-0.5B-Instruct"},
            "dataset": {
                "format": "instruction",
                "train": {"source": "openai/gsm8k", "columns": {"instruction": "question", "output": "answer"}},
                "eval": {"fraction": 0.1},
            },
            "training": {"max_steps": 1000, "eval_strategy": "epoch", "warmup_steps": 0.03},
            "metadata": {"sample": str(SAMPLES / "gsm8k.jsonl")},
        }
        for section, keys in sections.items():
            given[section] = {**given.get(section, {}), **keys} if isinstance(keys, dict) else keys
        return write_recipe(name, **given)

    return recipe


def test_recipes_are_executed_and_told(run_cli, recipe, tmp_path):
    recipe("one")
    recipe("two", peft={"method": "lora", "r": 4, "target_modules": "all-linear"}, training={"learning_rate": 1e-3})
    result = run_cli("smoke", tmp_path, "--verbose")
    assert result.status == 0, result.out + result.err
    assert "ok     one (" in result.out
    assert "ok     two (" in result.out
    assert "2 executed, 0 failed" in result.out
    assert "model: qwen2 of 2 layers, 112 wide; synthetic tokenizer; template trl/qwen2_5.jinja" in result.out
    assert "rows: 3 sample rows" in result.out
    assert "changed: training.max_steps: 4" in result.out
    assert not (tmp_path / "runs").exists()


def test_several_processes_give_the_same(tmp_path, recipe):
    import os
    import subprocess
    import sys

    for name in ("one", "two"):
        recipe(name)
    command = [sys.executable, "-m", "recipe_runner", "smoke", str(tmp_path), "--jobs", "2", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    told = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert [(entry["name"], entry["ok"], entry["steps"]) for entry in told] == [("one", True, 4), ("two", True, 4)]


def test_a_table_for_a_summary(run_cli, recipe):
    result = run_cli("smoke", recipe(), "--format", "markdown", "--steps", "3")
    assert result.out.startswith("| recipe | | seconds | rows | model |")
    assert "| tiny | ok |" in result.out
    assert "1 executed, 0 failed" in result.out


def test_what_can_not_be_executed_is_one_line_and_the_others_run(run_cli, recipe, tmp_path):
    """An architecture that is not known, code of its own, a template that can't render, a method that is refused."""
    models = tmp_path / "models"
    for name, config in {
        "unknown": {"model_type": "nothing_like_it", "architectures": ["NothingForCausalLM"]},
        "remote": {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}},
    }.items():
        (models / name).mkdir(parents=True)
        (models / name / "config.json").write_text(json.dumps(config))
    template = tmp_path / "refusing.jinja"
    template.write_text("{{ raise_exception('only poems are rendered') }}")
    broken = {
        "a_unknown": {"model": {"name_or_path": str(models / "unknown")}},
        "b_remote": {"model": {"name_or_path": str(models / "remote")}},
        "c_nowhere": {"model": {"name_or_path": "someone/some-model"}},
        "d_template": {"training": {"chat_template_path": str(template), "max_steps": 1000, "eval_strategy": "epoch"}},
        "e_method": {"peft": {"method": "lora", "r": 4, "target_modules": ["query_key_value"]}},
        "f_typo": {"training": {"learning_rat": 1e-4}},
        "g_sample": {"metadata": {"sample": str(tmp_path / "nothing.jsonl")}},
    }
    for name, sections in broken.items():
        recipe(name, **sections)
    recipe("z_good")
    result = run_cli("smoke", tmp_path)
    assert result.status == 1
    lines = result.out.splitlines()
    said = {lines[n].split()[1]: lines[n + 1] for n in range(len(lines) - 1) if lines[n].startswith("FAILED")}
    assert "ok     z_good" in result.out
    assert set(said) == set(broken), result.out
    for name, code in {
        "a_unknown": "error[model-config]",
        "b_remote": "error[remote-code]",
        "c_nowhere": "error[model-facts-missing]",
        "d_template": "error[row-refused]",
        "e_method": "error[target-not-found]",
        "f_typo": "error[unknown-key]",
        "g_sample": "error[unreadable-data]",
    }.items():
        assert code in said[name], said[name]
    assert "Traceback" not in result.out + result.err
    assert f"{len(broken) + 1} executed, {len(broken)} failed" in result.out


def test_a_launch_configuration_that_contradicts_the_recipe_is_told(run_cli, recipe):
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    lora = {"method": "lora", "r": 4, "target_modules": "all-linear"}
    file = recipe(quantization=four, peft=lora, metadata={"launch": "fsdp2"}, training={"learning_rate": 1e-3})
    result = run_cli("smoke", file)
    assert result.status == 1
    assert "bnb_4bit_quant_storage" in result.out


def test_rows_are_made_up_where_none_are_named(run_cli, recipe):
    result = run_cli("smoke", recipe(metadata=None), "--verbose")
    assert result.status == 0, result.out
    assert "rows: made-up rows" in result.out


@pytest.mark.parametrize("training", [{}, {"packing": True, "max_length": 256}])
def test_segments_are_learned_by_their_labels(run_cli, recipe, training):
    dataset = {"format": "segments", "train": {"source": "someone/pieces"}, "eval": None}
    result = run_cli("smoke", recipe(metadata=None, dataset=dataset, training=training | {"eval_strategy": "no"}))
    assert result.status == 0, result.out + result.err


@pytest.mark.parametrize("facts", read_models().values(), ids=lambda facts: facts.name)
def test_a_model_has_as_many_parameters_as_were_published(facts):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from recipe_runner.model.base import build_empty
    from recipe_runner.recipe.sections import ModelSection
    from recipe_runner.smoke.stand_in import read_config

    model = ModelSection(facts.name, "main", True, False)
    if facts.model_type not in CONFIG_MAPPING_NAMES:  # its code is its repository's own
        assert facts.model_type == "phi3_v"
        with pytest.raises(UserError, match="transformers knows no architecture"):
            read_config(model, facts)
        return
    count = sum(parameter.numel() for parameter in build_empty(read_config(model, facts)).parameters())
    assert abs(count / facts.parameters - 1) < 0.01


def test_a_small_model_is_of_the_same_architecture():
    """Heads in proportion, every kind of layer, windows, norms, tied embeddings."""
    from recipe_runner.model.tiny import shrink_config
    from recipe_runner.recipe.models import find_facts
    from recipe_runner.recipe.sections import ModelSection
    from recipe_runner.smoke.stand_in import build_model, read_config

    for name in (
        "google/gemma-3-1b-it",
        "Qwen/Qwen3-30B-A3B",
        "microsoft/Phi-4-mini-instruct",
        "HuggingFaceTB/SmolLM3-3B-Base",
    ):
        config = read_config(ModelSection(name, "main", True, False), find_facts(name))
        small = shrink_config(config, 400, keep_heads=True)
        assert (
            small.num_attention_heads / small.num_key_value_heads
            == config.num_attention_heads / config.num_key_value_heads
        )
        assert small.tie_word_embeddings == config.tie_word_embeddings
        assert set(getattr(small, "layer_types", None) or [0]) == set(getattr(config, "layer_types", None) or [0])
        kinds = {type(module).__name__ for module in build_model(small).modules()}
        import torch

        with torch.device("meta"):
            assert kinds == {type(module).__name__ for module in build_model(config).modules()}
