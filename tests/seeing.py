"""Tiny vision models of real architectures, and rows with pictures that are drawn here."""

from pathlib import Path

import pytest
from conftest import TICKETS
from shared import write_rows

TEMPLATES = {"idefics3": "idefics3.jinja", "gemma3": "gemma3.jinja"}
ENDS = {"idefics3": "<end_of_utterance>", "gemma3": "<end_of_turn>"}
COLOURS = ("red", "green", "blue", "white")


def draw(file, colour="red", size=(40, 30)):
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", size, "black")
    ImageDraw.Draw(picture).ellipse((5, 5, size[0] - 6, size[1] - 6), fill=colour)
    picture.save(file)
    return file


def seeing_rows(folder, layout="chat"):
    """Rows about pictures in a folder, which are drawn: with one image, with two, and with none."""
    for colour in COLOURS:
        draw(folder / f"{colour}.png", colour)
    rows = []
    for number, colour in enumerate(COLOURS * 2):
        other = COLOURS[(number + 1) % 4]
        kind = number % 3
        question = ("<image>Which colour?", "Is this <image> like <image>?", "Say a colour.")[kind]
        images = ([f"{colour}.png"], [f"{colour}.png", f"{other}.png"], [])[kind]
        answer = (f"It is {colour}.", f"No, it is {colour}.", f"I say {colour}.")[kind]
        if layout == "chat":
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": turns, "images": images})
        else:
            rows.append({"prompt": question, "chosen": answer, "rejected": "I see nothing.", "images": images})
    return rows


@pytest.fixture(scope="session")
def tiny_seeing(tmp_path_factory):
    """Makes a random vision model of an architecture, with its processor, as a model folder: once for each."""
    import trl
    from transformers import CONFIG_MAPPING, Gemma3TextConfig, LlamaConfig

    from recipe_runner.model.tiny import shrink_config
    from recipe_runner.smoke.stand_in import learn_tokenizer
    from recipe_runner.smoke.vision import image_tokens, write_vision

    made = {}

    def tiny_seeing(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp("models") / f"tiny-{model_type}"
            special = ["<bos>", "<pad>", ENDS[model_type], "<start_of_turn>", *image_tokens(model_type)]
            tokenizer = learn_tokenizer([TICKETS.read_text()], list(dict.fromkeys(special)))
            tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token = "<bos>", "<pad>", ENDS[model_type]
            template = Path(trl.__file__).parent / "chat_templates" / TEMPLATES[model_type]
            tokenizer.chat_template = template.read_text().replace("<|begin_of_text|>", "<bos>")
            if model_type == "idefics3":
                tokenizer.chat_template = template.read_text()
            text = shrink_config({"idefics3": LlamaConfig, "gemma3": Gemma3TextConfig}[model_type](), len(tokenizer), 2)
            config = CONFIG_MAPPING[model_type]()
            named = {"idefics3": "Idefics3ForConditionalGeneration", "gemma3": "Gemma3ForConditionalGeneration"}
            config.architectures = [named[model_type]]
            write_vision(config, text, tokenizer, folder)
            made[model_type] = folder
        return made[model_type]

    return tiny_seeing


@pytest.fixture
def seeing_recipe(write_recipe, tiny_seeing, tmp_path):
    """Writes pictures, rows and a small recipe of a stage for them; returns its path."""

    def seeing_recipe(
        model_type="idefics3", stage="sft", rows=None, name="see", dataset=None, training=None, **sections
    ):
        layout = "preference" if stage == "dpo" else "chat"
        made = seeing_rows(tmp_path, layout)
        source = write_rows(tmp_path / f"{name}.jsonl", made if rows is None else rows).name
        data = {"format": layout, "images": "marked", "train": {"source": source}} | (dataset or {})
        training = {"max_steps": 4, "logging_steps": 1, "learning_rate": 0.01, "max_length": 256} | (training or {})
        model = {"name_or_path": str(tiny_seeing(model_type))}
        return write_recipe(name, stage=stage, model=model, dataset=data, training=training, **sections)

    return seeing_recipe
