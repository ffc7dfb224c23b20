"""`recipe-run merge`: the merged model computes what base and adapter computed, or there is none."""

import json
import re
import shutil

import pytest
from learned import ADAPTER
from shared import NF4

from recipe_runner.methods import METHODS

STEPS = {"max_steps": 3, "eval_strategy": "no", "eval_on_start": False, "eval_steps": None}
LINEAR = {"target_modules": "all-linear"}
MERGED = {
    "dora": {"method": "lora", "use_dora": True, **LINEAR},
    "lora with trained embeddings": ADAPTER | {"modules_to_save": ["embed_tokens", "lm_head"]},
    "lora with biases": {"method": "lora", "bias": "lora_only", **LINEAR},
    "lora, rank-stabilized": {"method": "lora", "use_rslora": True, "r": 4, **LINEAR},
    "pissa": {"method": "lora", "init_lora_weights": "pissa", **LINEAR},
    "ia3": {"method": "ia3", "target_modules": ["o_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "oft": {"method": "oft", **LINEAR, "oft_block_size": 8},
    "boft": {"method": "boft", "target_modules": ["o_proj", "down_proj"], "boft_block_size": 4},
    "vera": {"method": "vera", "target_modules": ["o_proj"], "r": 4},
    "ln_tuning": {"method": "ln_tuning", "target_modules": ["norm", "input_layernorm"]},
    "adalora": {"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 1, **LINEAR},
    "loha": {"method": "loha", "target_modules": ["o_proj"], "r": 2},
    "hra": {"method": "hra", "target_modules": ["o_proj"], "r": 2},
    "fourierft": {"method": "fourierft", "target_modules": ["o_proj"], "n_frequency": 50},
}


def logits_of(model, rows):
    import torch

    with torch.no_grad():
        return [model(input_ids=torch.tensor([row])).logits[0] for row in rows]


def rows_of(run):
    return [json.loads(line)["prompt_ids"] for line in (run / "golden.jsonl").read_text().splitlines()]


def check_equal(run, folder):
    """The merged model, loaded by transformers alone, beside base and adapter, loaded by PEFT alone."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    apart = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for one, other in zip(logits_of(apart, rows_of(run)), logits_of(merged, rows_of(run)), strict=True):
        assert (one - other).abs().max() <= 1e-4
    own, saved = (AutoTokenizer.from_pretrained(place) for place in (run / "adapter", folder))
    assert own.chat_template == saved.chat_template
    assert merged.generation_config.eos_token_id == apart.generation_config.eos_token_id or saved.eos_token_id


@pytest.mark.parametrize("peft", MERGED.values(), ids=MERGED)
def test_a_merged_model_is_base_and_adapter_in_one(run_cli, train, peft, tmp_path):
    run = train("merged", peft=peft, training=STEPS | {"learning_rate": 0.01}, dataset={"eval": None})
    result = run_cli("merge", run, "--output", tmp_path / "merged")
    assert result.status == 0, result.err
    check_equal(run, tmp_path / "merged")
    assert "same first choice at 100.0% of positions" in result.out


def test_the_merged_model_answers_as_the_adapter_did(run_cli, learned, copy_of, tmp_path):
    run = copy_of(learned)
    result = run_cli("merge", run)
    assert result.status == 0, result.err
    names = {path.name for path in (run / "merged").iterdir()}
    assert names >= {"config.json", "generation_config.json", "golden.jsonl", "merge.json", "chat_template.jinja"}
    assert names >= {"model.safetensors", "tokenizer.json", "Modelfile"}
    told = run_cli("generate", run / "merged", "--prompt", "say two", "--max-new-tokens", 8)
    assert told.status == 0, told.err
    # Of a folder without a recipe the system prompt is not known: the adapter is asked in the same way.
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    apart = run_cli("generate", alone, "--prompt", "say two", "--max-new-tokens", 8)
    assert told.out == apart.out != ""
    again = run_cli("merge", run)
    assert (again.status, "error[file-exists]" in again.err) == (1, True)


def test_new_tokens_are_merged_with_their_rows(run_cli, train, tmp_path):
    peft = ADAPTER | {"modules_to_save": ["embed_tokens", "lm_head"]}
    model = {"add_tokens": ["<new>"]}
    run = train("tokens", peft=peft, model=model, training=STEPS, dataset={"eval": None})
    result = run_cli("merge", run, "--output", tmp_path / "merged")
    assert result.status == 0, result.err
    check_equal(run, tmp_path / "merged")


@pytest.fixture
def in_bfloat16(tiny_phi3, tmp_path):
    """The tiny model with weights in bfloat16, as most are published."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_phi3, dtype="bfloat16")
    model.save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(tiny_phi3).save_pretrained(tmp_path / "bf16")
    return tmp_path / "bf16"


def test_a_change_that_rounding_drops_is_refused_with_its_layers(run_cli, train, in_bfloat16, tmp_path):
    steps = STEPS | {"learning_rate": 1e-7}
    peft = {"method": "lora", "r": 2, **LINEAR}
    run = train("faint", peft=peft, model={"name_or_path": str(in_bfloat16)}, training=steps, dataset={"eval": None})
    result = run_cli("merge", run, "--output", tmp_path / "merged")
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    found = re.search(r"error\[merge-loses\] (\d+) of (\d+) layers keep less than 50% of what they learned", result.err)
    assert found[1] == found[2]
    assert "model.layers.0." in result.err
    assert not (tmp_path / "merged").exists()
    whole = run_cli("merge", run, "--output", tmp_path / "whole", "--dtype", "float32")
    assert whole.status == 0, whole.err
    assert "kept       100.0%" in whole.out
    check_equal(run, tmp_path / "whole")
    assert run_cli("merge", run, "--output", tmp_path / "lossy", "--allow-loss").status == 0
    kept = json.loads((tmp_path / "lossy" / "merge.json").read_text())["kept_of_what_was_learned"]
    assert max(kept.values()) < 0.5


def test_a_base_that_was_quantized_in_training_is_merged_whole(run_cli, train, tmp_path):
    run = train("qlora", peft={"method": "lora", "r": 4, **LINEAR}, quantization=NF4,
                training=STEPS | {"learning_rate": 0.01}, dataset={"eval": None})  # fmt: skip
    result = run_cli("merge", run, "--output", tmp_path / "merged")
    assert result.status == 0, result.err
    assert "base       was quantized in training, and is not here" in result.out
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    check_equal(run, tmp_path / "merged")


@pytest.mark.parametrize(("kind", "key"), [("nf4", "load_in_4bit"), ("int8", "load_in_8bit")])
def test_merged_weights_are_quantized_where_it_is_asked_for(run_cli, learned, tmp_path, kind, key):
    from transformers import AutoModelForCausalLM

    result = run_cli("merge", learned, "--output", tmp_path / "small", "--quantize", kind)
    assert result.status == 0, result.err
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config[key] is True
    record = json.loads((tmp_path / "small" / "merge.json").read_text())
    assert record["dtype"] == kind  # and the difference is that of what was saved
    assert record["largest_logit_difference"] > 1e-3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").is_quantized
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("name", ["prompt_tuning", "bottleneck"])
def test_what_no_weights_can_hold_is_refused_with_the_reason(run_cli, train, tmp_path, name):
    peft = {"prompt_tuning": {"method": name, "num_virtual_tokens": 4}, "bottleneck": {"method": name}}[name]
    run = train("apart", peft=peft, training=STEPS, dataset={"eval": None})
    result = run_cli("merge", run, "--output", tmp_path / "merged")
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    why = {"prompt_tuning": "no weights of the base could hold them", "bottleneck": "has an activation inside"}[name]
    assert f"error[not-mergeable] {name} can't be merged: " in result.err
    assert why in result.err
    assert not METHODS[name].merges


def test_a_merge_that_cannot_be_made_leaves_nothing(run_cli, learned, whole, copy_of, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    def said(run, *options):
        result = run_cli("merge", run, "--output", tmp_path / "merged", *options)
        assert (result.status, result.err.count("\n")) == (1, 1), result.err
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("merged")]
        return re.search(r"error\[([a-z-]+)\]", result.err)[1]

    assert said(whole) == "no-adapter"
    run = copy_of(learned)
    environment = json.loads((run / "environment.json").read_text())
    changed = environment | {"base_model": environment["base_model"] | {"weights": "0" * 32}}
    (run / "environment.json").write_text(json.dumps(changed))
    assert said(run) == "base-changed"
    (run / "environment.json").write_text(json.dumps(environment))
    weights = run / "adapter" / "adapter_model.safetensors"
    whole_file = weights.read_bytes()
    weights.write_bytes(whole_file[: len(whole_file) // 2])
    assert said(run) == "result-not-loaded"
    weights.write_bytes(whole_file)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    save = PreTrainedModel.save_pretrained

    def fill_the_disk(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        raise OSError(28, "No space left on device", f"{folder}/model.safetensors")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fill_the_disk)
    assert said(run) == "disk-full"
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    monkeypatch.undo()
    (tmp_path / "good.partial").mkdir()
    (tmp_path / "good.partial" / "mine.txt").write_text("mine")
    assert run_cli("merge", run, "--output", tmp_path / "good").status == 0
    assert (tmp_path / "good.partial" / "mine.txt").read_text() == "mine"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    result = run_cli("merge", run, "--output", tmp_path / "full")
    assert (result.status, "error[file-exists]" in result.err) == (1, True)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_a_merge_that_computes_something_else_is_refused(run_cli, learned, tmp_path, monkeypatch):
    """As if PEFT's merge were wrong in a layer."""
    from recipe_runner.results import merging

    merge = merging._merge_layers

    def wrongly(model, saved):
        yield from merge(model, saved)
        model.get_base_model().model.layers[0].self_attn.o_proj.get_base_layer().weight.data.mul_(1.1)

    monkeypatch.setattr(merging, "_merge_layers", wrongly)
    for options in ((), ("--allow-loss",), ("--allow-loss", "--dtype", "bfloat16")):
        result = run_cli("merge", learned, "--output", tmp_path / "merged", *options)
        assert (result.status, result.err.count("\n")) == (1, 1), result.err
        assert "error[merge-differs] logits of the merged model differ by" in result.err
        assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT says it, too
def test_embeddings_that_are_tied_and_adapted_on_one_side_are_not_merged(run_cli, train, tmp_path, tokenizer):
    from transformers import LlamaConfig

    from recipe_runner.model.tiny import write_tiny

    base = write_tiny(LlamaConfig(tie_word_embeddings=True), tokenizer, tmp_path / "tied")
    peft = {"method": "lora", "r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    steps = STEPS | {"learning_rate": 0.01}
    run = train("tied", peft=peft, model={"name_or_path": str(base)}, training=steps, dataset={"eval": None})
    result = run_cli("merge", run, "--output", tmp_path / "merged", "--allow-loss")
    assert result.status == 1
    assert "error[merge-differs]" in result.err
    assert "the base's embeddings are tied" in result.err


CONVERSATIONS = [
    [{"role": "user", "content": "one"}],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}],
]
WITH_SYSTEM = [{"role": "system", "content": "be good"}, *CONVERSATIONS[1]]
TAKEN_APART = ["phi3", "phi3_training", "llama3", "qwen2_5", "qwen3_instruct_2507", "gemma", "llama3_2"]


@pytest.mark.parametrize("name", TAKEN_APART)
def test_a_chat_template_is_taken_apart_for_ollama(name, tokenizer):
    import copy
    from pathlib import Path

    import trl

    from recipe_runner.results.gguf import find_start, take_apart

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    parts = take_apart(tokenizer)
    for turns in [*CONVERSATIONS, *([WITH_SYSTEM] if "system" in parts.around else [])]:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert find_start(tokenizer) + parts.render(turns) == text
    assert parts.as_go().count("{{ if") == len(parts.around)


def test_a_template_that_is_more_than_text_around_turns_is_not_taken_apart(tokenizer):
    import copy

    from recipe_runner.results.gguf import take_apart

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ loop.index }} {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert take_apart(tokenizer) is None


def test_the_modelfile_has_template_system_prompt_and_stops(run_cli, learned, tmp_path):
    assert run_cli("merge", learned, "--output", tmp_path / "merged").status == 0
    text = (tmp_path / "merged" / "Modelfile").read_text()
    assert text.startswith("# learned")
    assert "FROM ./learned.gguf\n" in text
    assert '{{ if eq .Role "user" }}<|user|>\n{{ .Content }}<|end|>\n' in text
    assert 'SYSTEM """Be brief."""' in text
    assert 'PARAMETER stop "<|endoftext|>"' in text
