"""Ways of tuning together with pipelines, references, new tokens, half precision and each other."""

import json
import shutil

import pytest
from shared import LORA, NF4, TEXT, losses, write_rows

PISSA = LORA | {"init_lora_weights": "pissa"}
NORMS = {"method": "ln_tuning", "target_modules": ["norm"]}
STILL = {"max_steps": 1, "learning_rate": 1e-12}
STEPS = {"max_steps": 6, "learning_rate": 5e-3, "save_steps": 2}


@pytest.fixture
def two_stages(run_cli, write_recipe, tiny_phi3, tmp_path):
    """A pipeline of two stages on text, each with its own sections; returns the result and both run folders."""

    def two_stages(first, second, command="train"):
        write_rows(tmp_path / "text.jsonl", TEXT)
        for name, sections in (("one", first), ("two", second)):
            training = {"max_steps": 3, "learning_rate": 5e-3, "logging_steps": 1, "activation_checkpointing": False}
            data = {"format": "text", "train": {"source": "text.jsonl"}}
            model = {"name_or_path": str(tiny_phi3)}
            sections = {"training": {}} | sections
            write_recipe(name, model=model, dataset=data, **sections | {"training": training | sections["training"]})
        entry = {"schema_version": 1, "name": "chain", "stage": "pipeline", "stages": ["one.yaml", "two.yaml"]}
        file = tmp_path / "chain.yaml"
        file.write_text(json.dumps(entry | {"run": {"output_dir": str(tmp_path / "runs")}}))
        result = run_cli(command, file)
        folder = max((tmp_path / "runs" / "chain").glob("*"), default=None)
        runs = [max((folder / place).glob("*/*"), default=None) for place in ("1", "2")] if folder else []
        return result, runs

    return two_stages


def tensors_of(run):
    from safetensors.torch import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", "eva"])
def test_a_stage_after_an_initialisation_keeps_what_was_learned(two_stages, init):
    """The second stage learns nothing: its result is that of the first, and not the base."""
    peft = LORA | {"init_lora_weights": init, "r": 4}
    result, (one, two) = two_stages({"peft": peft}, {"peft": {"method": "lora"}, "training": STILL})
    assert result.status == 0, result.err
    before, after = tensors_of(one), tensors_of(two)
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)


def test_adalora_goes_on_by_epochs_and_moves_no_rank(two_stages):
    peft = {"method": "adalora", "target_modules": "all-linear", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1}
    epochs = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 20}
    result, (one, two) = two_stages({"peft": peft}, {"peft": {"method": "adalora"}, "training": epochs})
    assert result.status == 0, result.err
    shapes = [{name: tensor.shape for name, tensor in tensors_of(run).items()} for run in (one, two)]
    assert shapes[0] == shapes[1]


def test_what_a_stage_unfroze_is_not_unfrozen_by_the_next_with_an_adapter(two_stages):
    result, (_, two) = two_stages({"peft": None, "unfreeze": ["norms"]}, {"peft": LORA})
    assert result.status == 0, result.err
    assert not any("norm" in name for name in tensors_of(two))


@pytest.mark.parametrize("second", [["norms"], ["norms", "lm_head", "embeddings"]], ids=["fewer", "more"])
def test_stages_that_unfreeze_different_parts_are_refused_at_once(two_stages, second):
    first = {"peft": LORA, "unfreeze": ["norms", "lm_head"]}
    result, runs = two_stages(first, {"peft": {"method": "lora"}, "unfreeze": second}, command="validate")
    assert result.status == 1
    assert "error[pipeline-handover]" in result.out
    assert "unfreeze different parts of the base" in result.out
    assert not runs


def test_what_an_adapter_holds_of_the_base_is_said_and_must_be_what_is_asked_for(run_recipe):
    training = {"max_steps": 2}
    _, first = run_recipe(name="first", peft=LORA, unfreeze=["norms", "lm_head"], training=training)
    going_on = {"peft": {"method": "lora"}, "model": {"adapter": str(first)}, "training": training}
    result, _ = run_recipe(name="same", **going_on)
    assert result.status == 0, result.err
    assert "with 6 modules of the base that it trains" in result.out
    result, run = run_recipe(name="fewer", unfreeze=["norms"], **going_on)
    assert result.status == 1
    assert "error[adapter-config-differs] unfreeze: the adapter trains also lm_head" in result.err
    assert run is None


