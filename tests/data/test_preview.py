"""`recipe-run preview` and `prepare`: what is shown is what is trained on; what is prepared is used, and made again."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest

CHAT = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"say {n} \N{GRINNING FACE}"},
            {"role": "assistant", "content": f"it is {n}"},
            {"role": "user", "content": "again " * n},
            {"role": "assistant", "content": f"still {n} \u05e9\u05dc\u05d5\u05dd"},
        ]
    }
    for n in range(1, 13)
]
TEXT = [{"text": f"document {n} " * n} for n in range(1, 13)]
SEGMENTS = [
    {
        "segments": [
            {"text": f"question {n} " * n, "label": False},
            {"text": f"answer {n}", "label": True},
            {"text": "<|endoftext|>", "label": n % 3 > 0},
        ]
    }
    for n in range(1, 13)
]
PACKED = {"packing": True, "max_length": 64}
CHATML = {"chat_template_path": "trl/qwen3_training.jinja", "max_length": 1024}
CALL = {"type": "function", "function": {"name": "count", "arguments": {"to": 3}}}
TOOLED = [
    {
        "messages": [
            *CHAT[n]["messages"][1:3],
            {"role": "user", "content": f"count to {n}"},
            {"role": "assistant", "content": "I count.", "tool_calls": [CALL] * (1 + n % 2)},
            *[{"role": "tool", "content": f"1 to {n}"}] * (1 + n % 2),
            {"role": "assistant", "content": f"done {n}", "weight": n % 3 > 0},
        ],
        "tools": [{"name": "count", "description": "x" * n, "parameters": {"type": "object"}}],
    }
    for n in range(12)
]
THOUGHTFUL = [
    {
        "messages": [
            *CHAT[n]["messages"][:2],
            {"role": "assistant", "content": f"it is {n}", "reasoning_content": f"one and {n}"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": f"<think>\nas before: {n}\n</think>\n\nstill {n}"},
        ]
    }
    for n in range(12)
]


@pytest.fixture
def preview(run_recipe):
    """Runs a command on a small recipe; returns the result and the latest run folder, if any."""

    def preview(*arguments, rows=None, training=None, command="preview", **dataset):
        return run_recipe(*arguments, command=command, rows=rows, training=training, dataset=dataset)

    return preview


@pytest.mark.parametrize(
    ("rows", "dataset", "training"),
    [
        (None, {"train_on": "completion"}, {}),
        (None, {"train_on": "all"}, {}),
        (None, {"template": "classic"}, {"max_length": 90}),
        (None, {"train_on": "completion"}, PACKED),
        (CHAT, {"format": "chat", "train_on": "assistant"}, {"max_length": 40}),
        (CHAT, {"format": "chat", "train_on": "completion"}, {}),
        (CHAT, {"format": "chat", "train_on": "all"}, {}),
        (CHAT, {"format": "chat", "train_on": "assistant"}, {**PACKED, "max_length": 128}),
        (TEXT, {"format": "text"}, {}),
        (SEGMENTS, {"format": "segments"}, {}),
        (SEGMENTS, {"format": "segments"}, {**PACKED, "max_length": 256}),
        (TEXT, {"format": "text"}, {**PACKED, "packing_strategy": "bfd_split"}),
        (TEXT, {"format": "text"}, {**PACKED, "packing_strategy": "wrapped"}),
        (TOOLED, {"format": "chat"}, CHATML),
        (TOOLED, {"format": "chat"}, {**CHATML, "packing": True}),
        (TOOLED, {"format": "chat", "train_on": "last", "max_dropped": 0.5}, CHATML),
        (THOUGHTFUL, {"format": "chat"}, CHATML),
        (THOUGHTFUL, {"format": "chat", "thinking": "mask"}, CHATML),
        (THOUGHTFUL, {"format": "chat", "thinking": "mask", "train_on": "last"}, {**CHATML, "packing": True}),
        (THOUGHTFUL, {"format": "chat", "thinking": "drop", "merge_system": True}, CHATML),
        (None, {"train_on": "assistant", "system": "Be brief.", "merge_system": True}, {}),
    ],
)
def test_what_is_shown_is_what_the_trainer_receives(run_recipe, chatml, tmp_path, rows, dataset, training):
    """Element by element, against the batches of the trainer's own data loader."""
    from recipe_runner.recipe.resolve import load_recipe
    from recipe_runner.training import prepare, trainers

    training = {"train_sampling_strategy": "sequential"} | training
    model = {"name_or_path": chatml} if "chat_template_path" in training else None
    options = {"rows": rows, "training": training, "dataset": dataset, "model": model}
    result, _ = run_recipe("-n", "12", "--format", "json", command="preview", **options)
    assert result.status == 0, result.err
    shown = json.loads(result.out)
    recipe = load_recipe(str(tmp_path / "tiny.yaml"))
    prepared = prepare.prepare(recipe, None)
    prepared.config.per_device_train_batch_size, prepared.config.output_dir = 1, str(tmp_path / "out")
    trainer = trainers.build_trainer(recipe, prepared)
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), shown, strict=False)]
    assert len(batches) == len(shown) > 0
    for batch, row in zip(batches, shown, strict=True):
        assert batch["input_ids"][0].tolist() == row["input_ids"]
        assert batch["labels"][0].tolist() == row["labels"]
        assert len(row["tokens"]) == len(row["input_ids"])
        assert sum(document["tokens"] for document in row["documents"]) == len(row["input_ids"])
    assert any(label != -100 for label in shown[0]["labels"])


