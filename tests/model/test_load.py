"""Doors for what comes after training: a small model of any architecture, a run's result ready for inference."""

import json
import shutil

import pytest
from shared import LORA

from recipe_runner.problems.errors import UserError

KINDS = ["phi3", "llama", "qwen3", "gemma3_text", "mistral", "gpt2", "opt", "qwen3_moe", "bert", "t5"]


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_is_a_small_model_of_the_same_architecture(kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from recipe_runner.model.tiny import shrink_config

    config = AutoConfig.for_model(kind, **({"decoder_start_token_id": 0} if kind == "t5" else {}))
    small = shrink_config(config, 300)
    assert type(small) is type(config)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_config(small)
    assert model.num_parameters() < 1_000_000
    batch = torch.arange(1, 21)[None]
    logits = model(input_ids=batch, labels=batch).logits
    assert logits.shape == (1, 20, 300)
    assert config.vocab_size != 300  # the configuration that was given is as it was


def test_tiny_keeps_long_rope_factors_in_step_with_the_heads():
    from transformers import Phi3Config, Phi3ForCausalLM

    from recipe_runner.model.tiny import shrink_config

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = Phi3Config(rope_scaling=rope, max_position_embeddings=131072, original_max_position_embeddings=4096)
    Phi3ForCausalLM(shrink_config(config, 300))


@pytest.fixture
def completed(run_recipe):
    def completed(**sections):
        result, folder = run_recipe(**sections)
        assert result.status == 0, result.err
        return folder

    return completed


@pytest.mark.parametrize("peft", [LORA, None], ids=["adapter", "model"])
def test_a_run_is_loaded_as_it_was_trained(completed, peft):
    import torch

    from recipe_runner.model.load import load_result

    run = completed(peft=peft, training={"learning_rate": 0.01})
    model, tokenizer = load_result(run, dtype=torch.float32)
    again, _ = load_result(run / ("adapter" if peft else "model"), dtype=torch.float32)
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template
    batch = tokenizer(["one", "one and two"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert (model(**batch).logits == again(**batch).logits).all()
        if peft:
            with model.disable_adapter():
                base = model(**batch).logits
            assert (base - again(**batch).logits).abs().max() > 0.01


def test_what_cannot_be_loaded_is_one_line(completed, tmp_path):
    from recipe_runner.model.load import find_result, load_result

    run = completed(peft=LORA)
    for folder, code in ((tmp_path / "nowhere", "result-not-found"), (tmp_path, "result-not-found")):
        with pytest.raises(UserError, match=code):
            load_result(folder)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="result-not-loaded"):
        load_result(run)
    (run / "status.json").write_text(json.dumps({"status": "failed"}))
    with pytest.raises(UserError, match="run-not-completed"):
        find_result(run)


def without(file, *names):
    """Writes a file of weights again, without some of its tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    left = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in names)}
    assert 0 < len(left) < len(tensors)
    save_file(left, file, metadata={"format": "pt"})


def test_weights_that_are_not_all_there_are_not_loaded(completed, tiny_phi3, tmp_path):
    """PEFT only warns, and transformers fills what is missing with random numbers."""
    from recipe_runner.model.load import load_result

    base = shutil.copytree(tiny_phi3, tmp_path / "base")
    run = completed(peft=LORA, model={"name_or_path": str(base)})
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["o_proj"]}))
    with pytest.raises(UserError, match="has, and no place for,"):
        load_result(run)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    without(run / "adapter" / "adapter_model.safetensors", "layers.1.")
    with pytest.raises(UserError, match="lacks"):
        load_result(run)
    without(base / "model.safetensors", "layers.1.")
    with pytest.raises(UserError, match="other-weights"):
        load_result(base)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"):
        load_result(run)


def test_the_result_of_a_pipeline_is_that_of_its_last_stage(completed, tmp_path):
    from recipe_runner.model.load import find_result

    run = completed(peft=LORA)
    pipeline = tmp_path / "chain"
    shutil.copytree(run, pipeline / "2" / "tiny" / "run")
    (pipeline / "resolved.yaml").write_text("stage: pipeline")
    (pipeline / "status.json").write_text(json.dumps({"status": "completed", "stages": [{"run": "2/tiny/run"}]}))
    assert find_result(pipeline) == pipeline / "2" / "tiny" / "run" / "adapter"


ENDS_ITS_OWN_WAY = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def template(tmp_path):
    (tmp_path / "own.jinja").write_text(ENDS_ITS_OWN_WAY)
    return {"chat_template_path": "own.jinja"}


CHATS = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
    for n in range(8)
]


def test_an_end_of_turn_at_which_nothing_stops_is_refused_before_training(run_recipe, template):
    result, folder = run_recipe(rows=CHATS, dataset={"format": "chat"}, training=template, peft=LORA)
    assert (result.status, folder) == (1, None)
    assert (
        "error[end-of-turn-is-no-end] training.eos_token: turns end with <|end|>, but generation stops at" in result.err
    )
    assert "set training.eos_token: '<|end|>'" in result.err


@pytest.mark.parametrize("peft", [LORA, None], ids=["adapter", "model"])
def test_what_is_saved_stops_at_the_end_of_its_turns(completed, template, peft):
    from recipe_runner.model.load import load_result

    training = template | {"eos_token": "<|end|>"}
    run = completed(rows=CHATS, dataset={"format": "chat"}, training=training, peft=peft)
    model, tokenizer = load_result(run)
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_a_template_with_a_token_that_the_vocabulary_lacks_is_named(run_recipe, template, tmp_path):
    (tmp_path / "own.jinja").write_text(ENDS_ITS_OWN_WAY.replace("<|end|>", "<|im_end|>"))
    result, _ = run_recipe(rows=CHATS, dataset={"format": "chat"}, training=template, peft=LORA)
    assert result.status == 1
    assert (
        "error[template-token-missing] training.chat_template_path: the chat template ends a turn with <|im_end|>"
        in result.err
    )


@pytest.mark.parametrize("peft", [LORA, None])
def test_what_is_shared_does_not_name_the_home(completed, tmp_path, monkeypatch, tiny_phi3, peft):
    """And the adapter loads: by PEFT from the folder where the run was started, by us from any."""
    from peft import AutoPeftModelForCausalLM

    from recipe_runner.model.load import load_result

    monkeypatch.setenv("HOME", str(tmp_path))
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    base = shutil.copytree(tiny_phi3, tmp_path / "base")
    folder = completed(model={"name_or_path": str(base)}, peft=peft, training={"save_steps": 2})
    result = folder / ("adapter" if peft else "model")
    shared = [
        folder / "environment.json",
        folder / "README.md",
        *result.iterdir(),
        *folder.glob("checkpoints/*/*.json"),
    ]
    assert len(shared) > 10
    assert [file for file in shared if str(tmp_path).encode() in file.read_bytes()] == []
    assert "~/base" in (folder / "README.md").read_text()
    if peft:
        assert json.loads((result / "adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
        AutoPeftModelForCausalLM.from_pretrained(result)
    monkeypatch.chdir("/")
    load_result(folder)
