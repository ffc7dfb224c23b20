"""The model before its weights: where it is, what the adapter matches, and bitsandbytes on a CPU."""

import json
import os
import re

import pytest
from shared import LORA, NF4, status

from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.resolve import load_recipe


@pytest.fixture
def check(write_recipe, tiny_phi3):
    from recipe_runner.model import adapter, base

    def check(**peft):
        recipe = load_recipe(str(write_recipe(model={"name_or_path": str(tiny_phi3)}, peft={"method": "lora"} | peft)))
        with recipe.placing_errors():
            config = base.load_model_config(recipe.model)
            peft_config = adapter.build_peft(recipe.peft.said, recipe.stage.task)
            adapter.fit_adapter(
                peft_config, base.build_empty(config), lambda: base.build_empty(config), config.model_type
            )

    return check


@pytest.mark.parametrize(
    "targets", ["all-linear", ["qkv_proj", "o_proj"], r".*\.layers\.1\..*(qkv|down)_proj", ["layers.0.mlp.down_proj"]]
)
def test_targets_that_match_pass(check, targets):
    check(target_modules=targets)


@pytest.mark.parametrize("targets", [["o_proj", "c_proj"], ["qkv_poj"], r".*\.q_proj", ["embed_token"]])
def test_a_target_that_matches_nothing_is_an_error_even_beside_one_that_does(check, targets):
    with pytest.raises(UserError) as caught:
        check(target_modules=targets)
    (problem,) = caught.value.problems
    assert (problem.code, problem.path) == ("target-not-found", ("peft", "target_modules"))
    assert "its linear modules: down_proj, gate_up_proj, lm_head, o_proj, qkv_proj" in problem.message


def test_targets_left_out_are_an_error_where_peft_has_no_default(check):
    with pytest.raises(UserError, match="PEFT has no default targets for phi3; add 'target_modules: all-linear'"):
        check()


def test_the_nearest_module_is_suggested(check):
    with pytest.raises(UserError, match="did you mean 'qkv_proj'"):
        check(target_modules=["qkv_poj"])


def test_modules_to_save_are_checked_too(check):
    check(target_modules="all-linear", modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match=r"peft\.modules_to_save"):
        check(target_modules="all-linear", modules_to_save=["embeddings"])


def test_nested_configurations_of_peft_are_built():
    from peft.tuners.lora.config import VeloraConfig

    from recipe_runner.model.adapter import build_peft

    config = build_peft({"method": "lora", "velora_config": {"num_groups": 2}}, "CAUSAL_LM")
    assert isinstance(config.velora_config, VeloraConfig)
    assert config.velora_config.num_groups == 2


@pytest.mark.parametrize(
    ("name", "code"),
    [("/nowhere/model", "model-not-found"), ("nobody/no-such-model", "hub-unreachable"), ("a b", "model-not-found")],
)
def test_a_model_that_is_not_there_is_an_error(write_recipe, name, code):
    from recipe_runner.model.hub import find_model

    recipe = load_recipe(str(write_recipe(model={"name_or_path": name})))
    with pytest.raises(UserError) as caught, recipe.placing_errors():
        find_model(recipe.model)
    assert caught.value.problems[0].code == code
    assert caught.value.problems[0].mark.line > 0


def test_every_reason_of_the_hub_has_a_code_of_its_own():
    from recipe_runner.model.hub import HUB_ERRORS

    assert {code for _, code, _, _ in HUB_ERRORS} == {"model-not-found", "hub-unreachable"}
    names = [error.__name__ for error, *_ in HUB_ERRORS]
    assert names.index("GatedRepoError") < names.index("RepositoryNotFoundError")  # a subclass: asked first
    assert names.index("LocalEntryNotFoundError") < names.index("EntryNotFoundError")


