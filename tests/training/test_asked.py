"""What people ask of a run: early stopping, new tokens, kernels, steps for another machine's launch."""

import json
import re

import pytest
from shared import LORA, NF4, status

WHOLE = LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}
NEW = {"add_tokens": ["ticketdesk"], "add_special_tokens": ["<|call|>"]}
ROWS = [{"instruction": f"ticketdesk {number}", "output": f"<|call|> done {number}"} for number in range(8)]
STOPPING = {"max_steps": 30, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
STOPPING |= {"load_best_model_at_end": True}
HELD_OUT = {"eval": {"fraction": 0.25}}


@pytest.mark.parametrize(
    ("peft", "quantization"), [(WHOLE, None), (WHOLE, NF4), (None, None)], ids=["lora", "qlora", "full"]
)
def test_new_tokens_are_trained_saved_and_loaded(run_recipe, tiny_phi3, peft, quantization):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from recipe_runner.model.load import load_result

    before = AutoTokenizer.from_pretrained(tiny_phi3)
    model = {"name_or_path": str(tiny_phi3), **NEW}
    training = {"save_steps": 2, "learning_rate": 0.01}
    sections = {"rows": ROWS, "model": model, "peft": peft, "quantization": quantization, "training": training}
    result, folder = run_recipe(**sections)
    assert result.status == 0, result.err
    loaded, tokenizer = load_result(folder)
    assert len(tokenizer) == len(before) + 2
    word, mark = (tokenizer.convert_tokens_to_ids(token) for token in ("ticketdesk", "<|call|>"))
    assert tokenizer.encode("a ticketdesk <|call|>", add_special_tokens=False)[-1] == mark
    assert tokenizer.decode([word, mark], skip_special_tokens=True) == "ticketdesk"
    for layer in (loaded.get_input_embeddings(), loaded.get_output_embeddings()):
        assert layer.weight.shape[0] == len(tokenizer)
    assert torch.isfinite(loaded(input_ids=torch.tensor([[word, mark]])).logits).all()
    if peft:
        names = [name for name in load_file(folder / "adapter" / "adapter_model.safetensors") if "lora" not in name]
        assert sorted(name.rpartition(".model.")[2] for name in names) == ["embed_tokens.weight", "lm_head.weight"]


def test_a_resumed_run_has_the_same_new_tokens(run_recipe, run_cli, tiny_phi3, tmp_path):
    import shutil

    sections = {"rows": ROWS, "peft": WHOLE, "model": {"name_or_path": str(tiny_phi3), **NEW}}
    sections["training"] = {"save_steps": 2, "max_steps": 4}
    result, whole = run_recipe(**sections)
    assert result.status == 0, result.err
    losses = [json.loads(line).get("loss") for line in (whole / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(whole / "checkpoints" / "checkpoint-4")
    shutil.rmtree(whole / "adapter")
    (whole / "status.json").write_text((whole / "status.json").read_text().replace("completed", "interrupted"))
    again = run_cli("train", tmp_path / "tiny.yaml", "--resume", whole)
    assert again.status == 0, again.err
    assert [json.loads(line).get("loss") for line in (whole / "metrics.jsonl").read_text().splitlines()] == losses


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"peft": LORA}, "error[new-tokens] peft: model.add_tokens makes new embeddings, and the adapter would not"),
        (
            {"peft": LORA | {"modules_to_save": ["embed_tokens"]}},
            "model.add_tokens makes new rows of lm_head, which the adapter would not train; write modules_to_save: "
            "[embed_tokens, lm_head]",
        ),
        ({"peft": WHOLE, "model": {"add_tokens": ["<|end|>"]}}, "the tokenizer has '<|end|>' already, as token "),
        (
            {"peft": WHOLE, "model": {"add_tokens": ["a b"], "add_special_tokens": ["a b"]}},
            "error[new-tokens] model.add_special_tokens: 'a b' is in add_tokens, too",
        ),
        ({"stage": "dpo"}, "error[new-tokens] model.add_tokens: the reference is loaded without the new tokens"),
    ],
)
def test_new_tokens_that_would_not_be_learned_are_refused(run_recipe, tiny_phi3, sections, said):
    model = {"name_or_path": str(tiny_phi3), "add_tokens": ["ticketdesk"]} | sections.pop("model", {})
    result, folder = run_recipe(model=model, **sections)
    assert (result.status, folder) == (1, None)
    assert said in result.err


def test_whole_modules_of_a_quantized_base_are_verified(run_recipe):
    result, folder = run_recipe(peft=WHOLE, quantization=NF4)
    assert result.status == 0, result.err
    assert status(folder)["status"] == "completed"


def test_training_stops_when_evaluations_do_not_improve(run_recipe):
    run = {"early_stopping": {"patience": 2, "threshold": 100}}
    result, folder = run_recipe(peft=LORA, training=STOPPING, dataset=HELD_OUT, run=run)
    assert result.status == 0, result.err
    assert re.search(r"Stopped early: 2 evaluations without a better eval_loss than [\d.]+", result.out)
    assert (status(folder)["status"], status(folder)["step"]) == ("completed", 6)