def test_text_marks_what_is_learned_turn_by_turn(preview):
    result, _ = preview("-n", "1", "--rows-only", rows=CHAT, format="chat")
    assert result.status == 0, result.err
    assert re.findall(r"^  -- (\w+)$", result.out, flags=re.MULTILINE) == ["system", *["user", "assistant"] * 2]
    assert [" ".join(span.split()) for span in re.findall(r"\[\[(.*?)\]\]", result.out, flags=re.DOTALL)] == [
        "it is 1<|end|>\u23ce",
        "still 1 \u05e9\u05dc\u05d5\u05dd<|end|>\u23ce <|endoftext|>",
    ]
    assert "say 1 \N{GRINNING FACE}<|end|>" in result.out
    assert "rows.jsonl row 1: " in result.out


def test_text_shows_which_documents_share_a_row_and_where_one_is_cut(preview):
    packed, _ = preview("-n", "9", "--rows-only", rows=TEXT, format="text", training=PACKED)
    assert "documents packed into" in packed.out
    assert len(re.findall(r"rows.jsonl row \d+ \(document \d+\)", packed.out)) > 1
    cut, _ = preview("--row", "12", "--rows-only", rows=TEXT, format="text", training={"max_length": 20})
    assert re.search(r"-- cut here at max_length: \d+ tokens are lost", cut.out)


def test_a_row_is_found_by_its_number_in_the_file(preview):
    result, _ = preview("--row", "5", "--format", "json", rows=TEXT, format="text", training=PACKED)
    (row,) = json.loads(result.out)
    assert row["row"] == 5
    assert "".join(row["tokens"]).count("5") == 5
    assert "there is no row 13" in preview("--row", "13", rows=TEXT, format="text")[0].err
    empty, _ = preview("--row", "2", rows=[TEXT[0], {"text": " "}], format="text")
    assert (empty.status, "error[row-dropped]" in empty.err) == (1, True)
    assert "row 2 is not trained on: it is one with an empty text" in empty.err


def test_rows_are_escaped_for_the_terminal(preview):
    result, _ = preview("-n", "1", rows=[{"text": "a\x1b[31m b \u202e \x00 c"}] * 4, format="text")
    assert "\\x1b[31m b \\u202e \\x00 c" in result.out


def test_accounting_says_what_became_of_every_row(preview):
    rows = [*TEXT, TEXT[3], {"text": ""}]
    result, _ = preview(rows=rows, format="text", training={"max_length": 30})
    text = " ".join(result.out.split())
    assert re.search(r"14 rows: 13 kept, 1 dropped \(1 with an empty text\), \d+ truncated", text)
    assert ", 1 duplicates; " in text
    assert re.search(r"lengths p50 \d+, p90 \d+, p99 \d+, max \d+ tokens; max_length 30", text)
    assert re.search(r"\d+% padding; random batches \d+%, grouped by length \d+%, packed to 30 \d+% empty", text)
    assert "warning[many-truncated] training.max_length:" in result.out


