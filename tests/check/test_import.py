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


def read_report(text):
    """Key -> what became of it, as the report says."""
    found, kind = {}, ""
    for line in text.splitlines():
        if line[:1].strip():
            kind = line.partition(" (")[0]
        elif line[2:3].strip():
            found[line.split()[0]] = kind
    return found


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
        ("chatml.intel", "dpo", {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}),
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
    told = read_report(result.out)
    assert {key.partition(".")[2]: kind for key, kind in told.items() if key.startswith("datasets.")} == {
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
    assert "(from handbook 0.4.0.dev0)" in result.out
    assert (tmp_path / "made.jinja").read_text() == HANDBOOK["chat_template"]
    assert [source.source for source in recipe.dataset.train] == ["someone/one", "someone/two"]
    assert [source.epochs for source in recipe.dataset.train] == [None, 0.5]
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
        ("base_model: {name: a}\nmicro_batch_size: 1\nsequence_len: 2\n", "no name of a model; name the model"),
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


TRL = {
    "model_name_or_path": "someone/model",
    "dataset_name": "someone/talks",
    "learning_rate": "2e-5",
    "use_peft": True,
}


@pytest.mark.parametrize(
    ("name", "more", "stage"),
    [
        ("support_bot", {}, "sft"),
        ("endpoint", {}, "sft"),
        ("corporate", {}, "sft"),
        ("sft_before_dpo", {}, "sft"),
        ("dpo/config_full", {}, "dpo"),
        ("run", {"beta": 0.2}, "dpo"),
        ("run", {"desirable_weight": 1.5, "per_device_train_batch_size": 2}, "kto"),
        ("dpo_lab", {"assistant_only_loss": True}, "sft"),
        ("config_cpt", {}, "pretrain"),
    ],
)
def test_trl_s_stage_is_told_by_keys_and_by_words_of_the_name(convert, tmp_path, name, more, stage):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    result, recipe = convert(TRL | more, name=f"{name}.yaml")
    assert result.status == 0, result.err
    assert recipe.stage.name == stage
    assert f"stage: {stage}" in result.out


def test_the_handbook_s_weights_are_shares_of_each_dataset_s_own_rows(convert):
    mixture = {"datasets": [{"id": "a/one", "weight": 0.5, "columns": ["messages"]}, {"id": "a/two", "weight": 1.0}]}
    values = {key: value for key, value in TRL.items() if key != "dataset_name"}
    result, recipe = convert(
        values | {"dataset_mixture": mixture | {"test_split_size": 1000}, "eval_strategy": "epoch"}
    )
    assert result.status == 0, result.err
    assert [(source.weight, source.epochs) for source in recipe.dataset.train] == [(None, 0.5), (None, None)]
    assert recipe.dataset.fraction == 0.01
    result, recipe = convert(
        values
        | {"dataset_mixer": {"a/one": 0.5, "a/two": 1.0}, "dataset_splits": ["train_sft", "test_sft"]}
        | {"eval_strategy": "epoch"},
        "--force",
    )
    assert [(source.split, source.epochs) for source in recipe.dataset.train] == [
        ("train_sft", 0.5),
        ("train_sft", None),
    ]
    assert [source.split for source in recipe.dataset.eval] == ["test_sft", "test_sft"]


def test_a_number_of_held_out_rows_is_a_split(convert):
    mixture = {"datasets": [{"id": "a/one"}], "test_split_size": 500}
    values = {key: value for key, value in TRL.items() if key != "dataset_name"} | {"dataset_mixture": mixture}
    result, recipe = convert(values | {"eval_strategy": "epoch"})
    assert result.status == 0, result.err
    assert (recipe.dataset.train[0].split, recipe.dataset.eval[0].split) == ("train[500:]", "train[:500]")


def test_trl_s_own_mixture_and_its_default_of_weights(convert):
    values = {key: value for key, value in TRL.items() if key != "dataset_name"}
    result, recipe = convert(
        values | {"datasets": [{"path": "a/one", "fraction": 0.3}, {"path": "a/two", "fraction": 0.7}]}
    )
    assert result.status == 0, result.err
    assert [source.weight for source in recipe.dataset.train] == [0.3, 0.7]
    assert recipe.model.dtype == "float32"
    assert "the layout is a guess" in " ".join(result.out.split())


def test_texts_stay_texts_and_numbers_become_numbers(convert):
    result, recipe = convert(TRL | {"model_revision": "0012345", "max_steps": "100", "lora_r": "16", "seed": "7"})
    assert result.status == 0, result.err
    assert (recipe.model.revision, recipe.training["max_steps"], recipe.peft["r"], recipe.run.seed) == (
        "0012345",
        100,
        16,
        7,
    )


def test_every_field_of_axolotl_s_configuration_is_known(convert):
    """Fields that do something there are not said to do nothing."""
    more = {"qat": {"x": 1}, "use_eaft": True, "model_config": {"output_router_logits": True}, "relora": True}
    result, recipe = convert(AXOLOTL | more | {"lora_rank_pattern": {"q_proj": 4}, "dataloader_num_workers": 2})
    assert result.status == 0, result.err
    told = read_report(result.out)
    assert {told[key] for key in more} == {"no counterpart"}
    assert (recipe.peft["rank_pattern"], recipe.training["dataloader_num_workers"]) == ({"q_proj": 4}, 2)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("num_labels", 1, "same by default"),
        ("num_labels", 3, "no counterpart"),
        ("shuffle_merged_datasets", True, "same by default"),
        ("shuffle_merged_datasets", False, "no counterpart"),
        ("batch_size", 32, "had no effect there"),
    ],
)
def test_what_holds_by_default_holds_with_its_value(convert, key, value, kind):
    result, _ = convert(AXOLOTL | {key: value})
    assert read_report(result.out)[key] == kind


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("alpaca:chat", "USER: {instruction}\nASSISTANT:{output}"),
        ("alpaca_instruct.load_no_prompt", "### Instruction:\n{instruction}\n\n### Response:\n{output}"),
    ],
)
def test_axolotl_s_styles_of_alpaca(convert, style, text):
    result, recipe = convert(AXOLOTL | {"datasets": [{"path": "a/b", "type": style}]})
    assert result.status == 0, result.err
    without = recipe.dataset.template["without_input"]
    assert without.endswith(text)
    assert (without == text) == style.endswith("no_prompt")