def gradient_before_and_after_evaluation(tiny_phi3, fixed):
    """Norm of the adapter's gradient for one batch, before and after a forward pass as evaluation does it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from recipe_runner.model.quantization import keep_4bit_weights_trainable

    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_phi3, quantization_config=quantization, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4))
    if fixed:
        assert keep_4bit_weights_trainable(model) == 8
    batch = torch.arange(5, 37)[None]

    def norm():
        model.train()
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        first = [p.grad.norm() for name, p in model.named_parameters() if "layers.0" in name and "lora_B" in name]
        return float(torch.stack(first).norm())

    before = norm()
    model.eval()
    with torch.no_grad():
        model(input_ids=batch)
    return before, norm()


def test_4bit_gradients_are_the_same_after_an_evaluation(tiny_phi3):
    before, after = gradient_before_and_after_evaluation(tiny_phi3, fixed=True)
    assert before > 0
    assert after == before


def test_bitsandbytes_still_needs_the_workaround(tiny_phi3):
    """Fails when bitsandbytes is fixed: then `keep_4bit_weights_trainable` can go. Only AVX512-BF16 CPUs repack."""
    from bitsandbytes.nn.modules import has_avx512bf16

    before, after = gradient_before_and_after_evaluation(tiny_phi3, fixed=False)
    assert (after != before) == has_avx512bf16()


@pytest.mark.parametrize("name", ["MatMul8bitLt", "MatMul8bitFp"])
def test_inputs_of_8bit_layers_are_let_go(name):
    """Fails when bitsandbytes is fixed, too: then `forget_8bit_inputs` can go."""
    import gc
    import weakref

    import torch
    from bitsandbytes.autograd import _functions
    from bitsandbytes.functional import int8_vectorwise_quant

    from recipe_runner.model.quantization import forget_8bit_inputs

    forget_8bit_inputs()
    torch.manual_seed(0)
    weights = torch.randn(6, 8, dtype=torch.float16)
    packed, scales, _ = int8_vectorwise_quant(weights)

    def run(forward):
        """Whether the input is alive while the output is, and the gradient of what it was made of."""
        function = type("Copy", (getattr(_functions, name),), {"forward": staticmethod(forward)})
        state = _functions.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights = packed, scales, False
        torch.manual_seed(1)
        leaf = torch.randn(3, 8, requires_grad=True)
        given = leaf * 1.0
        alive = weakref.ref(given)
        made = function.apply(given, packed, None, None, state)
        del given
        gc.collect()
        kept = alive() is not None
        made.sum().backward()
        return kept, leaf.grad

    patched = getattr(_functions, name).forward
    kept, gradient = run(patched)
    kept_by_upstream, wanted = run(patched.__wrapped__)
    assert (kept, kept_by_upstream) == (False, True)
    assert gradient.abs().sum() > 0
    assert torch.equal(gradient, wanted)


def test_card_of_a_hub_model_names_its_base(write_recipe, tmp_path):
    from recipe_runner.data.accounting import Accounting
    from recipe_runner.training.card import write_card

    recipe = load_recipe(str(write_recipe(peft={"method": "lora"})))
    (tmp_path / "adapter").mkdir()
    write_card(recipe, tmp_path, tmp_path / "adapter", Accounting(3, 3), [{"step": 1, "loss": 2.0}])
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert re.match(r"---\nbase_model: someone/some-model\nlibrary_name: peft\n", card)
    assert json.dumps("2.0000 at step 1")[1:-1] in card


@pytest.fixture
def altered(tiny_phi3, tmp_path):
    """A copy of the tiny model whose configuration or tensors are changed."""
    import shutil

    from safetensors.torch import load_file, save_file

    def altered(config=None, change=None):
        folder = shutil.copytree(tiny_phi3, tmp_path / "altered")
        told = json.loads((folder / "config.json").read_text()) | (config or {})
        (folder / "config.json").write_text(json.dumps(told))
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return altered


def drop_norm(tensors):
    del tensors["model.norm.weight"]


def widen_norm(tensors):
    import torch

    tensors["model.norm.weight"] = torch.ones(len(tensors["model.norm.weight"]) + 1)


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        ({"num_hidden_layers": 3}, None, "6 tensor(s) are missing, and would be random: model.layers.2."),
        ({"num_hidden_layers": 1}, None, "6 tensor(s) have no place in the model: model.layers.1."),
        ({}, drop_norm, "1 tensor(s) are missing, and would be random: model.norm.weight; "),
        ({}, widen_norm, "1 tensor(s) have another shape: model.norm.weight (65,), not (64,); take"),
    ],
)
@pytest.mark.parametrize("quantization", [None, NF4], ids=["full", "4-bit"])
def test_weights_that_are_not_those_of_the_configuration_are_refused(
    run_recipe, altered, config, change, said, quantization
):
    model = {"name_or_path": str(altered(config, change))}
    result, folder = run_recipe(model=model, peft=LORA, quantization=quantization)
    assert result.status == 1
    assert f"error[other-weights] model.name_or_path: {model['name_or_path']}: {said}" in result.err
    assert status(folder)["status"] == "failed"


def test_weights_that_are_meant_to_be_new_or_unused_are_named(run_recipe, altered):
    model = {"name_or_path": str(altered({"num_hidden_layers": 1})), "unused_weights": ["model.layers.1"]}
    assert run_recipe(model=model, peft=LORA)[0].status == 0


def test_weights_that_are_meant_to_be_new(run_recipe, altered):
    model = {"name_or_path": str(altered({}, drop_norm)), "new_weights": ["model.norm"]}
    assert run_recipe(model=model, peft=LORA)[0].status == 0


@pytest.mark.parametrize(
    ("peft", "key", "said"),
    [
        ({"exclude_modules": ["qkv_porj"]}, "exclude_modules", "'qkv_porj' matches no module of the model"),
        ({"exclude_modules": "layers.[0"}, "exclude_modules", "'layers.[0' is not a regular expression"),
        ({"target_modules": "model.(["}, "target_modules", "'model.([' is not a regular expression"),
        ({"target_modules": "(.*)*(.*)*(.*)*x"}, "target_modules", "can't be used: it takes more than 0.5 seconds"),
        ({"exclude_modules": "(.*)*(.*)*(.*)*x"}, "exclude_modules", "can't be used: it takes more than 0.5 seconds"),
        ({"rank_pattern": {"(.*)*(.*)*(.*)*x": 2}}, "rank_pattern", "can't be used: it takes more than 0.5 seconds"),
        ({"target_modules": r".*\.k_proj"}, "target_modules", "matches no module of the model"),
        ({"layers_to_transform": [0, 7], "target_modules": ["o_proj"]}, "layers_to_transform", "there is no layer 7"),
        (
            {"layers_to_transform": 7, "target_modules": ["o_proj"]},
            "layers_to_transform",
            "the model has layers 0 to 1",
        ),
        (
            {"rank_pattern": {"o_porj": 2}},
            "rank_pattern",
            "'o_porj' matches no module that is adapted; there are: down",
        ),
        ({"alpha_pattern": {"embed_tokens": 2}}, "alpha_pattern", "'embed_tokens' matches no module that is adapted"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern", "is not a regular expression"),
        (
            {"rank_pattern": {"o_proj": 4, "0.self_attn.o_proj": 2}},
            "rank_pattern",
            "both match model.layers.0.self_attn",
        ),
        (
            {"target_parameters": ["mlp.gate_up"]},
            "target_parameters",
            "'mlp.gate_up' matches no parameter of the model",
        ),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save", "did you mean 'lm_head'?"),
        (
            {"layers_pattern": ["layrs"], "layers_to_transform": [1], "target_modules": ["o_proj"]},
            "layers_pattern",
            "'layrs' matches no module of the model; there are: layers; did you mean",
        ),
        ({"trainable_token_indices": [5, 60000]}, "trainable_token_indices", "there is no token 60000"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices", "there is no token -1"),
        ({"target_modules": ["o_proj"], "exclude_modules": ["o_proj"]}, "target_modules", ""),
        ({"target_modules": ["o_proj", "lm_head"]}, "target_modules", "an adapter on it would never be trained"),
        ({"layers_to_transform": [1]}, "layers_to_transform", "cannot be used when `target_modules` is a str"),
        ({"layer_replication": [[0, 5]]}, "layer_replication", "there are no layers 0 to 5 (excluded)"),
        ({"layer_replication": [[-1, 1]]}, "layer_replication", "there are no layers -1 to 1 (excluded)"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens", "learns only after these tokens"),
        ({"trainable_token_indices": []}, "trainable_token_indices", "the value is empty"),
        ({"r": 512, "init_lora_weights": "olora"}, "r", "olora has no 512 parts to take from"),
        ({"r": 512, "init_lora_weights": "pissa_niter_4"}, "r", "pissa_niter_4 has no 512 parts to take from"),
        ({"init_lora_weights": "pissa_niter_100000"}, "init_lora_weights", "would iterate for hours"),
        ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights", "expected gaussian, eva, olora"),
        ({"velora_config": {"num_groups": -1}}, "velora_config", "num_groups"),
        ({"rank_pattern": {"o_proj": 0}}, "rank_pattern.o_proj", "at least 1, found 0"),
        ({"alpha_pattern": {"o_proj": -1}}, "alpha_pattern.o_proj", "above 0, found -1"),
        ({"r": 10**30}, "r", "at most 100000"),
        ({"use_qalora": True}, "use_qalora", "GPTQ weights only"),
        ({"eva_config": {"rho": 2}}, "eva_config", "remove the key"),
        ({"megatron_core": "megatron.core"}, "megatron_core", "remove the key"),
    ],
)
def test_names_of_an_adapter_that_match_nothing_are_errors_at_their_key(run_recipe, peft, key, said, monkeypatch):
    from recipe_runner.model import targets
    from recipe_runner.training import trainers

    monkeypatch.setattr(targets, "PATTERN_SECONDS", 0.5)
    monkeypatch.setattr(trainers, "build_trainer", lambda *_: pytest.fail("the weights were loaded"))
    result, folder = run_recipe(peft=LORA | peft)
    assert (result.status, folder) == (1, None)
    assert f"] peft.{key}: " in result.err
    assert said in result.err
    assert "Traceback" not in result.err


def test_tokens_that_the_model_does_not_have_are_refused_before_the_weights(run_recipe, altered):
    folder = altered(None)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|stop|>"}))
    rows = [{"instruction": "a", "output": "b"}] * 4
    result, run = run_recipe(rows=rows, model={"name_or_path": str(folder)}, peft=LORA, dataset={"template": "classic"})
    assert (result.status, run) == (1, None), result.err
    assert "error[tokens-not-in-model] model.name_or_path: " in result.err
    assert "the eos token <|stop|> is token 600, the model has the tokens 0 to 599" in result.err


def test_what_upstream_refuses_at_the_first_step_is_no_bug(run_recipe, altered):
    """torch 2.13 looks at the dropout of the configuration when it is needed."""
    folder = altered({"attention_dropout": 1.5})
    result, run = run_recipe(model={"name_or_path": str(folder)}, peft=LORA)
    assert result.status == 1, result.err
    assert "error[training-refused] training: dropout probability has to be between 0 and 1" in result.err
    assert status(run)["status"] == "failed"


def test_an_adapter_larger_than_the_model_is_said(run_recipe):
    result, _ = run_recipe(peft=LORA | {"r": 256})
    assert result.status == 0, result.err
    assert re.search(
        r"warning\[large-adapter\] peft: [\d,]+ parameters are trained, and the model itself has", result.err
    )


def test_patterns_that_match_are_taken(run_recipe):
    peft = LORA | {"rank_pattern": {"o_proj": 2, r"layers\.0\.mlp\.down_proj": 4}, "layers_to_transform": [0, 1]}
    peft |= {"target_modules": ["o_proj", "down_proj"], "exclude_modules": ["layers.1.mlp.down_proj"]}
    result, _ = run_recipe(peft=peft)
    assert result.status == 0, result.err
    assert "trainable" in result.out


def test_chosen_tokens_are_trained(run_recipe):
    result, _ = run_recipe(peft=LORA | {"trainable_token_indices": {"embed_tokens": [5, 7]}})
    assert result.status == 0, result.err


def test_tokens_of_a_tied_head_are_refused_before_the_weights(run_recipe, altered):
    """TRL 1.16: trl/trainer/utils.py, _fused_forward reads `lm_head.bias`, which PEFT's wrapper does not have."""
    tied = {"name_or_path": str(altered({"tie_word_embeddings": True}))}
    result, folder = run_recipe(model=tied, peft=LORA | {"trainable_token_indices": [5]})
    assert (result.status, folder) == (1, None)
    assert "error[peft-refused] peft.trainable_token_indices: TRL 1.16 computes the loss from the head" in result.err