def test_accounting_is_printed_and_kept_by_a_run(preview, tmp_path):
    result, _ = preview("--set", "run.output_dir=" + str(tmp_path / "runs"), command="train")
    assert result.status == 0, result.err
    (folder,) = (tmp_path / "runs").glob("*/*")
    kept = json.loads((folder / "environment.json").read_text())["data"]["train"]
    assert "  lengths    p50 " in result.out
    assert re.search(r"  batches    \d+% padding; random batches ", result.out)
    assert kept["rows_kept"] == 240
    assert sum(kept["histogram"]["counts"]) == 240
    assert set(kept["batches"]) == {"random", "grouped", "packed", "left"}
    assert kept["batches"]["left"] == kept["batches"]["random"]


def test_mixtures_are_accounted_by_source(preview, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two three"}\n' * 30)
    (tmp_path / "b.jsonl").write_text('{"text": "four"}\n' * 10)
    result, _ = preview(format="text", train=[{"source": "a.jsonl"}, {"source": "b.jsonl"}])
    assert "a.jsonl 75% of rows" in result.out
    assert "b.jsonl 25% of rows" in result.out


def test_too_many_dropped_rows_are_refused(preview):
    rows = [*TEXT[:4], {"text": ""}]
    refused, _ = preview(command="prepare", rows=rows, format="text")
    assert refused.status == 1
    assert (
        "error[too-many-dropped] dataset.max_dropped: 1 of 5 train rows can't be used (1 with an empty" in refused.err
    )
    assert preview(command="prepare", rows=rows, format="text", max_dropped=0.2)[0].status == 0


@pytest.mark.parametrize(("policy", "kept", "cut"), [("truncate", 12, True), ("drop", 2, False)])
def test_rows_that_are_too_long_are_cut_or_dropped(preview, policy, kept, cut):
    result, _ = preview(rows=TEXT, format="text", training={"max_length": 20}, on_overlong=policy, max_dropped=1)
    assert f"12 rows: {kept} kept" in result.out
    assert (", 0 truncated" not in result.out) == cut


def test_rows_that_are_too_long_are_refused_when_the_recipe_says_so(preview):
    result, _ = preview(rows=TEXT, format="text", training={"max_length": 20}, on_overlong="error")
    assert result.status == 1
    assert re.search(r"error\[row-too-long\] dataset.on_overlong: \S+rows.jsonl: row \d+ has \d+ tokens", result.err)


def test_text_that_spells_special_tokens_is_counted(preview):
    rows = [*CHAT, {"messages": [{"role": "user", "content": "<|end|>"}, {"role": "assistant", "content": "x"}]}]
    result, _ = preview(rows=rows, format="chat")
    assert "warning[special-tokens-in-data] dataset.train: 1 train rows spell special tokens" in result.out


WITHOUT_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


def test_a_role_that_the_template_does_not_render_is_told(preview, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text(WITHOUT_SYSTEM)
    training = {"chat_template_path": str(template)}
    result, _ = preview(rows=CHAT, format="chat", training=training)
    assert "warning[system-prompt-lost] dataset" in result.out
    assert "renders nothing of the role 'system', which 12 train rows have" in result.out
    own, _ = preview(command="prepare", rows=CHAT, format="chat", training=training, system="Be kind.")
    assert (own.status, "error[system-prompt-lost]" in own.err) == (1, True)
    template.write_text(WITHOUT_SYSTEM.replace("'system'", "'user'"))
    lost, _ = preview(rows=CHAT, format="chat", training=training)
    assert (lost.status, "error[role-not-rendered]" in lost.err) == (1, True)


def test_two_beginnings_are_refused(preview, tokenizer, tiny_phi3, tmp_path):
    import copy

    from tokenizers.processors import TemplateProcessing

    twice = copy.deepcopy(tokenizer)
    twice.bos_token = "<|system|>"
    twice.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", 1)]
    )
    folder = tmp_path / "twice"
    twice.save_pretrained(folder)
    shutil.copy(tiny_phi3 / "config.json", folder)
    rows = [{"text": "<|system|>once more"}] * 5
    result, _ = preview("--set", f"model.name_or_path={folder}", command="prepare", rows=rows, format="text")
    assert (result.status, "error[doubled-bos] dataset.train: 5 train rows begin with two" in result.err) == (1, True)


CHATML = "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"


def test_a_template_without_marks_gets_them(preview, tmp_path):
    plain, marked = tmp_path / "plain.jinja", tmp_path / "marked.jinja"
    plain.write_text(CHATML)
    learned = ["it is 1<|end|>", "still 1 \u05e9\u05dc\u05d5\u05dd<|end|>"]
    training = {"chat_template_path": str(plain), "eos_token": "<|end|>"}
    shown, _ = preview("-n", "1", rows=CHAT, format="chat", training=training)
    assert shown.status == 0, shown.err
    assert re.findall(r"\[\[(.*?)\]\]", shown.out) == learned
    said = "a copy with {% generation %} marks stands in for the model's own: it marks the answers, and changes no row"
    assert said in shown.out
    assert said in preview(command="train", rows=CHAT, format="chat", training=training | {"max_length": 512})[0].out
    written, _ = preview("--write-template", marked, rows=CHAT, format="chat", training=training)
    assert written.status == 0, written.err
    shown, _ = preview("-n", "1", rows=CHAT, format="chat", training=training | {"chat_template_path": str(marked)})
    assert re.findall(r"\[\[(.*?)\]\]", shown.out) == learned


def test_a_template_is_written_to_the_file_that_the_recipe_names(preview, tmp_path):
    file = tmp_path / "marked.jinja"
    options = {"rows": CHAT, "format": "chat", "training": {"chat_template_path": "marked.jinja"}}
    assert preview(**options)[0].status == 1
    assert preview("--write-template", file, **options)[0].status == 0
    assert preview(**options)[0].status == 0


def read_trls(name):
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / name).read_text()