def test_turns_of_all_roles_are_learned_with_their_inputs(convert):
    result, recipe = convert(
        AXOLOTL | {"train_on_inputs": True, "datasets": [{"path": "a/b", "type": "chat_template"}]}
    )
    assert result.status == 0, result.err
    assert recipe.dataset.train_on == "all"


def test_beta_under_trl_goes_before_rl_beta(convert):
    values = {key: value for key, value in AXOLOTL.items() if key not in ("sample_packing", "load_in_4bit")}
    values |= {"rl": "dpo", "adapter": "lora", "trl": {"beta": 0.5}, "rl_beta": 0.2}
    result, recipe = convert(values | {"datasets": [{"path": "a/b", "type": "chatml.intel"}]})
    assert result.status == 0, result.err
    assert recipe.training["beta"] == 0.5
    assert "rl_beta" in result.out.partition("had no effect there")[2]


@pytest.mark.parametrize(
    ("said", "file", "section"),
    [
        ("ds.json", {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, (3, "cpu")),
        ("ds.json", {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, (2, None)),
        ("ds_z0_config.json", None, (0, None)),
        ({"zero_optimization": {"stage": 1}}, None, (1, None)),
    ],
)
def test_deepspeed_s_file_is_read(convert, tmp_path, said, file, section):
    if file:
        (tmp_path / said).write_text(json.dumps(file))
    values = AXOLOTL | {"load_in_4bit": False, "adapter": "lora", "bf16": False, "fp16": True}
    result, _ = convert(values | {"deepspeed": said})
    assert result.status == 0, result.err
    launch = yaml.safe_load((tmp_path / "made.accelerate.yaml").read_text())
    found = launch["deepspeed_config"]
    assert (found["zero_stage"], found.get("offload_param_device")) == section
    assert "offload_optimizer_device" not in found
    assert launch["mixed_precision"] == "fp16"


def test_each_key_of_fsdp_is_said(convert, tmp_path):
    said = {
        "reshard_after_forward": False,
        "state_dict_type": "SHARDED_STATE_DICT",
        "sharding_strategy": "HYBRID_SHARD",
    }
    values = AXOLOTL | {"load_in_4bit": False, "adapter": "lora", "fsdp_version": 1}
    result, _ = convert(values | {"fsdp_config": said | {"auto_wrap_policy": "SIZE_BASED_WRAP"}})
    assert result.status == 0, result.err
    none = result.out.partition("no counterpart")[2]
    assert "fsdp_config.state_dict_type" in none
    assert "fsdp_config.sharding_strategy" in none
    options = yaml.safe_load((tmp_path / "made.accelerate.yaml").read_text())["fsdp_config"]
    assert (options["fsdp_reshard_after_forward"], options["fsdp_auto_wrap_policy"]) == (False, "SIZE_BASED_WRAP")


def test_llama_factory_s_columns_are_those_that_it_reads(convert, tmp_path):
    info = {
        "pairs": {"file_name": "p.json", "ranking": True, "columns": {"prompt": "q", "query": "x", "system": "s"}},
        "decoy": {"file_name": "p.json", "num_samples": 5, "columns": {"prompt": "prompt", "response": "output"}},
        "past": {"file_name": "p.json", "columns": {"prompt": "q", "response": "a", "history": "h"}},
    }
    info["pairs"]["columns"] |= {"chosen": "good", "rejected": "bad"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "p.json").write_text("[]")
    _, recipe = convert(FACTORY | {"stage": "dpo", "dataset": "pairs"})
    columns = recipe.dataset.train[0].columns
    assert [columns[role] for role in ("prompt", "input", "system", "history")] == ["q", "x", "s", None]
    assert recipe.dataset.input_separator == "\n"
    _, recipe = convert(FACTORY | {"dataset": "decoy"}, "--force")
    assert (recipe.dataset.train[0].columns["input"], recipe.dataset.train[0].limit) == (None, 5)
    _, recipe = convert(FACTORY | {"dataset": "past"}, "--force")
    assert recipe.dataset.train_on == "assistant"
    result, _ = convert(FACTORY | {"dataset": "past", "freeze_vision_tower": False}, "--force")
    assert "freeze_vision_tower" in result.out.partition("no counterpart")[2].partition("same by default")[0]


def test_tags_that_turns_are_not_read_by_are_refused(convert, tmp_path):
    info = {"odd": {"file_name": "p.json", "formatting": "sharegpt", "tags": {"role_tag": "speaker"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    result, _ = convert(FACTORY | {"dataset": "odd"})
    assert result.status == 1
    assert "role_tag is speaker" in result.err


def test_paths_are_seen_from_the_recipe_s_folder(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("rows", "made"):
        (tmp_path / folder).mkdir()
    (tmp_path / "rows" / "t.jsonl").write_text(json.dumps({"messages": []}))
    dataset = {"path": "rows/t.jsonl", "type": "chat_template"}
    (tmp_path / "made.yaml").write_text(yaml.safe_dump(AXOLOTL | {"datasets": [dataset]}))
    result = run_cli("import", "made.yaml", "--output", "made/recipe.yaml")
    assert result.status == 0, result.err
    assert "source: ../rows/t.jsonl" in (tmp_path / "made" / "recipe.yaml").read_text()
    assert run_cli("import", "made.yaml").status == 0  # which is the file itself
    assert (tmp_path / "made_recipe.yaml").is_file()
    again = run_cli("import", "made.yaml")
    assert again.status == 1
    assert "--force" in again.err
    assert run_cli("import", "made.yaml", "--force").status == 0


def test_a_prompt_in_python_is_named_with_the_columns_of_its_rows(convert, tmp_path):
    (tmp_path / "odd.jsonl").write_text(json.dumps({"clue": "a", "reply": "b"}))
    result, _ = convert(AXOLOTL | {"datasets": [{"path": str(tmp_path / "odd.jsonl"), "type": "jeopardy"}]})
    assert "its rows have the columns clue, reply" in result.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: &x [*x]\nmicro_batch_size: 1\n", "a value that is within itself"),
        ("base_model: a/b\nmicro_batch_size: 1\nmicro_batch_size: 2\n", "micro_batch_size (line 3) is there twice"),
        ("base_model: a/b\nmicro_batch_size: 1\ndatasets: [{path: a/b}]\nmax_steps: many\n", "max_steps is many, no n"),
        (
            "base_model: a/b\nmicro_batch_size: 1\ndatasets: [{path: a/b}]\ndeepspeed: {zero_optimization: true}\n",
            "no stage",
        ),
        ("model_name_or_path: a/b\nlearning_rate: 1\ndataset_mixer: 3\n", "no mapping of names to shares"),
    ],
)
def test_values_of_a_wrong_kind_are_one_line(run_cli, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yml").write_text(text)
    result = run_cli("import", "config.yml", "--output", "made.yaml")
    assert result.status == 1
    assert said in result.err
    assert len(result.err.splitlines()) == 1


def test_texts_of_completion_are_cut_into_pieces(convert):
    values = {key: value for key, value in AXOLOTL.items() if key not in ("sample_packing", "eval_steps")}
    result, recipe = convert(values | {"datasets": [{"path": "a/b", "type": "completion"}]})
    assert result.status == 0, result.err
    assert (recipe.training["packing"], recipe.training["packing_strategy"]) == (True, "bfd_split")


def test_columns_that_a_layout_does_not_read_are_left_out(convert):
    kind = {"field_instruction": "q", "field_output": "a", "format": "Q: {instruction} A:", "field_system": "s"}
    result, recipe = convert(AXOLOTL | {"datasets": [{"path": "a/b", "type": kind}]})
    assert result.status == 0, result.err
    columns = recipe.dataset.train[0].columns
    assert {role: columns[role] for role in ("input", "system", "history")} == dict.fromkeys(
        ("input", "system", "history")
    )
    assert read_report(result.out)["datasets.type.field_system"] == "no counterpart"


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ({"max_steps": 25, "warmup_ratio": 0.1}, 2),
        ({"max_steps": 50}, 2),  # one, which becomes two
        ({"max_steps": 10000}, 100),
        ({"warmup_steps": 1}, 2),
        ({"warmup_ratio": 0.1}, 0.1),
    ],
)
def test_axolotl_counts_the_steps_of_its_warm_up_itself(convert, values, steps):
    """Source: core/builders/base.py, _configure_warmup_and_logging."""
    result, recipe = convert(AXOLOTL | values)
    assert result.status == 0, result.err
    assert recipe.training["warmup_steps"] == steps


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("default_system_message", "Be brief.", "had no effect there"),
        ("dpo_label_smoothing", 0.1, "no counterpart"),
        ("lora_target_modules", ["embed_tokens"], "no counterpart"),
        ("chat_template", "tokenizer_default_fallback_chatml", "no counterpart"),
        ("pretrain_multipack_attn", False, "no counterpart"),
    ],
)
def test_what_the_report_says_of_keys_of_axolotl(convert, key, value, kind):
    result, _ = convert(AXOLOTL | {key: value, "datasets": [{"path": "a/b", "type": "chat_template"}]})
    assert read_report(result.out)[key] == kind


def test_special_tokens_that_are_more_are_added(convert):
    values = AXOLOTL | {"special_tokens": {"additional_special_tokens": ["<|tool|>"]}}
    result, recipe = convert(values)
    assert result.status == 0, result.err
    assert read_report(result.out)["special_tokens.additional_special_tokens"] == "no counterpart"
    assert not recipe.model.add_special_tokens
    result, recipe = convert(values | {"lora_modules_to_save": ["embed_tokens", "lm_head"]}, "--force")
    assert result.status == 0, result.err
    assert list(recipe.model.add_special_tokens) == ["<|tool|>"]


def test_llama_factory_s_templates_end_the_last_answer(convert, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"talks": {"hf_hub_url": "a/b", "formatting": "sharegpt"}}))
    result, _ = convert(FACTORY | {"template": "solar"})
    assert result.status == 0, result.err
    template = (tmp_path / "made.jinja").read_text()
    assert "{%- if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}" in template
    assert "train_on: last" in " ".join(result.out.split())


