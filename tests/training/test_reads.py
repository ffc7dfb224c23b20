"""How often the host waits for a tensor's value while a model trains: on a GPU each time is a stop."""

import pytest
import torch
from shared import LORA
from torch.utils._python_dispatch import TorchDispatchMode

STEPS, ACCUMULATED = 3, 4


class Reads(TorchDispatchMode):
    """Counts `.item()`, `bool()`, `float()` and the like, and `.tolist()`, while it is entered."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """Counts the reads of every training loop of the test; how many there were in each."""
    from transformers import Trainer

    found, loop, tolist = [], Trainer._inner_training_loop, torch.Tensor.tolist
    running = []

    def counted(self, *args, **kwargs):
        with Reads() as counter:
            found.append(counter)
            running.append(counter)
            done = loop(self, *args, **kwargs)
        running.clear()
        return done

    def listed(tensor):
        for counter in running:
            counter.count += 1
        return tolist(tensor)

    monkeypatch.setattr(Trainer, "_inner_training_loop", counted)
    monkeypatch.setattr(torch.Tensor, "tolist", listed)
    return found


@pytest.mark.parametrize("way", ["sft", "packed", "dpo"])
def test_at_most_one_read_a_step_more_than_trl_alone(run_recipe, reads, tiny_phi3, tmp_path, way):
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    settings = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": ACCUMULATED,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,  # ours logs the first and the last step anyway
        "save_strategy": "no",
        "use_cpu": True,
    }
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pair = {"prompt": talk[:1], "chosen": talk[1:], "rejected": [talk[1] | {"content": "c"}]}
    row, dataset, stage = {"messages": talk}, {"format": "chat", "train_on": "completion"}, "sft"
    if way == "packed":
        settings |= {"packing": True, "max_length": 16}
    if way == "dpo":
        stage = "dpo"
        row, dataset = pair, {"format": "preference"}
    run = {"output_dir": str(tmp_path / "runs"), "longest_batch_first": False}
    result, _ = run_recipe(stage=stage, rows=[row] * 40, dataset=dataset, training=settings, peft=LORA, run=run)
    assert result.status == 0, result.err
    rows = Dataset.from_list([pair if stage == "dpo" else {"prompt": talk[:1], "completion": talk[1:]}] * 40)
    config, trainer = {"sft": (trl.SFTConfig, trl.SFTTrainer), "dpo": (trl.DPOConfig, trl.DPOTrainer)}[stage]
    arguments = config(str(tmp_path / "plain"), bf16=False, report_to="none", **settings)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    trainer(str(tiny_phi3), args=arguments, train_dataset=rows, peft_config=lora).train()
    ours, plain = (counter.count for counter in reads)
    assert plain >= STEPS * ACCUMULATED, "TRL's own reads are counted"
    assert ours <= plain + STEPS, (ours, plain)
    print(f"reads in {STEPS} steps of {ACCUMULATED} batches: ours {ours}, TRL alone {plain}")