def test_a_template_that_stands_in_renders_the_same_text(preview, tmp_path):
    """Of every row, not only of those on which it was chosen."""
    file = tmp_path / "t.jinja"
    file.write_text("{% if messages[0]['content'] == 'odd' %}ODD{% endif %}" + read_trls("phi3.jinja"))
    odd = [{"messages": [{"role": "user", "content": "odd"}, {"role": "assistant", "content": "even"}]}]
    options = {"format": "chat", "training": {"chat_template_path": str(file)}}
    shown, _ = preview(rows=CHAT, **options)
    assert shown.status == 0, shown.err
    assert "TRL's phi3_5_training.jinja stands in for the model's own" in shown.out
    refused, _ = preview(rows=[*CHAT, *odd], **options)
    assert refused.status == 1
    assert "error[no-generation-marks] dataset.train_on: TRL's phi3_5_training.jinja stands in" in refused.err
    assert "changes the text of 1 train rows: '' instead of 'ODD'" in refused.err


@pytest.fixture(scope="session")
def chatml(tokenizer, tmp_path_factory):
    """A tiny Phi-3 whose tokenizer has ChatML's tokens."""
    from transformers import Phi3Config

    from recipe_runner.model.tiny import write_tiny

    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    return str(write_tiny(Phi3Config(), made, tmp_path_factory.mktemp("models") / "chatml"))


@pytest.fixture
def qwen3(tokenizer, tmp_path):
    """A tiny model with Qwen3's template, which writes a `<think>` block into the last answer only."""
    from transformers import Qwen3Config

    from recipe_runner.model.tiny import write_tiny

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = read_trls("qwen3.jinja")
    return str(write_tiny(Qwen3Config(), tokenizer, tmp_path / "qwen3"))


def test_what_trls_training_version_changes_is_said(run_recipe, qwen3):
    model = {"name_or_path": qwen3}
    shown, _ = run_recipe(command="preview", rows=CHAT, dataset={"format": "chat"}, model=model)
    assert "warning[template-changes-text] dataset.train_on: TRL's training version stands in" in shown.out + shown.err
    assert "'<think>\\n\\n</think>\\n\\n' instead of ''" in shown.out + shown.err


