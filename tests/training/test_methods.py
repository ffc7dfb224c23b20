"""Every way of tuning a part of a model, through the command that people type: trains, saves, loads, resumes."""

import json
import math
import re
import shutil

import pytest
from shared import LORA, NF4, losses, status

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
NOT_CONTINUED = ("adalora", "p_tuning", "cartridge")  # their DPO begins with a new adapter
# New ones change what the model says at once, and the reference is the base; AdaLoRA's loss has a part of its own.
BEGINS_ELSEWHERE = ("p_tuning", "adalora")
# What is trained is not what is saved: parts that are dropped, a network that made a prompt, matrices kept beside.
COUNTED_OTHERWISE = ("adalora", "p_tuning", "vera", "pvera", "randlora", "osf", "psoft", "tinylora", "supertuning")
COUNTED_OTHERWISE += ("delora", "glora", "vblora", "unilora", "trainable_tokens", "boft", "cartridge", "shadow")
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


@pytest.fixture
def run_method(run_recipe, tiny_llama):
    """Trains by a method: three steps, on text or on pairs, from the base or from an adapter."""

    def run_method(method, name, adapter=None, stage="sft", **sections):
        given = {"rows": ROWS, "dataset": {"format": "text"}} if stage == "sft" else {"stage": stage}
        training = STEPS | ({"learning_rate": 1e-3} if stage == "dpo" else {})
        if stage == "dpo" or sections:  # nothing of it is resumed
            training = training | {"save_strategy": "no"}
        model = {"name_or_path": str(tiny_llama)} | ({"adapter": str(adapter)} if adapter else {})
        peft = {"method": method} | ({} if adapter else KEYS[method])
        result, folder = run_recipe(name=name, peft=peft, model=model, training=training, **given, **sections)
        assert result.status == 0, result.err
        assert losses(folder)[-1] < losses(folder)[0]
        return result, folder

    return run_method


def begins_equal(folder):
    """Whether the first loss of DPO is that of two equal models."""
    return losses(folder)[0] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_saves_loads_resumes_and_goes_on(method, run_method, run_cli, tiny_llama, tmp_path):
    """What should move moves, and nothing else; DPO begins with the adapter, or with the base, as its reference."""
    import torch
    from transformers import AutoModelForCausalLM

    from recipe_runner.model.load import load_result

    result, folder = run_method(method, "first")
    model, tokenizer = load_result(folder)
    base = logits_of(AutoModelForCausalLM.from_pretrained(tiny_llama), tokenizer)
    trained = logits_of(model, tokenizer)
    assert not torch.allclose(trained, base, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, tokenizer), base)
    count = sum(tensor.numel() for name, tensor in tensors_of(folder).items() if "indices" not in name)
    told = int(re.search(r"trainable  ([\d,]+) of", result.out)[1].replace(",", ""))
    assert told == count or method in COUNTED_OTHERWISE
    golden = [json.loads(line) for line in (folder / "golden.jsonl").read_text().splitlines()]
    assert all(row["answer_ids"] and row["before"] is not None for row in golden[:3])
    merged = run_cli("merge", folder)
    if METHODS[method].merges:
        assert merged.status == 0, merged.err
        assert torch.allclose(logits_of(load_result(folder / "merged")[0], tokenizer), trained, atol=1e-4)
    else:
        assert (merged.status, "error[not-mergeable]" in merged.err) == (1, True), merged.err
    if METHODS[method].tried:
        return
    resumed = resume_from_first_checkpoint(folder, tmp_path / "killed", run_cli, tmp_path / "first.yaml")
    assert resumed.status == 0, resumed.err
    again = tensors_of(tmp_path / "killed")
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors_of(folder).items())
    adapter = None if method in NOT_CONTINUED else folder
    _, pairs = run_method(method, "pairs", adapter, stage="dpo")
    assert begins_equal(pairs) or method in BEGINS_ELSEWHERE


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.quantized])
def test_a_method_trains_on_4_bit_weights(method, run_method):
    from recipe_runner.model.load import load_result

    _, folder = run_method(method, "first", quantization=NF4)
    load_result(folder)
    if METHODS[method].tried:
        return
    adapter = None if method in (*NOT_CONTINUED, "randlora") else folder
    _, pairs = run_method(method, "pairs", adapter, stage="dpo", quantization=NF4)
    assert begins_equal(pairs) or method in BEGINS_ELSEWHERE


