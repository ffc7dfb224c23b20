"""A saved result that differs from the trained model must be noticed."""

import pytest

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