def test_a_prompt_that_opens_thinking_which_rows_have_not_is_said_by_preview(preview, tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"
    )
    training = {"chat_template_path": "own.jinja", "eos_token": "<|end|>"}
    for command in ("preview", "prepare"):
        shown, _ = preview(rows=CHAT, format="chat", train_on="last", training=training, command=command)
        assert "warning[prompt-differs]" in shown.out
        assert "it goes on with '<think>\\n', and the row with " in shown.out
        assert "take rows with thinking, and dataset.thinking: keep or mask" in shown.out


def test_headings_are_before_their_turns_where_a_template_writes_earlier_turns_otherwise(run_recipe, qwen3):
    options = {"rows": CHAT, "dataset": {"format": "chat", "train_on": "completion"}, "model": {"name_or_path": qwen3}}
    shown, _ = run_recipe("-n", "1", "--rows-only", command="preview", **options)
    assert shown.status == 0, shown.err
    heads = re.findall(r"  -- (\w+)\n(<\|im_start\|>)?(\w+)", shown.out)
    assert [(role, spelt) for role, _, spelt in heads][-3:] == [("assistant",) * 2, ("user",) * 2, ("assistant",) * 2]
    assert all(start for _, start, _ in heads[-3:])


def test_turns_that_a_template_writes_as_json_are_rendered(preview, tmp_path):
    file = tmp_path / "t.jinja"
    content = "{{ m.content | tojson if m.role == 'user' else m.content }}<|end|>"
    file.write_text(WITHOUT_SYSTEM.replace("{{ m.content }}<|end|>{% endif %}", content + "{% endif %}"))
    turns = [{"role": "user", "content": 'a "quoted"\n caf\u00e9'}, {"role": "assistant", "content": "b"}]
    shown, _ = preview(rows=[{"messages": turns}] * 3, format="chat", training={"chat_template_path": str(file)})
    assert "not-rendered" not in shown.out + shown.err
    assert r""""a \"quoted\"\n caf""" in shown.out


def store():
    from recipe_runner.data.store import store_folder

    return store_folder()


def entries():
    return {folder for folder in store().glob("*") if folder.is_dir()}


def test_prepared_data_is_used_by_training_and_made_again_when_something_changes(preview, tmp_path):
    before = entries()
    assert ", made in" in preview(command="prepare", rows=TEXT, format="text")[0].out
    (made,) = entries() - before
    assert ", found in" in preview(command="prepare", rows=TEXT, format="text")[0].out
    trained, _ = preview(command="train", rows=TEXT, format="text")
    assert trained.status == 0, trained.err
    assert entries() - before == {made}
    for change in ({"training": {"max_length": 33}}, {"rows": TEXT[1:]}, {"training": PACKED}):
        count = len(entries())
        preview(command="prepare", **{"rows": TEXT, "format": "text", **change})
        assert len(entries()) == count + 1, change


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "manifest"])
def test_damaged_prepared_data_is_made_again(preview, damage):
    before = entries()
    preview(command="prepare", rows=TEXT[:7], format="text", training={"max_length": 77})
    (folder,) = entries() - before
    file = folder / ("manifest.json" if damage == "manifest" else "train.arrow")
    data = file.read_bytes()
    if damage == "bit":
        file.write_bytes(data[:-200] + bytes([data[-200] ^ 1]) + data[-199:])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2])
    again, _ = preview(command="prepare", rows=TEXT[:7], format="text", training={"max_length": 77})
    assert ", made in" in again.out
    assert file.read_bytes() == data
    assert not list(store().glob("*.partial"))


def test_page_is_one_file_that_shows_data_as_text(preview, tmp_path):
    page = tmp_path / "page.html"
    rows = [{"text": "<script>alert(1)</script> & <b>"}] * 4
    assert preview("--html", page, rows=rows, format="text")[0].status == 0
    html = page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in html
    assert "<script" not in html
    assert not re.search(r"(src|href)=|url\(|@import|http", html)
    again, _ = preview("--html", page, rows=rows, format="text")
    assert (again.status, "error[file-exists]" in again.err) == (1, True)
    assert preview("--html", page, "--force", rows=rows, format="text")[0].status == 0


