"""The longest batch, before the first step: it leaves no trace, and says which row is too long."""

import json
import re

import pytest
from shared import LORA, metrics

TIMES = ("time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime")
TIMES += ("eval_samples_per_second", "eval_steps_per_second", "total_flos")
CHATS = [
    {"messages": [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": "one " * n}]}
    for n in (3, 30, 7, 12, 5, 22, 9, 4)
]
PAIRS = [{"prompt": f"say {n}", "chosen": f"it is {n} " * n, "rejected": "no idea"} for n in range(1, 9)]
JUDGED = [{"prompt": f"say {n}", "completion": f"it is {n} " * n, "label": bool(n % 2)} for n in range(1, 9)]
DROPOUT = LORA | {"lora_dropout": 0.3}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
WAYS = {
    "sft": {"rows": CHATS, "dataset": {"format": "chat", "eval": {"fraction": 0.25}}, "training": EVALUATED},
    "packed": {"rows": CHATS, "dataset": {"format": "chat"}, "training": {"packing": True, "max_length": 64}},
    "grouped": {
        "rows": CHATS,
        "dataset": {"format": "chat"},
        "training": {"train_sampling_strategy": "group_by_length"},
    },
    "dpo": {"stage": "dpo", "rows": PAIRS, "dataset": {"eval": {"fraction": 0.25}}, "training": EVALUATED},
    "kto": {"stage": "kto", "rows": JUDGED},
}


def logged(folder):
    """What was logged, but for times."""
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in metrics(folder)]


@pytest.mark.parametrize("name", WAYS)
def test_it_leaves_no_trace(run_recipe, tmp_path, name):
    """Dropout draws random numbers, and two batches make a step: the weights are the same to the last bit."""
    found = []
    for first in (True, False):
        options = {**WAYS[name], "peft": DROPOUT}
        options["training"] = options.get("training", {}) | {"gradient_accumulation_steps": 2}
        run = {"output_dir": str(tmp_path / "runs"), "longest_batch_first": first}
        result, folder = run_recipe(**options, run=run, name=f"{name}_{first}".lower())
        assert result.status == 0, result.err
        assert (" of up to " in result.out and "tried in" in result.out) == first
        weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        found.append((weights, logged(folder)))
    assert found[0] == found[1]
    assert sum("loss" in entry for entry in found[0][1]) == 4


@pytest.mark.parametrize("split", ["train", "eval"])
def test_memory_that_is_short_is_said_before_the_first_step(run_recipe, monkeypatch, tmp_path, split):
    """As on a GPU that holds batches of up to 40 tokens; the longest row is the second of its file."""
    import torch
    from trl import SFTTrainer

    forward = SFTTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if inputs["input_ids"].shape[1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", compute_loss)
    short, long = [CHATS[0], CHATS[4], CHATS[7]] * 4, [CHATS[0], CHATS[1]]
    (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in (long if split == "eval" else short)))
    result, folder = run_recipe(
        rows=long * 4 if split == "train" else short,
        dataset={"format": "chat", "eval": {"source": "eval.jsonl"}},
        training={"eval_strategy": "steps", "per_device_eval_batch_size": 2},
    )
    assert result.status == 1
    source = "rows.jsonl" if split == "train" else "eval.jsonl"
    assert re.search(rf"error\[out-of-memory\] the longest {split} batch, 2 rows of up to \d\d tokens ", result.err), (
        result.err
    )
    assert f"({source} row 2), does not fit: CUDA out of memory" in result.err
    assert "lower per_device_train_batch_size" in result.err
    assert not (folder / "metrics.jsonl").exists(), "no step was taken"


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor"])
def test_what_an_optimizer_will_take_is_what_it_takes(optimizer):
    """Its two moments; bitsandbytes keeps a scale of 4 bytes for 256 numbers beside them."""
    import torch
    from transformers import Trainer, TrainingArguments

    from recipe_runner.training.longest import state_bytes

    module = torch.nn.Linear(256, 256, bias=False)
    arguments = TrainingArguments(optim=optimizer, use_cpu=True, report_to="none")
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    made = cls(module.parameters(), **options)
    module(torch.ones(1, 256)).sum().backward()
    made.step()
    tensors = [value for value in made.state[module.weight].values() if torch.is_tensor(value) and value.ndim == 2]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    expected = state_bytes(optimizer, module.parameters())
    assert expected == {"adamw_torch": taken, "adamw_8bit": taken, "paged_adamw_8bit": 0, "adafactor": 0}[optimizer]
    assert taken == {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0}[optimizer] * 256**2
