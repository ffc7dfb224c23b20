"""Architectures whose weights have other names in files than in memory, trained as a whole."""

import json
import shutil

import pytest
from learned import ROWS
from safetensors.torch import load_file
from shared import LORA, losses, metrics

KINDS = ["mixtral", "qwen3_moe", "gpt_neox", "llama"]


@pytest.fixture(scope="module")
def build(tokenizer, tmp_path_factory):
    """A tiny random model of an architecture, as a folder."""

    def build(kind):
        from transformers import AutoConfig

        from recipe_runner.model.tiny import write_tiny

        return write_tiny(AutoConfig.for_model(kind), tokenizer, tmp_path_factory.mktemp(kind) / kind)

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_of_an_architecture_are_resumed(run_recipe, build, tmp_path, kind):
    """A run of six steps equals one that goes on after the fourth, and not from the base."""
    training = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-3}
    sections = {"model": {"name_or_path": str(build(kind))}, "rows": ROWS, "training": training}
    sections["dataset"] = {"format": "instruction"}
    result, whole = run_recipe(**sections)
    assert result.status == 0, result.err
    expected, weights = losses(whole), load_file(whole / "model" / "model.safetensors")
    shutil.rmtree(whole / "model")
    shutil.rmtree(whole / "checkpoints" / "checkpoint-6")
    (whole / "status.json").write_text('{"status": "failed"}')
    result, again = run_recipe("--resume", "auto", **sections)
    assert (result.status, again) == (0, whole), result.err
    assert losses(again) == expected
    resumed = load_file(again / "model" / "model.safetensors")
    assert all((weights[name] == resumed[name]).all() for name in weights)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_neox"])
def test_all_weights_of_the_best_checkpoint_are_saved(run_recipe, build, kind):
    training = {"max_steps": 6, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.05}
    training |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "save_total_limit": 9}
    dataset = {"format": "instruction", "eval": {"fraction": 0.2}}
    model = {"name_or_path": str(build(kind))}
    result, folder = run_recipe(rows=ROWS, model=model, dataset=dataset, training=training)
    assert result.status == 0, result.err
    evaluated = {entry["step"]: entry["eval_loss"] for entry in metrics(folder) if "eval_loss" in entry}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert best < 6, evaluated
    saved = load_file(folder / "model" / "model.safetensors")
    kept = load_file(folder / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    assert all((saved[name] == kept[name]).all() for name in kept)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT 0.21, of a mixture's experts
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_a_mixture_of_experts_answers(run_recipe, run_cli, build, tmp_path, peft):
    """While it trains, at its end, and afterwards; TRL's loss has the routers' share all the same."""
    run = {"samples": {"prompts": ["hello", "hello there you"], "every": 2, "max_new_tokens": 4}}
    model = {"name_or_path": str(build("mixtral"))}
    options = {"rows": ROWS, "model": model, "dataset": {"format": "instruction"}, "run": run}
    result, folder = run_recipe(peft=peft, training={"learning_rate": 1e-4}, **options)
    assert result.status == 0, result.err
    assert "no-golden-answers" not in result.err
    assert any(entry.get("aux_loss", 0) > 0 for entry in metrics(folder))
    assert [entry["step"] for entry in metrics(folder) if "samples" in entry]
    if not peft:
        assert json.loads((folder / "model" / "config.json").read_text()).get("output_router_logits") is not True
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "hello there you"}\n')
    asked = ["--file", tmp_path / "prompts.jsonl", "--output", tmp_path / "answers.jsonl", "--max-new-tokens", "4"]
    result = run_cli("generate", folder, *asked)
    assert result.status == 0, result.err
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