TURN = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("dataset", "bad", "said"),
    [
        ({"format": "text"}, {"text": None}, "1 dropped (1 with an empty text)"),
        ({"format": "text"}, {"other": "x"}, "1 dropped (1 with an empty text)"),
        ({"format": "text"}, {"text": 7}, "9 kept, 0 dropped"),
        ({"format": "text"}, {"text": ["a"]}, "row 9: column 'text': expected a text, found list"),
        ({"format": "text"}, '{"text": "\\ud800"}', "error[unreadable-data]"),
        ({"format": "text"}, {"text": "a \x00 b"}, "9 kept, 0 dropped"),
        ({"format": "text"}, {"text": "\N{GRINNING FACE} \u05e9\u05dc\u05d5\u05dd"}, "9 kept, 0 dropped"),
        ({"format": "text"}, {"text": "long " * 600}, "1 truncated"),
        ({"format": "instruction"}, {"instruction": "", "output": "x"}, "1 dropped (1 with an empty instruction)"),
        ({"format": "instruction"}, {"output": "x"}, "1 dropped (1 with an empty instruction)"),
        ({"format": "chat"}, {"messages": None}, "error[wrong-row-shape]"),
        ({"format": "chat"}, {"messages": []}, "1 dropped (1 without turns)"),
        ({"format": "chat"}, {"messages": [TURN]}, "1 dropped (1 without an assistant turn)"),
        ({"format": "chat"}, {"messages": [{"role": "system", "content": "s"}]}, "1 without an assistant turn"),
        ({"format": "chat"}, {"messages": [{"role": "owl", "content": "s"}, ANSWER]}, "unknown role 'owl'"),
        ({"format": "chat"}, {"messages": [TURN, {"role": "assistant"}]}, "expected a text as content, found nothing"),
        ({"format": "chat"}, {"messages": [TURN, ANSWER, ANSWER]}, "9 kept, 0 dropped"),
        ({"format": "chat"}, {"messages": [TURN, {"role": "assistant", "content": ""}]}, "1 with an empty answer"),
    ],
)
def test_odd_rows_are_counted_or_named(preview, tmp_path, dataset, bad, said):
    good = {"text": [{"text": "fine"}], "instruction": [{"instruction": "q", "output": "a"}]}
    rows = good.get(dataset["format"], [{"messages": [TURN, ANSWER]}]) * 8
    lines = [json.dumps(row) for row in rows] + [bad if isinstance(bad, str) else json.dumps(bad)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    result, _ = preview(
        command="prepare", train={"source": "rows.jsonl"}, training={"max_length": 100}, max_dropped=0.2, **dataset
    )
    assert said in result.out + result.err
    assert result.status == int("error[" in result.err)
    if "wrong-row-shape" in result.err:
        assert "rows.jsonl: row 9" in result.err


def test_a_row_that_the_template_refuses_is_named(preview, tmp_path):
    template = tmp_path / "strict.jinja"
    again = "not loop.first and m.role == messages[loop.index0 - 1].role"
    rule = f"{{% if {again} %}}{{{{ raise_exception('take turns') }}}}{{% endif %}}"
    template.write_text(WITHOUT_SYSTEM.replace("%}<|{{", f"%}}{rule}<|{{{{", 1))
    rows = [{"messages": [TURN, ANSWER]}] * 8 + [{"messages": [TURN, ANSWER, ANSWER]}]
    result, _ = preview(command="prepare", rows=rows, format="chat", training={"chat_template_path": str(template)})
    assert result.status == 1
    assert "error[row-refused]" in result.err
    assert "rows.jsonl: row 9 can't be rendered: turn 3 (assistant, 'a'): take turns" in result.err


def test_a_row_for_which_the_template_does_not_end_is_named(preview, tmp_path, monkeypatch):
    for name, seconds in {"CHUNK_SECONDS": 2, "ROW_SECONDS": 1}.items():
        monkeypatch.setattr(f"recipe_runner.data.prepare.{name}", seconds)
    template = tmp_path / "endless.jinja"
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    rule = f"{{% if 'again' in m.content %}}{loops}{{% endif %}}"
    template.write_text(WITHOUT_SYSTEM.replace("%}<|{{", f"%}}{rule}<|{{{{", 1))
    rows = [{"messages": [TURN, ANSWER]}] * 8 + [{"messages": [TURN, {**ANSWER, "content": "once again"}]}]
    result, _ = preview(command="prepare", rows=rows, format="chat", training={"chat_template_path": str(template)})
    assert result.status == 1
    assert "rows.jsonl: row 9 can't be rendered: it takes more than 1 seconds; does the chat template" in result.err


def test_evaluation_rows_that_are_trained_on_are_told(preview):
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(6)]
    told = {"eval": {"source": "rows.jsonl"}}
    result, _ = preview(rows=rows, command="prepare", training={"eval_strategy": "steps"}, **told)
    assert "warning[eval-rows-in-train] dataset.eval: 6 of 6 eval rows are training rows, too (row 1 of" in result.out
    twice = [*rows, *rows]  # a fraction holds some of them out
    result, _ = preview(rows=twice, command="prepare", training={"eval_strategy": "steps"}, eval={"fraction": 0.25})
    assert "eval rows are training rows, too" in result.out
    result, _ = preview(rows=rows, command="prepare", training={"eval_strategy": "steps"}, eval={"fraction": 0.25})
    assert "eval-rows-in-train" not in result.out


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_first_rows_may_all_be_unusable(run_recipe, stage):
    good, bad = {
        "sft": ({"instruction": "q", "output": "a"}, {"instruction": "q", "output": ""}),
        "dpo": ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "", "rejected": "b"}),
    }[stage]
    rows = [bad] * 120 + [good] * 10
    result, _ = run_recipe("-n", "2", "--rows-only", command="preview", stage=stage, rows=rows)
    assert result.status == 0, result.err
    assert "rows.jsonl row 121" in result.out


