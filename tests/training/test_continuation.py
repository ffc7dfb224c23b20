"""`model.adapter`: a stage goes on from the adapter of an earlier one, or says before the weights why it can't."""

import json
import math
import shutil

import pytest
from shared import CHAT, LORA, NF4, break_off, metrics


@pytest.fixture
def stage(run_recipe):
    """Runs a small recipe of a stage, named like it; returns the result and its run folder, if any."""

    def stage(name, *arguments, adapter=None, training=None, model=None, **options):
        training = {"max_steps": 6, "learning_rate": 2e-3, "max_length": 64} | (training or {})
        model = ({"adapter": str(adapter)} if adapter else {}) | (model or {})
        rows = {"rows": CHAT, "dataset": {"format": "chat"}} if name == "sft" else {}
        options = rows | {"peft": LORA} | options
        return run_recipe(*arguments, stage=name, name=name, training=training, model=model, **options)

    return stage


def steps(folder):
    return [entry for entry in metrics(folder) if "loss" in entry or "train_loss" not in entry]


def test_pretraining_packs_raw_text_by_default(stage):
    result, folder = stage("pretrain")
    assert result.status == 0, result.err
    assert "packed into" in result.out
    assert "cosine_with_min_lr" in result.out
    shown = (folder / "resolved.yaml").read_text()
    assert "packing: true" in shown
    assert "packing_strategy: bfd_split" in shown
    assert "- pretrain" in (folder / "README.md").read_text()


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
def test_text_then_sft_then_dpo_each_from_the_adapter_before(stage, quantization):
    """DPO from a trained adapter starts at that adapter (margin 0, loss ln 2), not at the base model."""
    _, text = stage("pretrain", quantization=quantization)
    result, sft = stage("sft", adapter=text, quantization=quantization)
    assert result.status == 0, result.err
    _, fresh = stage("sft", quantization=quantization)
    assert steps(sft)[0]["loss"] != steps(fresh)[0]["loss"]
    result, dpo = stage("dpo", adapter=sft, quantization=quantization)
    assert result.status == 0, result.err
    assert "reference  a frozen copy of the adapter" in result.out
    assert f"adapter    continued from {sft / 'adapter'}" in result.out
    first, last = steps(dpo)[0], steps(dpo)[-1]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert last["loss"] < first["loss"] - 0.01
    assert {file.name for file in (dpo / "adapter").iterdir()} >= {"adapter_model.safetensors"}
    assert not (dpo / "adapter" / "ref").exists()


def test_going_on_begins_where_the_earlier_run_ended(stage):
    """With a learning rate that moves nothing, what is saved is the adapter that was given."""
    from safetensors.torch import load_file

    _, first = stage("sft")
    result, second = stage("sft", adapter=first, training={"learning_rate": 1e-12, "max_steps": 1})
    assert result.status == 0, result.err
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6


def test_a_resumed_dpo_from_an_adapter_equals_an_uninterrupted_one(stage, tmp_path):
    _, sft = stage("sft")
    options = {"adapter": sft, "training": {"max_steps": 6, "save_steps": 2}}
    _, whole = stage("dpo", **options)
    broken = break_off(whole, 3)
    result, _ = stage("dpo", "--resume", "auto", **options)
    assert result.status == 0, result.err
    assert [entry["loss"] for entry in steps(broken)] == [entry["loss"] for entry in steps(whole)]


def test_an_adapter_on_the_hub_that_is_not_there(stage):
    result, _ = stage("dpo", adapter="nobody/no-such-adapter")
    assert result.status == 1
    assert "error[hub-unreachable] model.adapter: adapter nobody/no-such-adapter: not in the local cache" in result.err


def test_what_peft_leaves_out_comes_from_the_adapter(stage):
    _, sft = stage("sft")
    result, folder = stage("dpo", adapter=sft, peft={"method": "lora"})
    assert result.status == 0, result.err
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)


OWN = """{% for m in messages %}{{ '[' + m['role'] + '] ' }}{% if m['role'] == 'assistant' %}\
{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|end|>' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"""


