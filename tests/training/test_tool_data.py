"""Runs on conversations with tools, and with thinking: trained, saved, loaded, asked."""

import copy
import json
from pathlib import Path

import pytest
from learned import ADAPTER
from shared import LORA, losses, status

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Tokyo", "Accra", "Quito")


def ask(city):
    return {"role": "user", "content": f"Is it warm in {city}?"}


def say(city):
    return {"role": "assistant", "content": f"It is sunny in {city}."}


def call(city, arguments=None):
    function = {"name": "weather", "arguments": {"city": city} if arguments is None else arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def result(city):
    return {"role": "tool", "tool_call_id": "1", "content": f"{city}: sunny"}


def from_value(city):
    spelt = json.dumps({"name": "weather", "arguments": {"city": city}})
    turns = [("human", ask(city)["content"]), ("function_call", spelt), ("observation", "sunny"), ("gpt", "Sunny.")]
    return {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": json.dumps(TOOLS)}


def spelt(city):
    text = f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    return [ask(city), {"role": "assistant", "content": text}, {"role": "tool", "content": "sunny"}, say(city)]


TOOL_ROWS = {
    "openai": lambda city: {
        "messages": [ask(city), call(city, json.dumps({"city": city})), result(city), {**say(city), "weight": 1}],
        "tools": TOOLS,
    },
    "objects": lambda city: {"messages": [ask(city), call(city), result(city), say(city)], "tools": TOOLS},
    "sharegpt": from_value,
    "hermes": lambda city: {"messages": spelt(city)},
}
THOUGHTS = {
    "keep": lambda city: {"messages": [ask(city), {**say(city), "reasoning_content": f"{city} is south."}]},
    "mask": lambda city: {
        "messages": [ask(city), {"role": "assistant", "content": f"<think>\n{city} is south.\n</think>\n\nYes."}]
    },
    "drop": lambda city: {"messages": [ask(city), {**say(city), "thinking": f"{city} is south."}]},
}


@pytest.fixture(scope="session")
def qwen3(tokenizer, tmp_path_factory):
    """A tiny Qwen3 with TRL's copy of its training template."""
    import trl
    from transformers import Qwen3Config

    from recipe_runner.model.tiny import write_tiny

    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    templates = Path(trl.__file__).parent / "chat_templates"
    made.chat_template = (templates / "qwen3_training.jinja").read_text()
    return str(write_tiny(Qwen3Config(), made, tmp_path_factory.mktemp("models") / "qwen3"))


TRAINING = {"max_steps": 30, "learning_rate": 0.02, "per_device_train_batch_size": 4, "logging_steps": 10}


@pytest.mark.parametrize("kind", TOOL_ROWS)
def test_tool_data_is_trained_on_saved_loaded_and_asked(run_recipe, run_cli, qwen3, kind):
    rows = [TOOL_ROWS[kind](city) for city in CITIES]
    options = {"rows": rows, "dataset": {"format": "chat"}, "model": {"name_or_path": qwen3}, "peft": ADAPTER}
    trained, folder = run_recipe(training=TRAINING, **options)
    assert trained.status == 0, trained.err
    assert status(folder)["status"] == "completed"
    assert losses(folder)[-1] < losses(folder)[0] * 0.7
    answered = run_cli("generate", folder, "--prompt", "Is it warm in Rome?", "--max-new-tokens", "4")
    assert answered.status == 0, answered.err
    judged = run_cli("evaluate", folder, "--data", folder / ".." / ".." / ".." / "rows.jsonl", "--max-new-tokens", "4")
    assert judged.status == 0, judged.err


@pytest.mark.parametrize("way", THOUGHTS)
def test_thinking_is_trained_on_saved_loaded_and_asked(run_recipe, run_cli, qwen3, way):
    rows = [THOUGHTS[way](city) for city in CITIES]
    data = {"format": "chat", "thinking": way}
    trained, folder = run_recipe(
        rows=rows, dataset=data, model={"name_or_path": qwen3}, peft=ADAPTER, training=TRAINING
    )
    assert trained.status == 0, trained.err
    assert losses(folder)[-1] < losses(folder)[0] * 0.7
    answered = run_cli("generate", folder, "--prompt", "Is it warm in Rome?", "--max-new-tokens", "4")
    assert answered.status == 0, answered.err


def test_pairs_with_tools_are_trained_on(run_recipe, qwen3):
    rows = [{"prompt": [ask(city)], "chosen": [call(city)], "rejected": [say(city)], "tools": TOOLS} for city in CITIES]
    trained, folder = run_recipe(stage="dpo", rows=rows, model={"name_or_path": qwen3}, peft=LORA)
    assert trained.status == 0, trained.err
    assert status(folder)["status"] == "completed"
    judged = [{"prompt": [ask(city)], "completion": [call(city)], "label": True, "tools": TOOLS} for city in CITIES]
    judged[0]["label"] = False
    trained, _ = run_recipe(stage="kto", rows=judged, model={"name_or_path": qwen3}, peft=LORA)
    assert trained.status == 0, trained.err


def test_a_run_names_a_template_that_renders_tools(run_recipe, qwen3):
    """`trl/NAME.jinja` is one of those that TRL stores."""
    rows = [TOOL_ROWS["objects"](city) for city in CITIES]
    options = {"rows": rows, "dataset": {"format": "chat"}, "model": {"name_or_path": qwen3}}
    shown, _ = run_recipe(command="preview", training={"chat_template_path": "trl/qwen2_5_training.jinja"}, **options)
    assert shown.status == 0, shown.err
    assert "You are Qwen" in shown.out
    missing, _ = run_recipe(command="validate", training={"chat_template_path": "trl/qwen9.jinja"}, **options)
    assert missing.status == 1
    assert "there is no file" in missing.out