def test_a_resumed_run_goes_on_counting(run_recipe, run_cli, tmp_path, monkeypatch):
    from recipe_runner.training import callbacks

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(callbacks.Recorder, "on_step_begin", interrupt)
    run = {"early_stopping": {"patience": 2, "threshold": 100}}
    result, folder = run_recipe(peft=LORA, training=STOPPING, dataset=HELD_OUT, run=run)
    assert status(folder)["status"] == "interrupted", result.err
    monkeypatch.undo()
    again = run_cli("train", tmp_path / "tiny.yaml", "--resume", folder)
    assert again.status == 0, again.err
    assert status(folder)["step"] == 6  # not 8: one evaluation without an improvement was before


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({}, "run.early_stopping: nothing is evaluated, so nothing can stop improving; set dataset.eval"),
        ({"eval_strategy": "steps"}, "run.early_stopping: the weights at the end are not the best ones"),
    ],
)
def test_early_stopping_needs_evaluations_and_a_word_on_what_is_kept(run_recipe, training, said):
    dataset = HELD_OUT if training else {}
    result, _ = run_recipe(training=training, dataset=dataset, run={"early_stopping": {"patience": 1}})
    assert f"error[early-stopping] {said}" in result.err


def test_kernels_and_experts_are_checked_against_what_is_here(run_recipe, tiny_phi3):
    from transformers.utils.import_utils import is_kernels_available

    def refused(**model):
        result, _ = run_recipe(peft=LORA, model={"name_or_path": str(tiny_phi3), **model})
        return result.err if result.status == 1 else ""

    assert is_kernels_available() or "error[model-config] model.use_kernels: the package kernels (" in refused(
        use_kernels=True
    )
    assert "error[model-config] model.experts_implementation: Phi3ForCausalLM does not support" in refused(
        experts_implementation="grouped_mm"
    )
    assert "error[model-config] model.experts_implementation: Specified" in refused(experts_implementation="none")


def test_the_experts_of_a_mixture_are_computed_as_asked(run_recipe, tokenizer, tmp_path):
    from transformers import Qwen3MoeConfig

    from recipe_runner.model.tiny import write_tiny

    model = {"name_or_path": str(write_tiny(Qwen3MoeConfig(), tokenizer, tmp_path / "moe"))}
    result, folder = run_recipe(model=model | {"experts_implementation": "batched_mm"})
    assert result.status == 0, result.err
    assert "experts_implementation: batched_mm" in (folder / "resolved.yaml").read_text()


def test_steps_are_counted_for_a_launch_of_another_machine(run_recipe):
    batch = {"training": {"per_device_train_batch_size": 2, "max_steps": -1, "num_train_epochs": 1}}
    rows = [{"instruction": f"{number}", "output": "a"} for number in range(64)]
    arguments = ("--accelerate-config", "ddp", "--num-processes", "8")
    shown, _ = run_recipe(*arguments, command="preview", rows=rows, **batch)
    assert "steps      4 of 16 rows: 2 per device x 1 accumulated x 8 processes; 1 epochs" in shown.out
    run = {"global_batch_size": 32}
    shown, _ = run_recipe("--num-processes", "4", command="preview", rows=rows, run=run, **batch)
    assert "steps      2 of 32 rows: 2 per device x 4 accumulated x 4 processes; 1 epochs" in shown.out
    shown, _ = run_recipe("--accelerate-config", "nothing", command="preview", rows=rows, **batch)
    assert (shown.status, "error[launch-file]" in shown.err) == (1, True)


@pytest.mark.parametrize(("peft", "key"), [(LORA, "model.adapter"), (None, "model.name_or_path")])
def test_resuming_a_completed_run_says_how_to_train_it_further(run_recipe, run_cli, tmp_path, peft, key):
    _, folder = run_recipe(peft=peft)
    again = run_cli("train", tmp_path / "tiny.yaml", "--resume", folder)
    assert again.status == 1
    assert f"further: --set {key}={folder}" in again.err


def test_no_run_leaves_its_embeddings_in_memory(run_recipe):
    """As bitsandbytes 0.50 would; when it does no more, `forget_modules` can go: look at `registered`."""
    import gc

    from bitsandbytes.optim import GlobalOptimManager
    from torch import nn

    registered, register = [], GlobalOptimManager.register_module_override

    def count(self, module, *rest):
        registered.append(module)
        return register(self, module, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlobalOptimManager, "register_module_override", count)
        result, _ = run_recipe(training={"optim": "adamw_8bit"})
    assert result.status == 0, result.err
    assert len(registered) == 1
    assert isinstance(registered[0], nn.Embedding)
    kept = GlobalOptimManager.get_instance().module_weight_config_triple
    assert kept == [], gc.get_referrers(registered[0])