@pytest.mark.parametrize("stage", ["dpo", "kto"])
@pytest.mark.parametrize(("method", "bias"), [("lora", "all"), ("lora", "lora_only"), ("oft", "all")])
def test_biases_of_the_base_are_not_trained_beside_a_reference(run_cli, small_recipe, stage, method, bias):
    peft = {"method": method, "target_modules": "all-linear", "bias": bias}
    result = run_cli("validate", small_recipe(stage, peft=peft))
    assert result.status == 1
    assert (
        "error[initialisation] peft.bias: it changes the base itself: the reference would not be the base" in result.out
    )


@pytest.mark.parametrize("name", ["loraplus", "riemannian", "lorafa"])
def test_an_optimizer_of_peft_resumes_on_4_bit_weights(run_recipe, tmp_path, name):
    optimizer = {"name": name} | ({"loraplus_lr_ratio": 8} if name == "loraplus" else {})
    sections = {"peft": LORA, "quantization": NF4, "training": STEPS | {"peft_optimizer": optimizer}}
    _, whole = run_recipe(**sections)
    killed = tmp_path / "runs" / "tiny" / "99999999-000000-aaaa"
    shutil.copytree(whole, killed)
    for path in (killed / "adapter", *(killed / "checkpoints").glob("checkpoint-[46]")):
        shutil.rmtree(path)
    (killed / "status.json").write_text('{"status": "failed"}')
    result, run = run_recipe("--resume", "auto", **sections)
    assert (result.status, run) == (0, killed), result.err
    assert losses(killed) == losses(whole)
    before, after = tensors_of(whole), tensors_of(killed)
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(
    "sections",
    [
        {"peft": {"method": "ln_tuning", "target_modules": ["norm"]}},
        {"peft": LORA, "unfreeze": ["norms"]},
        {"unfreeze": ["norms"]},
    ],
    ids=["ln_tuning", "hybrid", "partial"],
)
def test_norms_in_half_precision_are_refused_and_move_in_mixed_precision(run_recipe, sections):
    half = {"model": {"dtype": "bfloat16"}, "training": {"max_steps": 2, "learning_rate": 1e-4}}
    result, run = run_recipe(**half, **sections)
    assert result.status == 1
    assert "error[norms-do-not-move] model.dtype" in result.err
    assert run is None
    half["training"] |= {"bf16": True, "use_cpu": True}
    result, run = run_recipe(**half, **sections)
    assert result.status == 0, result.err
    from safetensors.torch import load_file

    (file,) = run.glob("*/*.safetensors")
    norms = [tensor for name, tensor in load_file(file).items() if "norm" in name]
    assert norms
    assert all(tensor.dtype.itemsize == 4 and (tensor != 1).any() for tensor in norms)


def test_new_tokens_must_be_unfrozen(run_recipe):
    model = {"add_tokens": ["ticketdesk"]}
    result, run = run_recipe(model=model, unfreeze=["layers[-1]"])
    assert result.status == 1
    assert "error[new-tokens] unfreeze: model.add_tokens makes new rows of" in result.err
    assert run is None
    for peft in (None, LORA, LORA | {"target_modules": ".*qkv_proj"}):
        result, run = run_recipe(model=model, peft=peft, unfreeze=["embeddings", "lm_head"])
        assert result.status == 0, result.err


def test_a_prompt_of_a_recurrent_network_is_saved(run_recipe):
    peft = {"method": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 16}
    result, _ = run_recipe(peft=peft | {"encoder_reparameterization_type": "LSTM"}, training=STEPS)
    assert result.status == 0, result.err


