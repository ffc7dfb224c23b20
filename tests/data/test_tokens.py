"""Which tokens are learned, for each format; what is dropped and cut, and that it is counted."""

from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.resolve import load_recipe

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture
def open_data(small_recipe, tiny_phi3):
    """Opens the data of a small recipe as a run does."""
    from recipe_runner.training.config import build_config
    from recipe_runner.training.environment import choose_precision
    from recipe_runner.training.prepare import open_job

    def open_data(rows, name_or_path=tiny_phi3, training=None, **dataset):
        model = {"name_or_path": str(name_or_path)}
        recipe = load_recipe(str(small_recipe(rows=rows, model=model, dataset=dataset, training=training)))
        precision = choose_precision(recipe.training, None, adapter=False, launcher="no")
        config = build_config(recipe.stage, recipe.training.said, recipe.model, recipe.run.seed, precision)
        with recipe.placing_errors():
            return recipe, open_job(recipe, config)[0]

    return open_data


@pytest.fixture
def prepare(open_data):
    """Prepares rows as a run does; returns the split, its tokenizer, and (rendered text, learned text) of each row."""
    from recipe_runner.data import store

    def prepare(rows, *model, **options):
        recipe, job = open_data(rows, *model, **options)
        with recipe.placing_errors():
            split = store.prepare_data(job).splits["train"]
        tokenizer = job.tokenizer
        texts = [
            (tokenizer.decode(row["input_ids"]), tokenizer.decode([label for label in row["labels"] if label != -100]))
            for row in split.dataset
        ]
        return split, tokenizer, texts

    return prepare


def test_instruction_learns_the_answer_and_the_end_of_the_turn(prepare):
    _, _, texts = prepare([{"instruction": "Add.", "input": "1 2", "output": "3"}], system="Be brief.")
    assert texts == [
        (
            "<|system|>\nBe brief.<|end|>\n<|user|>\nAdd.\n\n1 2<|end|>\n<|assistant|>\n3<|end|>\n<|endoftext|>",
            "3<|end|>\n<|endoftext|>",
        )
    ]


def test_plain_template_learns_the_answer_and_the_end_of_the_text(prepare):
    _, _, texts = prepare([{"instruction": "Add.", "output": "3"}], template="classic")
    assert texts == [("Instruction:\nAdd.\n\nOutput:\n3<|endoftext|>", "3<|endoftext|>")]


@pytest.mark.parametrize(
    ("train_on", "learned"),
    [
        ("assistant", "two<|end|>\nfour<|end|>\n<|endoftext|>"),
        ("completion", "four<|end|>\n<|endoftext|>"),
        ("all", None),
    ],
)
def test_chat_learns_what_train_on_says(prepare, train_on, learned):
    _, _, ((whole, found),) = prepare([{"messages": CONVERSATION}], format="chat", train_on=train_on)
    assert "".join(whole.split()).startswith("<|system|>Bebrief.<|end|><|user|>one<|end|><|assistant|>two<|end|>")
    assert found == (whole if learned is None else learned)


def test_text_learns_everything_and_ends_each_document(prepare):
    _, _, texts = prepare([{"text": "first document"}, {"text": "second"}], format="text")
    assert texts == [("first document<|endoftext|>",) * 2, ("second<|endoftext|>",) * 2]


PARTS = [
    {"text": "<|user|>Ask", "label": False},
    {"text": "ing: ", "label": False},
    {"text": " yes", "label": True},
    {"text": "<|end|>", "label": True},
    {"text": " and ", "label": False},
    {"text": "no<|endoftext|>", "label": True},
]


