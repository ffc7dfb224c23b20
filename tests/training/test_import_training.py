"""What is imported trains as it did: TRL's own trainers on TRL's configuration, and the recipe that it becomes."""

import pytest
import yaml
from shared import PAIRS, losses, metrics, write_rows

TURNS = [
    {
        "messages": [
            {"role": role, "content": text} for role, text in (("user", f"say {n}"), ("assistant", f"it is {n * n}"))
        ]
    }
    for n in range(24)
]
COMMON = {
    "learning_rate": "2e-3",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "logging_steps": 1,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.34,
    "weight_decay": 0.01,
    "report_to": "none",
    "bf16": False,
}
ADAPTER = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
CASES = {
    "sft": ({"max_length": 64}, TURNS),
    "sft_packed": ({"max_length": 48, "packing": True, "seed": 7, **ADAPTER}, TURNS),
    "sft_answers": ({"max_length": 64, "assistant_only_loss": True, **ADAPTER}, TURNS),
    "dpo": ({"max_length": 64, "beta": 0.3, **ADAPTER}, PAIRS),
}


def train_by_trl(values, folder):
    """Losses and learning rates of TRL's own trainer, by TRL's own parser of its configuration."""
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import (
        DPOConfig,
        DPOTrainer,
        ModelConfig,
        ScriptArguments,
        SFTConfig,
        SFTTrainer,
        TrlParser,
        get_peft_config,
    )

    config_class, trainer_class = (DPOConfig, DPOTrainer) if "beta" in values else (SFTConfig, SFTTrainer)
    file = folder / "theirs.yaml"
    ours = {key: value for key, value in values.items() if key != "warmup_ratio"}
    file.write_text(
        yaml.safe_dump(ours | {"warmup_steps": values["warmup_ratio"], "dtype": "float32", "use_cpu": True})
    )
    parser = TrlParser((ScriptArguments, config_class, ModelConfig))
    script, config, model = parser.parse_args_and_config(["--config", str(file)])
    config.disable_tqdm, config.save_strategy = True, "no"
    logged = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    config.model_init_kwargs = {"dtype": model.dtype}
    rows = load_dataset("json", data_files=script.dataset_name, split="train")
    trainer = trainer_class(
        model.model_name_or_path, args=config, train_dataset=rows, peft_config=get_peft_config(model), callbacks=[Log()]
    )
    trainer.train()
    steps = [entry for entry in logged if "loss" in entry]
    return [float(entry["loss"]) for entry in steps], [float(entry["learning_rate"]) for entry in steps]


@pytest.mark.parametrize("name", CASES)
def test_trl_s_configuration_and_its_recipe_train_the_same(run_cli, tiny_phi3, tmp_path, monkeypatch, name):
    more, rows = CASES[name]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    values = COMMON | more | {"model_name_or_path": str(tiny_phi3), "dataset_name": str(source)}
    values |= {"output_dir": str(tmp_path / "runs"), "dtype": "float32"}
    monkeypatch.chdir(tmp_path)
    wanted, rates = train_by_trl(values, tmp_path)
    (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(values))
    imported = run_cli("import", f"{name}.yml", "--from", "trl", "--output", "made.yaml")
    assert imported.status == 0, imported.err
    trained = run_cli("made.yaml")
    assert trained.status == 0, trained.err
    folder = max((tmp_path / "runs" / "made").iterdir())
    assert losses(folder) == pytest.approx(wanted, rel=1e-2)
    assert [entry["learning_rate"] for entry in metrics(folder) if "loss" in entry] == pytest.approx(rates, rel=1e-6)