REFUSED_CASES = {
    "a key of another method": ({"method": "ia3", "r": 8}, {}, "it is a key of lora, oft, vera, ..."),
    "a rank of 0": ({"method": "miss", "r": 0}, {}, "error[out-of-bounds] peft.r"),
    "no tokens": ({"method": "prompt_tuning"}, {}, "prompt_tuning needs num_virtual_tokens"),
    "too many tokens": (
        {"method": "prompt_tuning", "num_virtual_tokens": 64},
        {"training": {"max_length": 64}},
        "64 virtual tokens, before rows of at most 64",
    ),
    "packing": ({"method": "p_tuning"} | VIRTUAL, {"training": {"packing": True}}, "not before each document"),
    "a cache": ({"method": "prefix_tuning"} | VIRTUAL, {}, "needs the model's cache"),
    "whole modules": ({"method": "prompt_tuning", "modules_to_save": ["lm_head"]} | VIRTUAL, {}, "remove the key"),
    "a quantized base": ({"method": "oft"} | LINEAR, {"quantization": NF4}, "no layer of oft for quantized weights"),
    "a router": ({"method": "xlora"}, {}, "error[method-refused] peft.method: 'xlora' can't be trained here"),
    "an unknown method": ({"method": "ladalora"}, {}, "did you mean 'adalora'?"),
    "a target that is not there": ({"method": "vera", "target_modules": ["q_poj"]}, {}, "'q_poj' matches no module"),
    "the head": ({"method": "hra", "target_modules": ["lm_head"]}, {}, "an adapter on it would never be trained"),
    "no default targets": ({"method": "ln_tuning"}, {"phi3": True}, "add 'target_modules: [input_layernorm, norm"),
    "what PEFT refuses": ({"method": "road", "group_size": 7} | LINEAR, {}, "error[peft-refused] peft"),
    "one place twice": (
        {"method": "bottleneck", "placement": "both", "target_modules": ["o_proj"]},
        {"strict": True},
        "it has no effect: target_modules says where",
    ),
    "two sizes": ({"method": "bottleneck", "bottleneck_size": 8, "reduction_factor": 2}, {}, "give one of them"),
}


@pytest.mark.parametrize("case", REFUSED_CASES)
def test_a_method_that_cannot_work_is_one_line_before_the_weights(case, run_recipe, tiny_llama, tiny_phi3, run_cli):
    peft, more, said = REFUSED_CASES[case]
    sections = {key: more[key] for key in ("training", "quantization") if key in more}
    model = {"name_or_path": str(tiny_phi3 if "phi3" in more else tiny_llama)}
    result, folder = run_recipe(peft=peft, model=model, **sections)
    assert said in result.err, result.err
    if "strict" not in more:
        assert result.status == 1
        assert folder is None
        assert "Loading weights" not in result.err


def test_a_prompt_that_a_network_made_is_not_trained_further(run_method, small_recipe, run_cli):
    _, folder = run_method("p_tuning", "first")
    recipe = small_recipe(peft={"method": "p_tuning"}, model={"adapter": str(folder)})
    result = run_cli("validate", recipe)
    assert "error[adapter-not-trainable] model.adapter: PEFT 0.21 does not save the network" in result.out


def test_a_prompt_begins_with_a_text_and_goes_on_in_kto(run_method, run_recipe, tiny_llama):
    peft = {"method": "prompt_tuning", "num_virtual_tokens": 6, "prompt_tuning_init": "TEXT"}
    peft["prompt_tuning_init_text"] = "file the ticket"
    model = {"name_or_path": str(tiny_llama)}
    result, first = run_recipe(name="first", peft=peft, model=model, training=STEPS)
    assert result.status == 0, result.err
    config = json.loads((first / "adapter" / "adapter_config.json").read_text())
    assert config["tokenizer_name_or_path"] == config["base_model_name_or_path"]
    model |= {"adapter": str(first)}
    result, run = run_recipe(name="judged", stage="kto", peft={"method": "prompt_tuning"}, model=model, training=STEPS)
    assert result.status == 0, result.err
    assert losses(run)[0] == pytest.approx(0.5, abs=1e-3)


def test_the_end_of_a_text_that_virtual_tokens_cant_hold_is_said(run_recipe, tokenizer):
    text = "unforgettable handkerchief"
    count = len(tokenizer(text)["input_ids"])
    peft = {"method": "prompt_tuning", "num_virtual_tokens": count, "prompt_tuning_init": "TEXT"}
    peft["prompt_tuning_init_text"] = text
    whole, _ = run_recipe(name="whole", peft=peft, training=STEPS)
    cut, _ = run_recipe(name="cut", peft=peft | {"num_virtual_tokens": count - 1}, training=STEPS)
    assert (whole.status, cut.status) == (0, 0)
    assert "prompt-text-cut" not in whole.err
    assert (
        f"the text has {count} tokens, and {count - 1} virtual tokens begin with it: PEFT cuts off its end" in cut.err
    )


def test_eva_with_too_few_tokens_is_refused(run_recipe):
    rows = [{"text": "a b"}] * 3
    peft = LORA | {"r": 48, "init_lora_weights": "eva"}
    result, _ = run_recipe(rows=rows, dataset={"format": "text"}, peft=peft)
    assert result.status == 1
    assert "error[initialisation] peft.init_lora_weights: eva looks for 96 directions" in result.err