@pytest.mark.parametrize("train_on", ["labelled", "all"])
def test_segments_are_learned_by_their_labels(prepare, train_on):
    """As axolotl 0.18 makes tokens of them: `RawInputOutputStrategy` in axolotl/prompt_strategies/input_output.py."""
    split, tokenizer, _ = prepare([{"segments": PARTS}], format="segments", train_on=train_on)
    ids, labels = [], []
    for part in PARTS:
        tokens = tokenizer(part["text"], add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if part["label"] or train_on == "all" else [-100] * len(tokens)
    assert (split.dataset[0]["input_ids"], split.dataset[0]["labels"]) == (ids, labels)


def test_segments_without_an_end_are_counted(prepare, open_data):
    from recipe_runner.data.findings import find_problems

    rows = [{"segments": PARTS}] * 3 + [{"segments": [{"text": "No end", "label": True}]}]
    split, tokenizer, _ = prepare(rows, format="segments")
    recipe, _ = open_data(rows, format="segments")
    found = list(find_problems(recipe.dataset, tokenizer, {"<|endoftext|>"}, split.accounting, "train"))
    assert [problem.code for problem in found] == ["segments-without-end"]
    assert found[0].severity == "warning"
    assert found[0].message.startswith("1 of the first 100 train rows don't end with a token that ends a text")
    assert "row 4" in found[0].message


def test_what_is_asked_before_segments(open_data):
    """The last labelled ones are the answer; what the tokenizer adds itself is not asked twice."""
    from recipe_runner.data.prompts import split_row

    _, job = open_data([{"segments": PARTS}], format="segments")
    asked = split_row({"segments": PARTS}, job.tokenizer)
    assert (asked.content, asked.wanted) == ("<|user|>Asking:  yes<|end|> and ", "no")
    assert split_row({"segments": PARTS[2:3]}, job.tokenizer) is None
    job.tokenizer.bos_token = "<|user|>"
    job.tokenizer.add_bos_token = True
    assert split_row({"segments": PARTS[:4]}, job.tokenizer).content == "Asking: "


def test_masks_equal_those_of_a_real_trainer(prepare, tiny_phi3, tmp_path):
    """The stand-in for `self` in `SFTTrainer._prepare_dataset` must give what a whole trainer gives."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"messages": CONVERSATION}, {"messages": CONVERSATION[1:3]}]
    split, tokenizer, _ = prepare(rows, format="chat", training={"max_length": 20})
    config = SFTConfig(str(tmp_path), bf16=False, max_length=20, assistant_only_loss=True)
    trainer = SFTTrainer(str(tiny_phi3), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert [row["input_ids"] for row in split.dataset] == [row["input_ids"] for row in trainer.train_dataset]
    assert [row["labels"] for row in split.dataset] == [row["labels"] for row in trainer.train_dataset]


def test_every_lost_row_and_token_is_counted(prepare):
    rows = [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": ""},
        {"instruction": "q " * 50, "output": "never reached"},
        {"instruction": "a", "output": "long " * 50},
    ]
    split, _, _ = prepare(rows, training={"max_length": 40})
    accounting = split.accounting
    assert (accounting.rows_read, accounting.rows_kept, len(split.dataset)) == (4, 2, 2)
    assert accounting.dropped == {"with an empty output": 1, "without a supervised token within max_length (40)": 1}
    assert accounting.rows_truncated == 1
    lengths = [len(row["input_ids"]) for row in split.dataset]
    assert max(lengths) == 40
    assert accounting.tokens == sum(lengths)
    assert accounting.supervised_tokens == sum(label != -100 for row in split.dataset for label in row["labels"])
    whole, _, _ = prepare(rows[3:], training={"max_length": None})
    assert accounting.tokens_truncated == whole.accounting.tokens - 40
    assert "2 kept, 2 dropped (1 with an empty output; 1 without" in str(accounting)


def test_packing_keeps_every_token_of_long_documents(prepare):
    rows = [{"text": "word " * count} for count in (5, 60, 3, 25)]
    apart, _, _ = prepare(rows, format="text", training={"max_length": None})
    packed, _, _ = prepare(
        rows, format="text", training={"packing": True, "packing_strategy": "bfd_split", "max_length": 32}
    )
    assert packed.accounting.tokens == apart.accounting.tokens
    assert sum(len(row["input_ids"]) for row in packed.dataset) == apart.accounting.tokens
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 32 for row in packed.dataset)
    assert len(packed.dataset) == -(-apart.accounting.tokens // 32)


def test_nothing_left_is_an_error_with_the_reasons(prepare):
    with pytest.raises(UserError, match="no row of the train data can be used: 1 with an empty output"):
        prepare([{"instruction": "a", "output": ""}])


@pytest.fixture
def with_template(tokenizer, tmp_path):
    """A folder with the tiny tokenizer and another chat template."""
    import copy

    def with_template(template):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        changed.save_pretrained(tmp_path / "tokenizer")
        return tmp_path / "tokenizer"

    return with_template


TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
ENDLESS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (TURNS, "no-generation-marks"),
        (TURNS.replace("<|end|>", "<|eot_id|>"), "template-token-missing"),
        (ENDLESS, "end-of-turn-masked"),
        (None, "no-chat-template"),
    ],
)
def test_a_template_that_would_teach_the_wrong_tokens_is_refused(prepare, with_template, template, code):
    with pytest.raises(UserError) as caught:
        prepare([{"messages": CONVERSATION}], with_template(template), format="chat")
    assert caught.value.problems[0].code == code


def test_a_template_file_of_the_recipe_is_used_and_saved_with_the_tokenizer(prepare, with_template, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(
        ENDLESS.replace("{% endgeneration %}", "<|end|>{% endgeneration %}").replace(
            "{% endif %}<|end|>", "<|end|>{% endif %}"
        )
    )
    training = {"chat_template_path": str(file)}
    _, tokenizer, texts = prepare([{"messages": CONVERSATION}], with_template(TURNS), training=training, format="chat")
    assert texts[0][1] == "two<|end|>four<|end|>"
    assert tokenizer.chat_template == Path(file).read_text()


def test_tokens_without_an_end_are_refused(prepare, tokenizer, tmp_path):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.eos_token = None
    changed.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no-eos-token"):
        prepare([{"text": "x"}], tmp_path / "tokenizer", format="text")
    split, _, _ = prepare([{"text": "x"}], tmp_path / "tokenizer", format="text", training={"eos_token": "<|end|>"})
    assert split.dataset[0]["input_ids"][-1] == changed.convert_tokens_to_ids("<|end|>")


def test_rows_of_a_trainer_that_tokenizes_itself_stay_whole(open_data):
    """The shape `rows`: no stage has it yet, so a stage that differs in nothing else is made of `sft`."""
    from recipe_runner.data import store
    from recipe_runner.data.prepare import input_ids_of, shape_of

    said = [{"instruction": f"Say {n}.", "output": f"it is {n}"} for n in (1, 2)] + [
        {"instruction": "Say all.", "output": ""}
    ]
    _, job = open_data(said)
    job = replace(job, stage=replace(job.stage, shape="rows"))
    split = store.prepare_data(job).splits["train"]
    assert split.dataset[:] == {
        "prompt": [[{"role": "user", "content": f"Say {n}."}] for n in (1, 2)],
        "completion": [[{"role": "assistant", "content": f"it is {n}"}] for n in (1, 2)],
    }
    prompt = {"prompt_ids": job.tokenizer("<|user|>\nSay 1.<|end|>\n<|assistant|>\n")["input_ids"]}
    stored = Dataset.from_file(str(store.prepare_data(job).folder / "train.arrow"))[0]
    assert stored["prompt_ids"] == prompt["prompt_ids"] == input_ids_of(job.stage, prompt)
    assert shape_of(job.stage).as_trained(stored, job.config) == {
        "": (prompt["prompt_ids"], [-100] * len(prompt["prompt_ids"]))
    }
    counted = split.accounting
    assert (counted.rows_kept, counted.dropped) == (2, {"with an empty output": 1})
    assert (counted.tokens, counted.supervised_tokens) == (2 * len(prompt["prompt_ids"]), 0)


def test_a_turn_of_weight_0_is_seen_and_not_learned(prepare):
    turns = [dict(turn) for turn in CONVERSATION]
    turns[2]["weight"] = 0
    plain = [{"messages": CONVERSATION}]
    split, _, texts = prepare([{"messages": turns}, *plain], format="chat")
    assert texts[0] == (texts[1][0], "four<|end|>\n<|endoftext|>")
    assert texts[1][1] == "two<|end|>\nfour<|end|>\n<|endoftext|>"
    assert split.dataset[0]["input_ids"] == split.dataset[1]["input_ids"]