def test_what_killed_preparations_left_is_removed_and_what_others_write_is_kept(preview):
    from filelock import FileLock

    from recipe_runner.data.store import store_folder

    left, written = (store_folder() / f"{key}.123.partial" for key in ("a" * 32, "b" * 32))
    for folder in (left, written):
        folder.mkdir(parents=True)
        (folder / "train.arrow").write_bytes(b"half")
    with FileLock(store_folder() / f"{'b' * 32}.lock"):
        rows = [{"instruction": "a row that", "output": "no other test has"}]
        assert preview(command="prepare", rows=rows)[0].status == 0
    assert not left.exists()
    assert written.is_dir()
    written.joinpath("train.arrow").unlink()
    written.rmdir()


def test_a_packed_row_of_many_documents_is_shortened(preview):
    rows = [{"text": f"document {number}"} for number in range(40)]
    shown, _ = preview("-n", "1", rows=rows, format="text", training=PACKED | {"max_length": 128}, command="preview")
    first = shown.out.split("train data")[0]
    assert "document 2" in first.replace("[[", "")
    assert first.count(" supervised") == 12
    assert re.search(r"-- the text of \d\d more documents is left out here: --html FILE shows it", first)


def luminance(colour):
    """Of #rrggbb, from 0 to 1. Source: WCAG 2.2, relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_text_has_contrast_in_light_and_dark():
    from recipe_runner.pages.frame import STYLE

    light, dark = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)
    for style, paper in ((light, "#ffffff"), (dark, "#0d1117")):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", style))
        for name in ("ink", "quiet", "bad", "good", "warn", *(f"c{number}" for number in range(6))):
            assert contrast(colours[name], paper) >= 4.5, name
        assert contrast(colours["ink"], colours["learned"]) >= 4.5
    assert "color: #" not in STYLE  # every text has one of these


def test_the_page_shows_rows_first_and_no_absolute_path(run_recipe, tmp_path):
    rows = [{"instruction": f"question {number}", "output": "answer"} for number in range(6)]
    result, _ = run_recipe("-n", "1", "--html", tmp_path / "p.html", command="preview", rows=rows)
    assert result.status == 0, result.err
    page = (tmp_path / "p.html").read_text()
    order = ["1 row as the model sees it", "rows.jsonl row 1: ", "<h2>train data</h2>", ">6 rows</figcaption>"]
    assert [page.index(text) for text in order] == sorted(page.index(text) for text in order)
    assert str(tmp_path) not in page
    assert "tiny-phi3; recipe-run" in page