ODD_FILES = {
    "config.json": [
        *("[]", "{}", "null", "nope", '{"model_type": "nosuch"}', '{"model_type": 3}'),
        *(
            {"architectures": names}
            for names in (
                ["Phi3Model"],
                ["BertModel"],
                ["NoSuch"],
                ["AutoTokenizer"],
                None,
                "x",
                [],
                [3],
                "Phi3ForCausalLM",
            )
        ),
        *({"hidden_size": "x"}, {"hidden_size": 0}, {"num_hidden_layers": -1}, {"vocab_size": 10}),
    ],
    "adapter_config.json": ["{}"],  # of an adapter that would be loaded, too
    "pytorch_model.bin": ["", "junk", "version https://git-lfs.github.com/spec/v1"],
    "tokenizer.json": ["{}", "[]", '{"version"'],
    "tokenizer_config.json": ["[]", "nope"],
    "generation_config.json": ["[]"],
    "model.safetensors": ["", "half a header", "version https://git-lfs.github.com/spec/v1"],
}


@pytest.mark.parametrize(
    ("file", "content"), [(file, content) for file, contents in ODD_FILES.items() for content in contents], ids=str
)
def test_odd_model_folders_are_one_line(run_recipe, altered, file, content):
    """Whatever a file of the user's causes below us, it is no bug of ours, and the key is named."""
    folder = altered(content if isinstance(content, dict) else None)
    if isinstance(content, str):
        (folder / file).write_text(content)
    safe = file != "pytorch_model.bin"
    if not safe:
        (folder / "model.safetensors").unlink()
    result, _ = run_recipe(model={"name_or_path": str(folder), "use_safetensors": safe}, peft=LORA)
    assert result.status == 1, result.err
    (line,) = [line for line in result.err.splitlines() if "error[" in line]
    assert re.search(r"error\[[a-z-]+\] (model\.name_or_path|peft\.target_modules): ", line)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize("what", ["device", "pipe", "deep"])