REFUSED = {
    "pissa and the head": (
        {"peft": PISSA | {"modules_to_save": ["lm_head"]}},
        "can't be put back beside modules_to_save",
    ),
    "pissa and norms": ({"peft": PISSA, "unfreeze": ["norms"]}, "can't be put back beside unfreeze"),
    "corda and biases": (
        {"peft": LORA | {"init_lora_weights": "corda", "bias": "lora_only"}},
        "can't be put back beside bias: lora_only",
    ),
    "a quantized head": (
        {
            "peft": LORA | {"target_modules": ["o_proj"]},
            "quantization": NF4 | {"llm_int8_skip_modules": ["down_proj", "output"]},
            "unfreeze": ["lm_head"],
        },
        "error[unfreeze-quantized] unfreeze.0: 'lm_head' matches lm_head.weight",
    ),
    "a range of three": ({"peft": LORA | {"layer_replication": [[0, 1, 2]]}}, "at most 2 are allowed"),
    "an endless number": ({"unfreeze": [f"layers[{'9' * 5000}]"]}, "error[unfreeze-not-found]"),
    "a list of layers": (
        {"peft": {"method": "bottleneck", "target_modules": ["layers"]}},
        "model.layers is a ModuleList",
    ),
    "what has no output": (
        {"peft": {"method": "bottleneck", "target_modules": ["rotary_emb"]}},
        "an adapter can be put after linear layers",
    ),
    "DoRA and LoRA-FA": (
        {"peft": LORA | {"use_dora": True}, "training": {"peft_optimizer": {"name": "lorafa"}}},
        "lorafa does not know DoRA's lengths",
    ),
    "a text without TEXT": (
        {"peft": {"method": "prompt_tuning", "num_virtual_tokens": 4, "prompt_tuning_init_text": "a"}},
        "it has no effect without prompt_tuning_init: TEXT",
    ),
    "a text of more words than tokens": (
        {
            "peft": {
                "method": "prompt_tuning",
                "num_virtual_tokens": 4,
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "Say what it is about.",
            }
        },
        "a text of 5 words, of which 4 virtual tokens can't hold the end: PEFT cuts it off",
    ),
    "a size without a network": (
        {
            "peft": {"method": "prefix_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 8},
            "training": {"activation_checkpointing": False},
        },
        "it has no effect without prefix_projection: true",
    ),
    "no Conv1D": ({"peft": LORA | {"fan_in_fan_out": True}}, "no target is a Conv1D"),
    "nothing tied": ({"peft": LORA | {"ensure_weight_tying": True}}, "two matrices in this model"),
    "in and out": (
        {"peft": LORA | {"target_modules": ["o_proj", "down_proj"], "exclude_modules": ["o_proj"]}},
        "remove it from one of them",
    ),
    "no target left": ({"peft": LORA, "unfreeze": ["layers[:]"]}, "leave no target"),
    "an optimizer without a name": ({"peft": LORA, "training": {"peft_optimizer": {"reg": 1}}}, "add 'name:'\n"),
    "tokens by a prompt": (
        {"peft": {"method": "prompt_tuning", "num_virtual_tokens": 4}, "model": {"add_tokens": ["x9"]}},
        "prompt_tuning trains none of the base's",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_go_together_is_said_before_the_weights(case, run_recipe):
    sections, said = REFUSED[case]
    result, run = run_recipe(**sections)
    assert result.status == 1, result.err
    assert said in result.err, result.err
    assert "Loading weights" not in result.err
    assert run is None


def test_another_method_takes_no_key_of_the_one_before(run_cli, small_recipe, write_recipe):
    base = small_recipe(peft=LORA)
    result = run_cli("show", base, "--set", "peft.method=ia3")
    assert result.status == 0, result.err
    assert "lora_alpha" not in result.out
    assert "method: ia3" in result.out
    child = base.parent / "child.yaml"
    entry = {"schema_version": 1, "name": "child", "extends": base.name}
    child.write_text(json.dumps(entry | {"peft": {"method": "ia3"}}))
    result = run_cli("show", child)
    assert result.status == 0, result.err
    assert "lora_alpha" not in result.out
    child.write_text(json.dumps(entry | {"peft": {"r": 2}}))
    assert "lora_alpha" in run_cli("show", child).out


def test_every_method_is_explained_in_80_columns(run_cli):
    from recipe_runner.methods import METHODS, REFUSED

    result = run_cli("explain", "method")
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in METHODS:
        assert any(line.startswith(f"{name} ") for line in lines), name
    for name in REFUSED:
        assert f"  {name}: " in result.out


def test_weights_trained_in_half_precision_are_warned_of(run_recipe):
    result, _ = run_recipe(model={"dtype": "bfloat16"}, training={"max_steps": 1})
    assert result.status == 0, result.err
    assert "warning[half-precision-weights] model.dtype: the weights themselves are trained in bfloat16" in result.err
    result, _ = run_recipe(model={"dtype": "bfloat16"}, peft=LORA, training={"max_steps": 1})
    assert "half-precision-weights" not in result.err


def test_scales_move_on_a_base_in_half_precision(run_recipe):
    """PEFT trains them in float32 there, and so it stays: in bfloat16 a step of 1e-3 would be lost beside 1."""
    peft = {"method": "ia3", "target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    training = {"max_steps": 2, "learning_rate": 1e-3}
    result, run = run_recipe(model={"dtype": "bfloat16"}, peft=peft, training=training)
    assert result.status == 0, result.err
    assert all((tensor != 1).any() for tensor in tensors_of(run).values())
