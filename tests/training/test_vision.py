"""Vision models, trained for real on pictures: small random ones of two architectures."""

import json
import re

import pytest
from seeing import COLOURS, draw, seeing_rows
from shared import LORA, NF4, break_off, losses, status, write_rows

ARCHITECTURES = ("idefics3", "gemma3")


@pytest.fixture
def see(run_cli, seeing_recipe, tmp_path):
    """Runs a command on a small vision recipe; returns the result and the newest run."""

    def see(*arguments, command="train", name="see", **options):
        result = run_cli(command, seeing_recipe(name=name, **options), *arguments)
        return result, max((tmp_path / "runs" / name).glob("*"), default=None)

    return see


@pytest.fixture
def batches(monkeypatch):
    """What the trainer gives its model while it trains."""
    from transformers import Trainer

    seen = []
    prepare = Trainer._prepare_inputs

    def watched(self, inputs):
        made = prepare(self, inputs)
        seen.append({name: value.clone() for name, value in made.items() if hasattr(value, "clone")})
        return made

    monkeypatch.setattr(Trainer, "_prepare_inputs", watched)
    return seen


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_vision_model_is_trained_saved_loaded_and_asked(see, run_cli, tmp_path, model_type, stage):
    from transformers import AutoProcessor

    training = {"max_steps": 12, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    training["learning_rate"] = 0.01 if stage == "sft" else 0.002
    result, folder = see(model_type=model_type, stage=stage, peft=LORA, training=training)
    assert result.status == 0, result.err
    found = losses(folder)
    assert sum(found[-3:]) < 0.97 * sum(found[:3])
    if stage == "dpo":
        assert found[0] == pytest.approx(0.6931, abs=1e-3)
    assert status(folder)["status"] == "completed"
    assert type(AutoProcessor.from_pretrained(folder / "adapter")).__name__.lower() == f"{model_type}processor"
    picture = str(tmp_path / "red.png")
    saved = json.loads((folder / "adapter" / "tokenizer.json").read_text())
    assert (saved["truncation"], saved["padding"]) == (None, None)  # of the collator's last batch
    asked = run_cli("generate", folder, "--prompt", "Which colour?", "--image", picture, "--max-new-tokens", "4")
    assert asked.status == 0, asked.err
    evaluated = run_cli("evaluate", folder, "--data", tmp_path / "see.jsonl", "--max-new-tokens", "4")
    assert evaluated.status == 0, evaluated.err
    assert "8 rows of see.jsonl" in evaluated.out


@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_ways_to_train_a_vision_model(see, kind):
    sections = {"peft": LORA, "quantization": NF4} if kind == "qlora" else {"peft": None}
    result, folder = see(
        training={"max_steps": 6, "learning_rate": 0.001, "per_device_train_batch_size": 4}, **sections
    )
    assert result.status == 0, result.err
    assert losses(folder)[-1] < losses(folder)[0]


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"peft": LORA}, {"text_model"}),
        ({"peft": LORA | {"target_modules": ["q_proj"]}}, {"text_model"}),
        ({"peft": LORA | {"target_modules": ".*(q_proj|v_proj)"}}, {"text_model", "vision_model"}),
        ({"peft": LORA | {"exclude_modules": ["lm_head"]}}, {"text_model", "vision_model", "connector"}),
        ({"peft": LORA, "unfreeze": ["model.connector.*"]}, {"text_model", "connector"}),
    ],
)
def test_what_sees_is_trained_only_where_the_recipe_says_so(see, sections, wanted):
    from safetensors import safe_open

    result, folder = see(training={"max_steps": 1}, **sections)
    assert result.status == 0, result.err
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
    found = {name.split("model.model.model.")[-1].split(".")[0] for name in names}
    assert {name for name in found if name in ("text_model", "vision_model", "connector")} == wanted
    (said,) = (line for line in result.out.splitlines() if line.strip().startswith("vision "))
    for name in ("vision_model", "connector"):
        assert (f"{name} frozen" in said) == (name not in wanted)
        assert bool(re.search(rf"{name} [\d,]+ of [\d,]+ parameters trained", said)) == (name in wanted)


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_shown_is_what_the_trainer_receives(see, batches, tmp_path, model_type, train_on):
    """Tokens and labels of each row, and the very pixels of its images."""
    from PIL import Image
    from transformers import AutoProcessor

    sections = {"peft": LORA, "dataset": {"train_on": train_on}, "run": {"longest_batch_first": False}}
    sections |= {"training": {"max_steps": 8, "per_device_train_batch_size": 1}}
    shown, _ = see("--format", "json", "-n", "8", "--rows-only", model_type=model_type, command="preview", **sections)
    assert shown.status == 0, shown.err
    rows = json.loads(shown.out)
    result, folder = see(model_type=model_type, **sections)
    assert result.status == 0, result.err
    processor = AutoProcessor.from_pretrained(folder / "adapter")
    found = {tuple(batch["input_ids"][0].tolist()): batch for batch in batches}
    assert len(rows) == len(found) == 8
    for row in rows:
        batch = found[tuple(row["input_ids"])]
        assert batch["labels"][0].tolist() == row["labels"]
        opened = []
        for image in row.get("images", ()):
            with Image.open(image["path"]) as file:
                opened.append(file.convert("RGB"))
        assert bool(opened) == ("pixel_values" in batch)
        if opened:
            pixels = processor.image_processor([opened], return_tensors="pt")["pixel_values"]
            assert (batch["pixel_values"].flatten() == pixels.flatten()).all()


