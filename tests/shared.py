"""What tests share: adapters and quantizations to train with, rows of every format, and how a run folder is read."""

import json
import shutil

from recipe_runner.files import write_status

LORA = {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}
INT8 = {"load_in_8bit": True}

TEXT = [{"text": f"document number {n} about nothing much"} for n in range(40)]
CHAT = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
    for n in range(12)
]
SHAREGPT = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 12
PAIRS = [{"prompt": f"say {n}", "chosen": f"it is {n}", "rejected": "no idea, ask again"} for n in range(12)]
JUDGED = [
    {"prompt": f"say {n}", "completion": f"it is {n}" if n % 2 else "no idea", "label": n % 2 == 1} for n in range(12)
]
PROMPTS = [{"prompt": f"say {n}", "wanted": f"it is {n}"} for n in range(12)]
# Rewards in which answers of random weights differ.
VARIED = [{"name": "repetition_penalty", "ngram_size": 1}]
# Stage -> a format and rows for it; sft trains on the shipped tickets when it is given no rows.
SAMPLES = {
    "pretrain": ("text", TEXT),
    "sft": (None, None),
    "dpo": ("preference", PAIRS),
    "kto": ("unpaired_preference", JUDGED),
    "reward": ("preference", PAIRS),
    "rloo": ("prompt", PROMPTS),
    "grpo": ("prompt", PROMPTS),
    "distillation": ("prompt", PROMPTS),
}
# What stages in which the model answers need beside what others do: short answers, whole groups of them.
GENERATING = {"max_completion_length": 12, "per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 3}


def break_off(whole, step):
    """A copy of a completed run, newer than it, as one that failed after the checkpoint of a step."""
    broken = whole.with_name("99999999-000000-aaaa")
    shutil.copytree(whole, broken)
    later = [path for path in (broken / "checkpoints").glob("checkpoint-*") if int(path.name.split("-")[1]) > step]
    for path in [*later, *(broken / name for name in ("adapter", "model") if (broken / name).exists())]:
        shutil.rmtree(path)
    (broken / "status.json").write_text('{"status": "failed"}')
    return broken


# Launch configurations, and overrides of a recipe that suit some of them.
DEEPSPEED = {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": {"zero_stage": 2}}
ZERO3 = DEEPSPEED | {"deepspeed_config": {"zero_stage": 3, "zero3_save_16bit_model": True}}
FSDP = {
    "distributed_type": "FSDP",
    "num_processes": 2,
    "fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "FULL_STATE_DICT"},
}
IN_8BIT = ("quantization={load_in_8bit: true}",)
UNQUANTIZED = ("quantization=null",)


MODEL_SIZES = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def with_section(base, section, **keys):
    return base | {section: base[section] | keys}


def write_rows(file, rows):
    """Writes a jsonl file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def metrics(folder):
    """All lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """The training loss of every step."""
    return [entry["loss"] for entry in metrics(folder) if "loss" in entry]


def status(folder):
    """What status.json says."""
    return json.loads((folder / "status.json").read_text())


def cut_back(folder, step, last):
    """Makes of a completed run of an adapter one that was stopped after a step; `last` is its last checkpoint's."""
    shutil.rmtree(folder / "checkpoints" / f"checkpoint-{last}")
    shutil.rmtree(folder / "adapter")
    write_status(folder, "interrupted", step=step)


def build_model(kind, **more):
    """A tiny model of an architecture, with weights large enough that context matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **MODEL_SIZES, **more), attn_implementation="sdpa"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model