def test_the_chat_template_goes_on_to_the_next_stage(stage, tmp_path):
    (tmp_path / "own.jinja").write_text(OWN)
    result, sft = stage("sft", training={"chat_template_path": "own.jinja", "eos_token": "<|end|>"})
    assert result.status == 0, result.err
    result, _ = stage("dpo", "-n", "1", "--rows-only", adapter=sft, command="preview")
    assert "[user] say 0<|end|>" in result.out


def other_family(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=600, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_base_that_has_moved_is_known_by_its_weights(stage, tiny_phi3, tmp_path):
    first = tmp_path / "before"
    shutil.copytree(tiny_phi3, first)
    _, sft = stage("sft", model={"name_or_path": str(first)})
    first.rename(tmp_path / "after")
    result, _ = stage("dpo", adapter=sft, model={"name_or_path": str(tmp_path / "after")})
    assert result.status == 0, result.err
    result, _ = stage("dpo", adapter=sft, model={"name_or_path": str(first)})
    assert "error[model-not-found]" in result.err + result.out or "error[adapter-base-differs]" in result.err


def test_adapters_that_do_not_suit_are_refused_before_the_weights(stage, tiny_phi3, tmp_path, monkeypatch):
    from recipe_runner.training import trainers

    _, sft = stage("sft")
    _, full = stage("sft", peft=None)
    before = sorted(sft.rglob("*"))
    monkeypatch.setattr(trainers, "build_trainer", lambda *_: pytest.fail("weights were loaded"))

    def refusal(**options):
        result, _ = stage("dpo", **options)
        assert result.status == 1
        assert "Traceback" not in result.err
        (line,) = [line for line in result.err.splitlines() if "error[" in line]
        return line

    assert "error[adapter-not-found] model.adapter: there is no folder" in refusal(adapter=tmp_path / "nowhere")
    assert f"holds runs, and is none itself; name one of them; the newest is {full.name}" in refusal(adapter=sft.parent)
    assert f"has no adapter: all weights were trained; set model.name_or_path to {full / 'model'}" in refusal(
        adapter=full
    )
    assert "add 'peft: {method: lora}'" in refusal(adapter=sft, peft=None)
    assert "error[adapter-config-differs] peft.r: 4, but the adapter has 8" in refusal(
        adapter=sft, peft=LORA | {"r": 4}
    )
    assert "error[adapter-config-differs] peft.target_modules: the adapter has" in refusal(
        adapter=sft, peft=LORA | {"target_modules": ["o_proj"]}
    )

    other = tmp_path / "other"
    shutil.copytree(tiny_phi3, other)
    other_family(other)
    line = refusal(adapter=sft, model={"name_or_path": str(other)})
    assert f"error[adapter-base-differs] model.name_or_path: the adapter was trained on {tiny_phi3}" in line

    copied = tmp_path / "copied"  # out of its run folder, and said to be of another base
    shutil.copytree(sft / "adapter", copied)
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    assert "error[adapter-base-differs]" in refusal(adapter=copied)
    line = refusal(adapter=copied, model={"name_or_path": str(other)})
    assert "error[adapter-does-not-fit] model.adapter: the adapter is not of this model (llama" in line

    shutil.copytree(sft / "adapter", tmp_path / "damaged")
    for text in ("{", "[1]", '{"base_model_name_or_path": 5}', '{"target_modules": [1]}'):
        (tmp_path / "damaged" / "adapter_config.json").write_text(text)
        assert "adapter_config.json is damaged" in refusal(adapter=tmp_path / "damaged")
    shutil.copytree(sft / "adapter", tmp_path / "untold")
    (tmp_path / "untold" / "tokenizer.json").write_text("{")
    assert "error[adapter-tokenizer-differs] model.adapter: the tokenizer in" in refusal(adapter=tmp_path / "untold")

    shutil.copytree(sft / "adapter", tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"1234")
    assert "adapter_model.safetensors can't be read" in refusal(adapter=tmp_path / "cut")

    renumbered = tmp_path / "renumbered"
    shutil.copytree(sft / "adapter", renumbered)
    text = json.loads((renumbered / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (renumbered / "tokenizer.json").write_text(json.dumps(text))
    assert "error[adapter-tokenizer-differs] model.adapter: " in refusal(adapter=renumbered)

    (sft / "status.json").write_text('{"status": "failed"}')
    assert "error[adapter-not-found] model.adapter: the run in" in refusal(adapter=sft)
    assert sorted(sft.rglob("*")) == before
