"""`recipe-run import`: other tools' files become recipes, and each of their keys is accounted for."""

import json
from pathlib import Path

import pytest
import yaml

from recipe_runner.importing.tools import NAMES, read_tool
from recipe_runner.recipe.resolve import load_recipe

AXOLOTL = {
    "base_model": "NousResearch/Llama-3.2-1B",
    "load_in_4bit": True,
    "datasets": [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}],
    "val_set_size": 0.1,
    "adapter": "qlora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "sequence_len": 4096,
    "sample_packing": True,
    "micro_batch_size": 2,
    "num_epochs": 2,
    "learning_rate": "2e-4",
    "bf16": "auto",
    "evals_per_epoch": 2,
    "flash_attention": True,
    "output_dir": "./outputs/out",
    "wandb_project": None,
    "not_a_key": 3,
}
FACTORY = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "dataset": "talks",
    "template": "qwen",
    "cutoff_len": 1024,
    "output_dir": "saves/x",
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "learning_rate": "1.0e-4",
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
}
INFO = {
    "talks": {"file_name": "talks.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}},
    "judged": {"file_name": "judged.json", "formatting": "sharegpt", "columns": {"messages": "m", "kto_tag": "l"}},
    "tasks": {"hf_hub_url": "someone/tasks"},
}
HANDBOOK = {
    "model_name_or_path": "someone/model",
    "model_revision": "main",
    "torch_dtype": "bfloat16",
    "dataset_mixture": {
        "datasets": [
            {"id": "someone/one", "config": "all", "split": "train", "columns": ["messages"], "weight": 1.0},
            {"id": "someone/two", "split": "train", "columns": ["messages"], "weight": 0.5},
        ],
        "test_split_size": 0.1,
    },
    "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "eval_strategy": "epoch",
    "learning_rate": 2.0e-05,
    "max_length": 2048,
    "packing": True,
    "gradient_accumulation_steps": 8,
    "push_to_hub": True,
    "report_to": ["wandb"],
    "warmup_ratio": 0.1,
}


@pytest.fixture
def convert(run_cli, tmp_path, monkeypatch):
    """Converts values; returns what was said, and the recipe."""
    monkeypatch.chdir(tmp_path)

    def convert(values, *arguments, name="config.yml"):
        text = values if isinstance(values, str) else yaml.safe_dump(values)
        (tmp_path / name).write_text(text)
        result = run_cli("import", name, "--output", "made.yaml", *arguments)
        made = tmp_path / "made.yaml"
        recipe = load_recipe(str(made)) if made.is_file() and result.status == 0 else None
        return result, recipe

    return convert


def test_axolotl_s_file_becomes_a_recipe_that_trains_the_same(convert, tmp_path):
    result, recipe = convert(AXOLOTL)
    assert result.status == 0, result.err
    assert recipe.stage.name == "sft"
    assert recipe.peft.said | {} == {
        "method": "lora", "r": 32, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear",
    }  # fmt: skip
    assert recipe.quantization["bnb_4bit_use_double_quant"] is True
    wanted = {
        "max_length": 4096, "packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "num_train_epochs": 2, "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.03,
        "weight_decay": 0.0, "optim": "adamw_torch_fused", "eval_strategy": "steps", "eval_steps": 0.25,
        "activation_checkpointing": False,
    }  # fmt: skip
    assert {key: recipe.training[key] for key in wanted} == wanted
    assert recipe.dataset.train_on == "completion"
    assert recipe.dataset.on_overlong == "drop"
    assert recipe.model.dtype == "bfloat16"
    assert recipe.model.attn_implementation == "flash_attention_2"
    text = (tmp_path / "made.yaml").read_text()
    assert "max_length: 4096" in text
    assert "# sequence_len" in text
    assert "# axolotl's default" in text
    assert "not_a_key" in result.out.partition("had no effect there")[2].partition("same by default")[0]
    assert "wandb_project" in result.out.partition("same by default")[2]


def test_every_key_is_told_once(convert):
    result, _ = convert(AXOLOTL)
    told = [line.split()[0] for line in result.out.splitlines() if line.startswith("  ") and line[2] != " "]
    assert sorted(told) == sorted([*AXOLOTL, *(f"datasets.{key}" for key in AXOLOTL["datasets"][0])])
    assert max(map(len, result.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("dataset", "form", "columns"),
    [
        ({"type": "chat_template", "field_messages": "talk"}, "chat", {"messages": "talk"}),
        ({"type": "sharegpt"}, "chat", {"messages": "conversations"}),
        ({"type": "completion", "field": "body"}, "text", {"text": "body"}),
        ({"type": "input_output"}, "segments", {"segments": "segments"}),
        (
            {"type": {"field_instruction": "q", "field_output": "a", "format": "Q: {instruction} A:"}},
            "instruction",
            {"instruction": "q", "output": "a"},
        ),
    ],
)
def test_axolotl_s_types_of_datasets(convert, dataset, form, columns):
    result, recipe = convert(AXOLOTL | {"datasets": [{"path": "someone/rows", **dataset}]})
    assert result.status == 0, result.err
    assert recipe.dataset.format == form
    assert {key: value for key, value in recipe.dataset.train[0].columns.items() if value} == columns
    if form == "chat":
        assert recipe.dataset.train_on == "assistant"


@pytest.mark.parametrize(
    ("dataset", "rl", "columns"),
    [
        ("chatml.intel", "dpo", {"system": "system", "prompt": "question", "chosen": "chosen", "rejected": "rejected"}),
        (
            {"field_prompt": "p", "field_chosen": "c", "field_rejected": "r"},
            "ipo",
            {"prompt": "p", "chosen": "c", "rejected": "r"},
        ),
        ("llama3.argilla", "kto", {"prompt": "instruction", "completion": "completion", "label": "label"}),
    ],
)
def test_axolotl_s_preferences(convert, dataset, rl, columns):
    values = {key: value for key, value in AXOLOTL.items() if key not in ("sample_packing", "load_in_4bit")}
    values |= {"rl": rl, "datasets": [{"path": "someone/pairs", "type": dataset}], "adapter": "lora", "rl_beta": 0.2}
    result, recipe = convert(values)
    assert result.status == 0, result.err
    assert recipe.stage.name == ("kto" if rl == "kto" else "dpo")
    assert recipe.training["beta"] == 0.2
    assert rl != "ipo" or recipe.training["loss_type"] == ["ipo"]
    assert {key: value for key, value in recipe.dataset.train[0].columns.items() if value} == columns


def test_axolotl_s_keys_of_datasets_are_told(convert):
    dataset = {
        "path": "someone/talks",
        "type": "chat_template",
        "split": "train",
        "roles_to_train": ["user", "assistant"],
        "train_on_eos": "turn",
        "train_on_eot": "all",
        "message_property_mappings": {"role": "from", "content": "value"},
        "field_tools": "functions",
        "conversion": "oops",
    }
    result, recipe = convert(AXOLOTL | {"datasets": [dataset]})
    assert result.status == 0, result.err
    kinds, kind = {}, ""
    for line in result.out.splitlines():
        kind = line if line[:1].strip() else kind
        if line.startswith("  datasets."):
            kinds[line.split()[0].removeprefix("datasets.")] = kind.partition(" (")[0]
    assert kinds == {
        **dict.fromkeys(("path", "type", "split", "roles_to_train", "field_tools"), "converted"),
        **dict.fromkeys(("train_on_eos", "message_property_mappings"), "same by default"),
        "train_on_eot": "no counterpart",
        "conversion": "had no effect there",
    }
    assert recipe.dataset.train_on == "all"
    assert recipe.dataset.train[0].columns["tools"] == "functions"


def test_steps_go_before_epochs(convert):
    result, recipe = convert(AXOLOTL | {"max_steps": 7})
    assert (recipe.training["max_steps"], "num_train_epochs" in recipe.training.said) == (7, False)
    assert "num_epochs" in result.out.partition("had no effect there")[2]


@pytest.mark.parametrize(
    ("name", "text", "learned"),
    [
        ("chatml", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n", "yes<|im_end|>"),
        ("phi_3", "<s><|user|>\nhi<|end|>\n<|assistant|>\nyes<|end|>\n", "yes<|end|>"),
        ("deepseek_v2", "<s><｜User｜>hi<｜Assistant｜>yes</s>", "yes</s>"),
    ],
)
def test_axolotl_s_own_templates_are_written(convert, tmp_path, name, text, learned):
    """As axolotl 0.18's files write them (utils/chat_templates/templates), and learned up to the end of the turn."""
    from transformers.utils.chat_template_utils import render_jinja_template

    result, recipe = convert(AXOLOTL | {"chat_template": name, "datasets": [{"path": "a/b", "type": "chat_template"}]})
    assert result.status == 0, result.err
    assert recipe.training["chat_template_path"] == str(tmp_path / "made.jinja")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (made,), ((span,),) = render_jinja_template(
        [talk],
        chat_template=(tmp_path / "made.jinja").read_text(),
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert (made, made[slice(*span)]) == (text, learned)


def test_a_template_is_not_written_where_the_stage_takes_none(convert, tmp_path):
    values = {key: value for key, value in AXOLOTL.items() if key not in ("sample_packing", "load_in_4bit")}
    values |= {"adapter": "lora", "rl": "dpo", "chat_template": "chatml"}
    result, _ = convert(values | {"datasets": [{"path": "a/b", "type": "chat_template.default"}]})
    assert result.status == 0, result.err
    assert not (tmp_path / "made.jinja").exists()
    assert "chat_template" in result.out.partition("no counterpart")[2]


def test_each_file_of_a_dataset_is_a_source(convert, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("")
    dataset = {"path": "json", "data_files": ["one.jsonl", "two.jsonl"], "type": "chat_template"}
    result, recipe = convert(AXOLOTL | {"datasets": [dataset]})
    assert result.status == 0, result.err
    assert [Path(source.source).name for source in recipe.dataset.train] == ["one.jsonl", "two.jsonl"]
    assert {source.columns["messages"] for source in recipe.dataset.train} == {"messages"}


@pytest.mark.parametrize(
    ("key", "value"), [("dataset", 3), ("lora_target", True), ("report_to", 1.5), ("lora_rank", [1])]
)
def test_values_of_another_kind_are_said(convert, tmp_path, key, value):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    result, _ = convert(FACTORY | {key: value})
    assert result.status == 1
    assert f"{key} is " in result.err


def test_llama_factory_s_file_with_its_datasets(convert, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "data" / "talks.json").write_text(json.dumps([{"conversations": turns}]))
    result, recipe = convert(FACTORY)
    assert result.status == 0, result.err
    assert recipe.peft.said == {
        "method": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear",
    }  # fmt: skip
    wanted = {"learning_rate": 1e-4, "warmup_steps": 0.1, "num_train_epochs": 3.0, "packing": False, "bf16": True}
    assert {key: recipe.training[key] for key in wanted} == wanted
    assert recipe.training["max_length"] == 1024
    template = (tmp_path / "made.jinja").read_text()
    assert "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." in template
    assert "{% generation %}" in template
    assert recipe.dataset.train_on == "assistant"
    assert recipe.dataset.train[0].columns["messages"] == "conversations"
    assert "overwrite_output_dir" in result.out.partition("had no effect there")[2]


@pytest.mark.parametrize(
    ("stage", "dataset", "form"),
    [("dpo", "pairs", "preference"), ("kto", "judged", "unpaired_preference"), ("sft", "tasks", "instruction")],
)
def test_llama_factory_s_layouts(convert, tmp_path, stage, dataset, form):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    for name in ("pairs", "judged"):
        (tmp_path / f"{name}.json").write_text("[]")
    result, recipe = convert(FACTORY | {"stage": stage, "dataset": dataset, "pref_beta": 0.3})
    assert result.status == 0, result.err
    assert recipe.dataset.format == form
    assert stage == "sft" or recipe.training["beta"] == 0.3
    assert stage != "kto" or recipe.training["per_device_train_batch_size"] == 2  # TRL refuses one


def test_the_handbook_s_file_and_its_template(convert, tmp_path):
    result, recipe = convert(HANDBOOK, name="config_sft.yaml")
    assert result.status == 0, result.err
    assert "(from handbook 1.16.0)" in result.out
    assert (tmp_path / "made.jinja").read_text() == HANDBOOK["chat_template"]
    assert [source.source for source in recipe.dataset.train] == ["someone/one", "someone/two"]
    assert [source.weight for source in recipe.dataset.train] == [1.0, 0.5]
    assert recipe.dataset.train_on == "all"
    assert recipe.training["gradient_accumulation_steps"] == 8
    assert "push_to_hub" in result.out.partition("no counterpart")[2]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, "DEEPSPEED"),
        ({"deepspeed": "ds_z2_offload_config.json"}, "DEEPSPEED"),
        ({"fsdp": ["full_shard"], "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}, "FSDP"),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": True, "state_dict_type": "FULL_STATE_DICT"}}, "FSDP"),
    ],
)
def test_sharding_becomes_a_launch_configuration(convert, tmp_path, run_cli, said, kind):
    result, _ = convert(AXOLOTL | {"load_in_4bit": False, "adapter": "lora"} | said)
    assert result.status == 0, result.err
    launch = yaml.safe_load((tmp_path / "made.accelerate.yaml").read_text())
    assert launch["distributed_type"] == kind
    if kind == "DEEPSPEED":
        assert launch["deepspeed_config"]["zero_stage"] == (3 if "zero3" in said["deepspeed"] else 2)
    checked = run_cli("validate", "made.yaml", "--accelerate-config", "made.accelerate.yaml")
    assert "error[" not in checked.err + checked.out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\n", "is of no tool that is known"),
        ("base_model: a/b\nmodel_name_or_path: a/b\ncutoff_len: 3\n", "has keys of two tools"),
        ("base_model: ${MODEL}\nmicro_batch_size: 1\n", "base_model holds a variable, ${MODEL}"),
        ("base_model: {{ model }}\nmicro_batch_size: 1\n", "before its variables are filled in"),
        ("base_model: {name: a}\nmicro_batch_size: 1\nsequence_len: 2\n", "base_model is a mapping"),
        ("base_model: a/b\nsequence_len: 2\n", "it names no datasets"),
        ("- 1\n- 2\n", "holds no keys with values"),
        ("a: [1\n", "is no YAML"),
        ("compute_environment: LOCAL_MACHINE\n", "is a launch configuration"),
        ("base_model: a/b\nrl: orpo\ndatasets: [{path: a/b}]\n", "rl: orpo can't be converted"),
        ("base_model: a/b\nnum_epochs: 1\ndatasets: [{path: a/b, type: jeopardy}]\n", "is a prompt written in Python"),
        ("base_model: a/b\nnum_epochs: 1\ndatasets: [{path: a/b, type: my.strategy}]\n", "a prompt written in Python"),
        ("base_model: a/b\nnum_epochs: many\ndatasets: [{path: a/b, type: alpaca}]\n", "num_epochs"),
        ("base_model: a/b\nnum_epochs: 1\ndatasets: 3\n", "datasets"),
        ("base_model: a/b\nnum_epochs: 1\ndatasets: [3]\n", "datasets"),
        ("base_model: a/b\nnum_epochs: 1\nspecial_tokens: 3\ndatasets: [{path: a/b}]\n", "special_tokens"),
        ("model_name_or_path: a/b\nfinetuning_type: lora\ndo_train: true\nlora_rank: x\ndataset: y\n", "lora_rank"),
    ],
)  # fmt: skip
def test_what_can_not_be_converted_is_said_in_a_line(convert, tmp_path, text, said):
    result, _ = convert(text)
    assert result.status == 1, result.out + result.err
    assert said in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "made.yaml").exists()


