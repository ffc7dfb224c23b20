"""A saved result that differs from the trained model must be noticed."""

import json
import shutil
import subprocess
import sys

import pytest
from shared import LORA, NF4, losses

from recipe_runner.problems.errors import UserError


@pytest.fixture(params=["lora", "full"])
def saved(request, tiny_phi3, tokenizer, tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    peft = LoraConfig(target_modules="all-linear", init_lora_weights=False) if request.param == "lora" else None
    config = SFTConfig(str(tmp_path), bf16=False)
    data = Dataset.from_list([{"text": "some text to look at"}] * 3)
    trainer = SFTTrainer(str(tiny_phi3), config, train_dataset=data, processing_class=tokenizer, peft_config=peft)
    trainer.save_model(str(tmp_path / "saved"))
    return trainer, tmp_path / "saved"


def change(folder, alter):
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    alter(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def nudge(tensors):
    tensors[min(tensors)] += 0.01


def remove(tensors):
    del tensors[min(tensors)]


def test_what_was_saved_right_passes_and_leaves_the_model_as_it_was(saved):
    from recipe_runner.training.verify import verify_saved

    trainer, folder = saved
    names = [name for name, _ in trainer.model.named_parameters()]
    verify_saved(trainer, folder, [list(range(5, 25))])
    assert [name for name, _ in trainer.model.named_parameters()] == names


@pytest.mark.parametrize("alter", [nudge, remove])
def test_what_was_saved_wrong_is_an_error(saved, alter):
    from recipe_runner.training.verify import verify_saved

    trainer, folder = saved
    change(folder, alter)
    with pytest.raises(UserError, match="saved-model-differs"):
        verify_saved(trainer, folder, [list(range(5, 25))])


WAYS = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "olora, rank pattern": {"init_lora_weights": "olora", "rank_pattern": {"o_proj": 2}},
    "pissa, rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "eva": {"init_lora_weights": "eva"},
    "eva, two ranks": {"init_lora_weights": "eva", "rank_pattern": {"o_proj": 2}, "eva_config": {"rho": 1.5}},
    "corda": {"init_lora_weights": "corda"},
    "corda, kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": {}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True},
    "kasa": {"kasa_config": {}},
    "velora": {"velora_config": {}},
    "monteclora": {"monteclora_config": {}},
    "replicated layers": {"layer_replication": [[0, 2], [1, 2]]},
    "parameters": {"target_modules": ["o_proj"], "target_parameters": ["down_proj.weight"], "lora_dropout": 0.0},
    "tokens": {"trainable_token_indices": [5, 7, 9]},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "random": {"init_lora_weights": False},
}
LOADS = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
found = []
for folder in json.loads(sys.argv[1]):
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found.append(model(input_ids=torch.arange(5, 25)[None]).logits[0, -1].tolist())
print(json.dumps(found))
"""


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter '\\w+'. \\d+ LoRA tensor")
def test_what_was_saved_gives_the_same_logits_in_a_fresh_process(run_recipe, monkeypatch):
    """On the plain base, whatever the initialisation did to it while training."""
    import torch

    from recipe_runner.training import verify

    trained, saved, verify_saved = [], [], verify.verify_saved

    def keep_logits(trainer, folder, *rest):
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        with torch.no_grad():
            trained.append(model(input_ids=torch.arange(5, 25)[None]).logits[0, -1].clone())
        saved.append(str(folder))
        verify_saved(trainer, folder, *rest)

    monkeypatch.setattr(verify, "verify_saved", keep_logits)
    for way in WAYS.values():
        result, _ = run_recipe(peft=LORA | way, training={"learning_rate": 0.01})
        assert result.status == 0, (way, result.err)
    command = [sys.executable, "-c", LOADS, json.dumps(saved)]
    loaded = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for name, before, after in zip(WAYS, trained, loaded, strict=True):
        assert float((before - torch.tensor(after)).abs().max()) < 1e-4, name
        assert float(before.abs().max()) > 0.1, name


def test_a_saved_model_answers_with_its_cache(whole):
    """transformers 5.23's Trainer writes `use_cache: false`, which is meant for training, into the configuration."""
    assert json.loads((whole / "model" / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize("init", ["pissa_niter_4", "olora", "corda", "lora_ga", "eva"])
def test_a_resumed_run_of_an_adapter_that_alters_its_base_goes_on_the_same(run_recipe, init):
    training = {"max_steps": 4, "save_steps": 2}
    peft = LORA | {"init_lora_weights": init}
    _, whole = run_recipe(peft=peft, training=training)
    wanted = losses(whole)
    (whole / "status.json").write_text('{"status": "running"}')
    shutil.rmtree(whole / "checkpoints" / "checkpoint-4")
    shutil.rmtree(whole / "adapter")
    result, folder = run_recipe("--resume", "auto", peft=peft, training=training)
    assert (result.status, folder) == (0, whole), result.err
    assert losses(whole) == wanted


@pytest.mark.parametrize(
    ("init", "stage", "more", "said"),
    [
        ("corda", "dpo", {}, "corda takes a part of the base's weights into the adapter"),
        ("lora_ga", "sft", {"quantization": NF4}, "put back into quantized weights"),
        ("loftq", "sft", {}, "this base is not quantized to 4 bits"),
        ("loftq", "sft", {"quantization": NF4, "peft": {"use_dora": True}}, "after DoRA has measured it"),
        ("pissa", "dpo", {}, "with the adapter disabled, the reference would not be the base"),
        ("olora", "kto", {}, "with the adapter disabled, the reference would not be the base"),
        ("pissa", "sft", {"quantization": NF4}, "put back into quantized weights"),
        ("pissa_niter_1000", "sft", {}, "would iterate for hours"),
        ("olora", "sft", {"peft": {"use_dora": True}}, "which PEFT can't put back with use_dora"),
    ],
)
def test_initialisations_that_cannot_be_right_are_refused(run_cli, small_recipe, init, stage, more, said):
    peft = LORA | {"init_lora_weights": init} | more.get("peft", {})
    result = run_cli("validate", small_recipe(stage, peft=peft, quantization=more.get("quantization")))
    assert result.status == 1
    assert "error[initialisation] peft.init_lora_weights: " in result.out
    assert said in result.out


@pytest.mark.parametrize("variant", [{"kasa_config": {}}, {"layer_replication": [[0, 2], [1, 2]]}])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_variants_that_change_the_base_have_no_reference(run_cli, small_recipe, variant, stage):
    result = run_cli("validate", small_recipe(stage, peft=LORA | variant))
    assert result.status == 1
    assert f"error[initialisation] peft.{next(iter(variant))}: it changes the base itself" in result.out


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_loftq_begins_nearer_to_the_plain_weights_and_leaves_the_reference_quantized(run_recipe, tiny_phi3, stage):
    """The first loss is nearer to the plain base's than with an adapter that begins at 0; the base stays as it was."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from recipe_runner.model.load import load_result
    from recipe_runner.model.quantization import keep_4bit_weights_trainable

    peft = LORA | {"r": 48, "lora_alpha": 96, "init_lora_weights": "loftq"}
    still = {"learning_rate": 1e-9, "max_steps": 1}
    result, folder = run_recipe(stage=stage, peft=peft, quantization=NF4, training=still)
    assert result.status == 0, result.err
    assert "start      loftq, by what the base's weights lose in 4 bits" in result.out
    quantized = {"quantization_config": BitsAndBytesConfig(**NF4), "dtype": torch.float32}
    model, _ = load_result(folder, **quantized)
    tokens = torch.arange(20, 60)[None]
    plain, base = (AutoModelForCausalLM.from_pretrained(tiny_phi3, **more) for more in ({}, quantized))
    keep_4bit_weights_trainable(base)  # as in the result: other kernels round otherwise
    with torch.no_grad():
        wanted, before, begun = (found(tokens).logits for found in (plain, base.eval(), model))
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, before)
    assert (begun - wanted).norm() < 0.5 * (before - wanted).norm()


def test_a_pass_over_the_data_is_said(run_recipe):
    result, _ = run_recipe(peft=LORA | {"init_lora_weights": "corda"})
    assert "corda, by a pass over 128 rows of the training data before the first step" in result.out