def test_llama_factory_s_pre_training_is_one_text(convert, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"texts": {"hf_hub_url": "someone/texts"}}))
    result, recipe = convert(FACTORY | {"stage": "pt", "dataset": "texts"})
    assert result.status == 0, result.err
    assert (recipe.training["packing"], recipe.training["packing_strategy"]) == (True, "wrapped")
    assert recipe.dataset.train[0].columns == {"text": "instruction"}


def test_prompts_and_completions_of_trl(convert):
    values = {key: value for key, value in TRL.items() if key != "dataset_name"}
    result, recipe = convert(values | {"datasets": [{"path": "a/b", "columns": ["prompt", "completion"]}]})
    assert result.status == 0, result.err
    dataset = recipe.dataset
    assert (dataset.format, dataset.train_on, dataset.template) == (
        "instruction",
        "completion",
        "{instruction}{output}",
    )
    assert (dataset.train[0].columns["instruction"], dataset.train[0].columns["output"]) == ("prompt", "completion")


def test_llama_factory_s_instructions_and_conversations_are_mixed(convert, tmp_path):
    info = {"talks": {"hf_hub_url": "a/talks", "formatting": "sharegpt"}, "tasks": {"hf_hub_url": "a/tasks"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    result, recipe = convert(FACTORY | {"dataset": "tasks,talks"})
    assert result.status == 0, result.err
    assert recipe.dataset.format == "chat"
    assert [source.format for source in recipe.dataset.train] == ["instruction", None]
    assert recipe.dataset.train[0].columns["output"] == "output"


@pytest.mark.parametrize("name", [".", "./", "rows", "no/such/*.json"])
def test_any_path_is_placed(convert, tmp_path, name):
    (tmp_path / "rows").mkdir()
    result, _ = convert(AXOLOTL | {"datasets": [{"path": name, "type": "chat_template"}]})
    assert result.status in (0, 1)
    assert "error[bug]" not in result.err


def test_files_of_a_folder_are_files(convert, tmp_path):
    (tmp_path / "dd").mkdir()
    (tmp_path / "dd" / "train.jsonl").write_text(json.dumps({"messages": []}))
    for files in (["train.jsonl"], ["dd/train.jsonl"]):
        dataset = {"path": "dd", "data_files": files, "type": "chat_template"}
        result, recipe = convert(AXOLOTL | {"datasets": [dataset]}, "--force")
        assert result.status == 0, result.err
        assert Path(recipe.dataset.train[0].source) == tmp_path / "dd" / "train.jsonl"


def test_a_prompt_without_an_input_is_written_by_the_format_for_such_rows(convert, tmp_path):
    """Source: axolotl's prompt_strategies/user_defined.py, whose no_input_format is '{instruction} '."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b", "system": "c"}))
    dataset = {"path": str(tmp_path / "rows.jsonl"), "type": {"format": "[INST] {instruction} [/INST]"}}
    result, recipe = convert(AXOLOTL | {"datasets": [dataset]})
    assert result.status == 0, result.err
    assert recipe.dataset.template == "{instruction} {output}"
    told = read_report(result.out)
    assert told["datasets.type.format"] == "had no effect there"
    assert told["datasets.type.field_system"] == "no counterpart"


def test_tools_and_other_layouts_of_llama_factory(convert, tmp_path):
    info = {
        "tools": {"hf_hub_url": "a/b", "formatting": "sharegpt", "columns": {"messages": "m", "tools": "t"}},
        "tasks": {"hf_hub_url": "a/c"},
        "pairs": {"hf_hub_url": "a/d", "ranking": True},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    result, recipe = convert(FACTORY | {"dataset": "tools"})
    assert result.status == 0, result.err
    assert not (tmp_path / "made.jinja").exists()
    assert read_report(result.out)["template"] == "no counterpart"
    evaluated = {"dataset": "tasks", "eval_dataset": "tools", "max_samples": 9, "eval_strategy": "epoch"}
    result, recipe = convert(FACTORY | evaluated, "--force")
    assert result.status == 0, result.err
    assert (recipe.dataset.train[0].format, recipe.dataset.eval[0].limit) == ("instruction", 9)
    result, _ = convert(FACTORY | {"dataset": "pairs"}, "--force")
    assert result.status == 1
    assert "stage sft learns one answer a row" in result.err


def test_a_folder_of_trl_s_has_a_file_for_each_split(convert, tmp_path):
    (tmp_path / "talks").mkdir()
    for split in ("train", "test"):
        (tmp_path / "talks" / f"{split}.jsonl").write_text(json.dumps({"messages": []}))
    result, recipe = convert(TRL | {"dataset_name": "talks", "eval_strategy": "epoch"})
    assert result.status == 0, result.err
    found = [Path(source.source).name for source in (*recipe.dataset.train, *recipe.dataset.eval)]
    assert found == ["train.jsonl", "test.jsonl"]


def test_trl_s_own_mixture_is_recognised(convert):
    result, _ = convert({"model_name_or_path": "a/b", "datasets": [{"path": "stanfordnlp/imdb"}, {"path": "a/c"}]})
    assert result.status == 0, result.err
    assert "(from trl " in result.out