def test_idefics3_still_needs_images_first(tiny_seeing, tmp_path):
    from PIL import Image
    from transformers import AutoProcessor
    from trl.chat_template_utils import get_training_chat_template
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = AutoProcessor.from_pretrained(tiny_seeing("idefics3"))
    template = get_training_chat_template(processor)
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True, chat_template=template)
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}

    def row(count):
        content = [*[{"type": "image"}] * count, {"type": "text", "text": "Which?"}]
        return {
            "messages": [{"role": "user", "content": content}, answer],
            "images": [Image.new("RGB", (8, 8))] * count,
        }

    assert collator([row(1), row(0)])["input_ids"].shape[0] == 2
    with pytest.raises(ValueError, match="text_replacement_offsets"):
        collator([row(0), row(1)])


def test_answers_alone_are_learned(see):
    shown, _ = see("-n", "3", "--rows-only", command="preview")
    assert shown.status == 0, shown.err
    assert "[[ It is red.<end_of_utterance>" in shown.out
    assert "<image> x 4" in shown.out
    assert "red.png, 40 x 30 pixels" in shown.out


def test_a_resumed_run_equals_an_uninterrupted_one(see, tmp_path):
    sections = {"peft": LORA | {"lora_dropout": 0.1}, "training": {"max_steps": 4, "save_steps": 2}}
    _, whole = see(**sections)
    broken = break_off(whole, 3)
    result, folder = see("--resume", "auto", **sections)
    assert (result.status, folder) == (0, broken), result.err
    assert losses(broken) == losses(whole)


def test_a_changed_picture_is_noticed(see, tmp_path):
    sections = {"peft": LORA, "training": {"max_steps": 1}}
    first, _ = see(command="preview", **sections)
    draw(tmp_path / "red.png", "yellow", (80, 60))
    recipe = tmp_path / "see.yaml"
    from recipe_runner.cli import main  # noqa: F401 (the same process)

    again, _ = see(command="preview", rows=seeing_rows(tmp_path)[:4], **sections)
    assert (first.status, again.status) == (0, 0)
    assert "made in" in again.out
    assert recipe.is_file()


@pytest.mark.parametrize("layout", ["parts", "inline", "first", "bytes", "datasets"])
def test_layouts_of_rows_with_images(see, tmp_path, layout):
    """However a row names its image, the trainer gets the same."""
    plain, _ = see("--format", "json", "-n", "1", "--rows-only", command="preview", name="plain")
    (wanted,) = json.loads(plain.out)
    question, answer = "Which colour?", [{"role": "assistant", "content": "It is red."}]
    parts, dataset = [{"type": "image"}, {"type": "text", "text": question}], {}
    row = {"messages": [{"role": "user", "content": parts}, *answer], "images": ["red.png"]}
    if layout == "inline":
        row = {"messages": [{"role": "user", "content": [{"type": "image", "image": "red.png"}, parts[1]]}, *answer]}
    if layout == "first":
        row = {"messages": [{"role": "user", "content": question}, *answer], "image": "red.png"}
        dataset = {"images": "first"}
    if layout in ("bytes", "datasets"):
        import datasets

        image = {"path": None, "bytes": (tmp_path / "red.png").read_bytes()}
        turns = [{"role": "user", "content": f"<image>{question}"}, *answer]
        made = datasets.Dataset.from_list([{"messages": turns, "images": [image]}] * 2)
        if layout == "datasets":
            made = made.cast_column("images", datasets.List(datasets.Image()))
        made.to_parquet(tmp_path / "rows.parquet")
        dataset = {"train": {"source": "rows.parquet"}}
    arguments = ("--format", "json", "-n", "1", "--rows-only")
    shown, _ = see(*arguments, command="preview", rows=[row, row], dataset=dataset, name="other")
    assert shown.status == 0, shown.err
    (found,) = json.loads(shown.out)
    assert (found["input_ids"], found["labels"]) == (wanted["input_ids"], wanted["labels"])
    assert (found["images"][0]["width"], found["images"][0]["height"]) == (40, 30)