def test_model_folders_with_what_is_no_file_or_too_deep_are_refused(run_recipe, altered, name, what):
    folder = altered()
    (folder / name).unlink(missing_ok=True)
    if what == "device":
        (folder / name).symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    result, _ = run_recipe(model={"name_or_path": str(folder)}, peft=LORA)
    assert result.status == 1
    assert result.err.count("error[") == 1
    assert f"{name} is a device or a pipe, not a file" in result.err or what == "deep"


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("tokenizer_config.json", {"pad_token": "<pad>"}, "error[tokens-not-in-model] model.name_or_path: "),
        ("tokenizer_config.json", {"eos_token": "<nope>"}, "the eos token <nope> is token 600, the model has"),
        ("config.json", {"num_attention_heads": "3"}, "error[model-config] model.name_or_path: config.json: "),
        (
            "config.json",
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "config.json says that bitsandbytes has quantized the weights, and it has not",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_a_model_folder_whose_files_do_not_go_together_is_refused(run_recipe, altered, file, change, said, stage):
    folder = altered()
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    result, run = run_recipe(stage=stage, model={"name_or_path": str(folder)}, peft=LORA)
    assert (result.status, run) == (1, None)
    assert said in result.err


@pytest.mark.parametrize("peft", [LORA, None])
def test_flags_without_effect_of_a_published_generation_configuration_are_left_out(run_recipe, altered, peft):
    """Llama 2's has a temperature beside do_sample: false, which transformers refuses to save."""
    folder = altered()
    flags = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "repetition_penalty": 1.2}
    (folder / "generation_config.json").write_text(json.dumps(flags))
    result, run = run_recipe(model={"name_or_path": str(folder)}, peft=peft)
    assert result.status == 0, result.err
    saved = json.loads((run / ("adapter" if peft else "model") / "generation_config.json").read_text())
    assert saved["repetition_penalty"] == 1.2
    assert not {"temperature", "top_p"} & set(saved)


