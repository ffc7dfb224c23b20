"""Partial fine-tuning, and adapters beside parts of the base: what is chosen moves, and nothing else."""

import pytest
from shared import LORA, NF4, break_off, losses

TRAINING = {"max_steps": 3, "learning_rate": 1e-3, "save_steps": 2}


def weights_of(folder):
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("patterns", "moved"),
    [
        (["layers[-1:]"], lambda name: ".layers.1." in name),
        (["layers[0]", "lm_head"], lambda name: ".layers.0." in name or "lm_head" in name),
        (["norms"], lambda name: "norm" in name),
        (["embeddings"], lambda name: "embed_tokens" in name),
        ([r"mlp\.down_proj"], lambda name: "down_proj" in name),
    ],
    ids=["last layer", "layer and head", "norms", "embeddings", "expression"],
)
def test_only_what_is_chosen_moves(run_recipe, tiny_phi3, patterns, moved):
    result, folder = run_recipe(unfreeze=patterns, training=TRAINING)
    assert result.status == 0, result.err
    assert "partial fine-tuning" in result.out
    assert f"{patterns[0]} (" in result.out
    before, after = weights_of(tiny_phi3), weights_of(folder / "model")
    changed = {name for name in after if not (before[name] == after[name]).all()}
    assert changed == {name for name in before if moved(name)}
    count = sum(before[name].numel() for name in changed)
    assert f"trainable  {count:,} of" in result.out


@pytest.mark.parametrize("quantization", [None, NF4], ids=["plain", "quantized"])
def test_an_adapter_and_chosen_parts_load_as_one_piece(run_recipe, tiny_phi3, quantization):
    """With PEFT alone; the next stage goes on from both, and its reference is what they were."""
    import torch
    from transformers import AutoModelForCausalLM

    from recipe_runner.model.load import load_result

    patterns = ["norms", "lm_head"] + ([] if quantization else ["layers[1]"])
    sections = {"peft": LORA, "unfreeze": patterns, "quantization": quantization}
    result, folder = run_recipe(training=TRAINING, **sections)
    assert result.status == 0, result.err
    assert "(lora adapter" in result.out
    assert "and parts of the base" in result.out
    saved = weights_of(folder / "adapter")
    assert any("lora_A" in name and ".layers.0." in name for name in saved)
    assert any(name.endswith("lm_head.weight") for name in saved)
    norms = [tensor for name, tensor in saved.items() if "input_layernorm" in name]
    assert norms
    assert all((tensor != 1).any() for tensor in norms)  # in bfloat16 a step of 1e-3 would be lost beside 1
    if not quantization:
        assert any("layers.1.mlp.down_proj.weight" in name for name in saved)
        assert not any("lora_A" in name and ".layers.1." in name for name in saved)
        model, _ = load_result(folder)
        tokens = torch.arange(20, 60)[None]
        base = AutoModelForCausalLM.from_pretrained(tiny_phi3)
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model(tokens).logits, base(tokens).logits)
    model = {"adapter": str(folder)}
    sections["peft"] = {"method": "lora"}
    result, again = run_recipe(name="pairs", stage="dpo", model=model, training=TRAINING, **sections)
    assert result.status == 0, result.err
    assert losses(again)[0] == pytest.approx(0.6931, abs=1e-3)
    moved = weights_of(again / "adapter")
    assert any((moved[name] != saved[name]).any() for name in saved if "lm_head" in name)


def test_a_partial_run_resumes_bit_for_bit(run_recipe, tmp_path):

    sections = {"unfreeze": ["norms", "lm_head"], "training": TRAINING}
    _, whole = run_recipe(**sections)
    killed = break_off(whole, 2)
    result, folder = run_recipe("--resume", "auto", **sections)
    assert (result.status, folder) == (0, killed), result.err
    before, after = weights_of(whole / "model"), weights_of(killed / "model")
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"unfreeze": ["lm_haed"]}, "error[unfreeze-not-found] unfreeze.0: 'lm_haed' matches no parameter"),
        ({"unfreeze": ["norms", "layers[7]"]}, "unfreeze.1: there is no layers[7]: the model has layers 0 to 1"),
        ({"unfreeze": ["layers[5:]"]}, "error[unfreeze-not-found]"),
        ({"unfreeze": ["mlp.(down"]}, "error[wrong-form] unfreeze.0: 'mlp.(down' is not a regular expression"),
        ({"unfreeze": []}, "error[empty-value] unfreeze"),
        ({"unfreeze": ["layers[-1]"], "peft": LORA, "quantization": NF4}, "error[unfreeze-quantized] unfreeze.0"),
        ({"unfreeze": ["norms"], "quantization": NF4}, "error[quantized-full-training]"),
        (
            {"unfreeze": ["norms"], "peft": {"method": "prompt_tuning", "num_virtual_tokens": 4}},
            "error[unfreeze-method] unfreeze: prompt_tuning trains nothing of the base beside it",
        ),
    ],
)
def test_what_cannot_be_unfrozen_is_one_line_before_the_weights(run_recipe, sections, said):
    result, folder = run_recipe(training=TRAINING, **sections)
    assert result.status == 1
    assert said in result.err, result.err
    assert "Loading weights" not in result.err
    assert folder is None