def test_a_binary_and_a_file_that_is_there_are_refused(run_cli, convert, tmp_path):
    (tmp_path / "image.yml").write_bytes(b"\x89PNG\r\n\0\0")
    assert "is no configuration, but a binary" in run_cli("import", tmp_path / "image.yml").err
    (tmp_path / "latin.yml").write_bytes("base_model: café".encode("latin-1"))
    assert "is no text in UTF-8" in run_cli("import", tmp_path / "latin.yml").err
    (tmp_path / "made.yaml").write_text("mine")
    result, _ = convert(AXOLOTL)
    assert "made.yaml: error[file-exists] the file is there already" in result.err
    assert (tmp_path / "made.yaml").read_text() == "mine"
    assert "no such file" in run_cli("import", tmp_path / "none.yml").err.lower()


def test_where_a_key_went_is_explained(run_cli):
    told = run_cli("explain", "axolotl.micro_batch_size").out
    assert "is training.per_device_train_batch_size here" in told
    assert "its default there: 1" in told
    assert "utils/schemas/training.py" in told
    assert "did you mean 'micro_batch_size'" in run_cli("explain", "axolotl.micro_batch_sise").err
    assert "had no effect there" in run_cli("explain", "llamafactory.overwrite_output_dir").out


@pytest.mark.parametrize("name", NAMES)
def test_each_entry_of_a_tool_s_file_is_whole(name):
    """One way to convert it, where it is from, and a path that a recipe can have."""
    from recipe_runner.recipe import schema
    from recipe_runner.stages import STAGES

    tool = read_tool(name)
    paths = {
        f"training.{key}" for stage in STAGES if stage != "pipeline" for key in schema.section_keys("training", stage)
    }
    paths |= {f"peft.{key}" for method in ("lora", "oft") for key in schema.section_keys("peft", method)}
    for section in ("model", "dataset", "run"):
        paths |= {f"{section}.{key}" for key in schema.resolve(f"#/$defs/{section}")["properties"]}
    paths |= {f"dataset.train.{key}" for key in schema.resolve("#/$defs/source")["properties"]}
    for key, entry in tool.keys.items():
        assert len(entry.keys() & {"to", "by", "ignored", "none", "same"}) == 1, key
        assert entry["at"], key
        assert "to" not in entry or entry["to"] in paths | {"unfreeze"}, (key, entry["to"])
    assert set(tool.marks) <= set(tool.keys) | {"rl", "special_tokens"}
