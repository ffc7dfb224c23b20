"""Every way of tuning a part of a model, through the command that people type: trains, saves, loads, resumes."""

import json
import math
import shutil

import pytest
from shared import NF4, losses, status

from recipe_runner.methods import METHODS

LINEAR = {"target_modules": "all-linear"}
VIRTUAL = {"num_virtual_tokens": 4}
KEYS_VALUES = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
# Method -> the keys that it needs on a model with layers of 64.
KEYS = {name: LINEAR for name, method in METHODS.items() if method.kind == "linear"} | {
    "adalora": LINEAR | {"init_r": 6, "target_r": 3},
    "ia3": KEYS_VALUES,
    "prefix_tuning": VIRTUAL,
    "prompt_tuning": VIRTUAL,
    "p_tuning": VIRTUAL | {"encoder_hidden_size": 32},
    "cartridge": VIRTUAL,
    "bottleneck": {"bottleneck_size": 8},
    "ln_tuning": {},
    "shadow": {},
    "osf": {},
    "trainable_tokens": {"token_indices": list(range(5, 600))},
    "fourierft": LINEAR | {"n_frequency": 100},
    "waveft": LINEAR | {"n_frequency": 100},
    "oft": LINEAR | {"oft_block_size": 16},
    "vera": LINEAR | {"r": 16},
    "vblora": LINEAR | {"vector_length": 16, "num_vectors": 16},
    "c3a": LINEAR | {"block_size": 16},
    "shira": LINEAR | {"r": 4},
    "road": LINEAR | {"group_size": 16},
}
ROWS = [{"text": f"{word} {word} {word}"} for word in ("one", "two", "red", "blue", "left", "right")]
STEPS = {"max_steps": 3, "per_device_train_batch_size": 6, "learning_rate": 0.005, "lr_scheduler_type": "constant"}
STEPS |= {"save_steps": 2, "disable_tqdm": True, "activation_checkpointing": False}


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tokenizer):
    from transformers import LlamaConfig

    from recipe_runner.model.tiny import write_tiny

    return write_tiny(LlamaConfig(), tokenizer, tmp_path_factory.mktemp("models") / "tiny-llama")


def logits_of(model, tokenizer):
    """Of a row that was learned; what virtual tokens come to is left out."""
    import torch

    tokens = tokenizer(ROWS[0]["text"], return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()[:, -tokens.shape[1] :]


def tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def resume_from_first_checkpoint(folder, copy, run_cli, recipe):
    """A copy of a run that was killed after its first checkpoint, resumed."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "adapter")
    shutil.rmtree(copy / "checkpoints" / "checkpoint-3")
    (copy / "status.json").write_text(json.dumps(status(folder) | {"status": "interrupted"}))
    return run_cli("train", recipe, "--resume", copy)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_saves_loads_and_resumes(method, run_recipe, run_cli, tiny_llama, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from recipe_runner.model.load import load_result

    given = {"rows": ROWS, "dataset": {"format": "text"}, "model": {"name_or_path": str(tiny_llama)}}
    result, folder = run_recipe(peft={"method": method} | KEYS[method], training=STEPS, **given)
    assert result.status == 0, result.err
    assert losses(folder)[-1] < losses(folder)[0]
    model, tokenizer = load_result(folder)
    base = logits_of(AutoModelForCausalLM.from_pretrained(tiny_llama), tokenizer)
    assert not torch.allclose(logits_of(model, tokenizer), base, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokenizer), base)
    resumed = resume_from_first_checkpoint(folder, tmp_path / "killed", run_cli, tmp_path / "tiny.yaml")
    assert resumed.status == 0, resumed.err
    again = tensors_of(tmp_path / "killed")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors_of(folder).items())


CHAINED = [name for name in METHODS if name not in ("adalora", "p_tuning", "cartridge")]


@pytest.mark.parametrize("method", CHAINED)
def test_preferences_go_on_from_an_adapter_with_the_adapter_as_reference(method, run_recipe, tiny_llama):
    """The first loss is that of two equal models: what TRL copies to the reference is not all, for most methods."""
    model = {"name_or_path": str(tiny_llama)}
    text = {"rows": ROWS, "dataset": {"format": "text"}, "model": model, "training": STEPS}
    result, folder = run_recipe(peft={"method": method} | KEYS[method], **text)
    assert result.status == 0, result.err
    training = STEPS | {"learning_rate": 1e-3}
    model = model | {"adapter": str(folder)}
    result, run = run_recipe(name="pairs", stage="dpo", peft={"method": method}, model=model, training=training)
    assert result.status == 0, result.err
    noise = 0.1 if method == "pvera" else 1e-4  # it draws its vectors anew in every pass
    assert losses(run)[0] == pytest.approx(math.log(2), abs=noise)
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.quantized])
def test_a_method_trains_on_4_bit_weights(method, run_recipe, tiny_llama):
    from recipe_runner.model.load import load_result

    given = {"rows": ROWS, "dataset": {"format": "text"}, "model": {"name_or_path": str(tiny_llama)}}
    result, folder = run_recipe(peft={"method": method} | KEYS[method], quantization=NF4, training=STEPS, **given)
    assert result.status == 0, result.err
    assert losses(folder)[-1] < losses(folder)[0]
    load_result(folder)
