"""Bottleneck adapters: the papers' networks, at the places of the architectures, saved and loaded by PEFT."""

import subprocess
import sys

import pytest

CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "phi3": "Phi3Config",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gpt2": "GPT2Config",
    "opt": "OPTConfig",
    "bert": "BertConfig",
    "t5": "T5Config",
    "mixtral": "MixtralConfig",
}


def small(kind):
    import torch
    import transformers

    from recipe_runner.model.tiny import shrink_config

    torch.manual_seed(0)
    config = shrink_config(getattr(transformers, CONFIGS[kind])(), vocab_size=300)
    if kind == "bert":
        config.is_decoder = True
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


@pytest.mark.parametrize("placement", ["feed_forward", "both"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_block_of_an_architecture_gets_an_adapter_that_at_first_changes_nothing(kind, placement):
    import torch
    from peft import get_peft_model

    from recipe_runner.model.bottleneck import BottleneckConfig, BottleneckLayer

    base = small(kind)
    tokens = torch.arange(5, 25)[None]
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if kind == "t5" else {})
    blocks = {"feed_forward": 1, "both": 2}[placement] * 2  # two layers
    if kind == "t5":  # in the decoder attention stands twice
        blocks = {"feed_forward": 4, "both": 10}[placement]
    with torch.no_grad():
        before = base(**inputs).logits
        model = get_peft_model(base, BottleneckConfig(bottleneck_size=8, placement=placement)).eval()
        layers = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
        assert len(layers) == blocks
        assert torch.allclose(model(**inputs).logits, before, atol=1e-5)
        for layer in layers:
            torch.nn.init.normal_(layer.bottleneck_up["default"].weight)
        assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)
        with model.disable_adapter():
            assert torch.allclose(model(**inputs).logits, before, atol=1e-5)
    trained, _ = model.get_nb_trainable_parameters()
    hidden, size = layers[0].hidden, 8
    assert trained == blocks * (2 * size * hidden + hidden + size)  # arXiv 1902.00751, section 2.1


def test_a_bert_base_has_the_paper_s_number_of_parameters():
    """BERT-base: 12 layers of 768. Houlsby's adapters of size 64 on both blocks: 24 x (2 x 768 x 64 + 768 + 64)."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BertConfig

    from recipe_runner.model.bottleneck import BottleneckConfig

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(BertConfig(is_decoder=True))
        model = get_peft_model(base, BottleneckConfig(bottleneck_size=64, placement="both"))
    trained, total = model.get_nb_trainable_parameters()
    assert trained == 24 * (2 * 768 * 64 + 768 + 64) == 2_379_264
    assert trained / (total - trained) == pytest.approx(0.0217, abs=1e-4)


def test_a_bottleneck_has_one_size_and_a_sixteenth_by_default():
    from recipe_runner.model.bottleneck import BottleneckConfig

    assert BottleneckConfig().size_for(768) == 48
    assert BottleneckConfig(reduction_factor=2).size_for(64) == 32
    assert BottleneckConfig(bottleneck_size=5).size_for(64) == 5
    assert BottleneckConfig().size_for(8) == 1
    with pytest.raises(ValueError, match="give one of them"):
        BottleneckConfig(bottleneck_size=5, reduction_factor=2)


def test_merging_is_refused_with_the_reason():
    from peft import get_peft_model

    from recipe_runner.model.bottleneck import BottleneckConfig

    model = get_peft_model(small("llama"), BottleneckConfig())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="no change of the base's weights does the same"):
            merge()


def test_bottleneck_is_known_to_peft():
    """By plain strings in its mappings: `register_peft_method` takes members of a closed enum only."""
    from peft.utils import PeftType, register_peft_method

    from recipe_runner.model.bottleneck import BOTTLENECK, BottleneckConfig, BottleneckModel

    assert BOTTLENECK not in list(PeftType)
    with pytest.raises((KeyError, ValueError, AttributeError)):
        register_peft_method(name="bottleneck2", config_cls=BottleneckConfig, model_cls=BottleneckModel)


LOADS = """
import sys, torch
{imports}
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
print(model(input_ids=torch.arange(5, 25)[None]).logits[0, -1, :5].tolist())
"""


def test_another_program_loads_it_as_the_card_says(run_recipe):
    import torch

    from recipe_runner.model.load import load_result

    training = {"learning_rate": 1e-2}
    result, run = run_recipe(peft={"method": "bottleneck", "bottleneck_size": 8}, training=training)
    assert result.status == 0, result.err
    card = (run / "README.md").read_text()
    assert "loads only where recipe_runner is installed" in card
    assert "import recipe_runner.model.bottleneck" in card
    folder, answers = str(run / "adapter"), []
    for imports in ("", "import recipe_runner.model.bottleneck"):
        command = [sys.executable, "-c", LOADS.format(imports=imports), folder]
        answers.append(subprocess.run(command, capture_output=True, text=True))
    assert answers[0].returncode != 0
    model, _ = load_result(run)
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(5, 25)[None]).logits[0, -1, :5].tolist()
    assert str(wanted) == answers[1].stdout.strip(), answers[1].stderr


def test_an_unknown_architecture_needs_targets_and_is_told_which(run_recipe, tokenizer, tmp_path):
    from transformers import GPTNeoXConfig

    from recipe_runner.model.tiny import write_tiny

    folder = write_tiny(GPTNeoXConfig(), tokenizer, tmp_path / "neox")
    model = {"name_or_path": str(folder)}
    result, _ = run_recipe(model=model, peft={"method": "bottleneck"})
    assert result.status == 1
    assert "add 'target_modules: [dense_4h_to_h]'" in result.err
    result, _ = run_recipe(model=model, peft={"method": "bottleneck", "target_modules": ["dense_4h_to_h"]})
    assert result.status == 0, result.err