def spoil(folder, kind):
    """Writes an image of a kind that can't be used."""
    from PIL import Image

    file = folder / "bad.png"
    if kind == "dot":
        Image.new("RGB", (1, 1)).save(file)
    elif kind == "huge":
        Image.new("1", (20_000, 10_000)).save(file)
    elif kind == "animated":
        frames = [Image.new("RGB", (20, 20), colour) for colour in COLOURS]
        file = folder / "bad.gif"
        frames[0].save(file, save_all=True, append_images=frames[1:])
    elif kind == "cut":
        file.write_bytes(draw(folder / "whole.png", size=(200, 200)).read_bytes()[:300])
    elif kind == "text":
        file.write_text("no picture")
    return file.name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dot", "has 1 x 1 pixels"),
        ("huge", "has more than 89,478,485 pixels; make it smaller"),
        ("animated", "is animated (4 frames)"),
        ("cut", "is it cut off?"),
        ("text", "is no image that Pillow reads"),
        ("missing", "is not there"),
    ],
)
def test_an_image_that_can_not_be_used_is_named_with_its_row(see, tmp_path, kind, words):
    rows = seeing_rows(tmp_path)
    rows[3]["images"] = [spoil(tmp_path, kind)]
    result, folder = see(rows=rows)
    assert (result.status, folder) == (1, None)
    assert "error[unreadable-image]" in result.err
    assert "see.jsonl: row 4: image 1 (" in result.err
    assert words in result.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": []}, "0 image(s), and 1 mark(s)"),
        ({"images": ["red.png", "green.png"]}, "2 image(s), and 1 mark(s)"),
        ({"images": ["https://example.org/a.png"]}, "is an address, from which nothing is read"),
        ({"images": ["data:image/png;base64,AAAA"]}, "an image written as data:"),
        ({"images": [7]}, "expected the path or the bytes of an image"),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>"}]},
            "an image in a turn of assistant",
        ),
        (
            {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Red."}]},
            "1 image(s), and 0 mark(s) where one stands; write <image>",
        ),
    ],
)
def test_marks_and_images_that_do_not_agree_are_named(see, tmp_path, change, words):
    rows = seeing_rows(tmp_path)
    rows[0] |= change
    result, _ = see(rows=rows, command="preview")
    assert result.status == 1
    assert "see.jsonl: row 1" in result.err
    assert words in result.err


def test_images_that_would_be_cut_are_dropped_and_counted(see):
    result, _ = see(command="preview", training={"max_length": 40}, dataset={"max_dropped": 1})
    assert result.status == 0, result.err
    assert "whose images do not fit within max_length (40)" in result.out


def test_a_text_model_sees_nothing(see, write_recipe, run_cli, tiny_phi3, tmp_path):
    data = {"format": "chat", "images": "marked", "train": {"source": "rows.jsonl"}}
    write_rows(tmp_path / "rows.jsonl", seeing_rows(tmp_path))
    recipe = write_recipe(model={"name_or_path": str(tiny_phi3)}, dataset=data)
    result = run_cli("train", recipe)
    assert result.status == 1
    assert "error[no-processor]" in result.err
    assert "is a text model: it sees no images" in result.err


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_adapter_is_merged_into_a_model_that_sees(see, run_cli, tmp_path, model_type):
    """With its processor; the merged model gives the answers of base and adapter, also to images."""
    result, folder = see(model_type=model_type, peft=LORA, training={"max_steps": 12, "per_device_train_batch_size": 4})
    assert result.status == 0, result.err
    merged = run_cli("merge", folder)
    assert merged.status == 0, merged.err
    question = ["--prompt", "Which colour?", "--image", str(tmp_path / "red.png"), "--max-new-tokens", "6"]
    answers = [run_cli("generate", of, *question) for of in (folder, folder / "merged")]
    assert [answer.status for answer in answers] == [0, 0], answers[1].err
    assert answers[0].out == answers[1].out
    assert answers[0].out.strip()