def test_a_base_from_which_nothing_can_be_learned_fails(run_recipe, altered):
    """As a download that was given its size and never filled."""

    def empty(tensors):
        for name in tensors:
            tensors[name].zero_()

    result, run = run_recipe(model={"name_or_path": str(altered(change=empty))}, peft=LORA)
    assert result.status == 1
    assert "error[nothing-learned] every gradient was 0: nothing was learned" in result.err
    assert status(run)["status"] == "failed"


def test_weights_that_were_published_quantized_are_named_as_they_are(run_recipe, tiny_phi3, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    published = AutoModelForCausalLM.from_pretrained(tiny_phi3, quantization_config=quantization)
    published.save_pretrained(tmp_path / "published")
    AutoTokenizer.from_pretrained(tiny_phi3).save_pretrained(tmp_path / "published")
    model = {"name_or_path": str(tmp_path / "published")}
    result, _ = run_recipe(model=model, peft=LORA)
    assert result.status == 0, result.err
    assert "(lora adapter on a base that was published as 4-bit bitsandbytes)" in result.out
    for other, key in (({"load_in_8bit": True}, "load_in_4bit"), ({"load_in_4bit": True}, "bnb_4bit_quant_type")):
        result, _ = run_recipe(model=model, peft=LORA, quantization=other)
        assert result.status == 1
        assert f"error[quantized-already] quantization.{key}: the weights are quantized already" in result.err


def test_names_of_new_weights_that_name_nothing_are_refused(run_recipe, tiny_phi3):
    for key, what in (("new_weights", "are missing"), ("unused_weights", "have no place in the model")):
        result, _ = run_recipe(model={"name_or_path": str(tiny_phi3), key: ["nothing"]}, peft=LORA)
        assert f"error[other-weights] model.{key}: 'nothing' names none of the tensors that {what}" in result.err


def test_an_attention_that_the_machine_does_not_have_is_told_at_its_key(run_recipe, monkeypatch):
    from recipe_runner.training import trainers

    monkeypatch.setattr(trainers, "build_trainer", lambda *_: pytest.fail("the weights were loaded"))
    for name in ("nope", "flash_attention_2"):
        result, _ = run_recipe(model={"attn_implementation": name}, peft=LORA)
        assert "error[model-config] model.attn_implementation: " in result.err


BROKEN_TEMPLATES = {
    "{% for m in messages %}{{ m.content }": "can't be read: line 1",
    "{{ messages|nosuch }}": "can't be read: line 1: No filter named 'nosuch'",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages + 1 }}": "TypeError",
    "{{ nothing.there }}": "UndefinedError: 'nothing' is undefined",
    "{{ messages[99].content }}": "UndefinedError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{% include 'x' %}": "TypeError",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "RecursionError",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "RecursionError",
    "{{ 'x' * 10 ** 12 }}": "MemoryError",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "it takes more than 0.5 seconds",
}


@pytest.mark.parametrize("template", BROKEN_TEMPLATES)
def test_templates_that_fail_are_one_line_that_says_how(run_recipe, tmp_path, template, monkeypatch):
    monkeypatch.setattr("recipe_runner.model.tokenizer.TEMPLATE_SECONDS", 0.5)
    (tmp_path / "own.jinja").write_text(template)
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 4
    training = {"chat_template_path": "own.jinja"}
    result, folder = run_recipe(rows=rows, dataset={"format": "chat"}, training=training, peft=LORA)
    assert (result.status, folder) == (1, None)
    assert "error[template-broken] training.chat_template_path: the chat template" in result.err
    assert BROKEN_TEMPLATES[template] in result.err
