"""What is prepared in batches, and by several processes, against TRL's own preparation of one row at a time."""

import dataclasses

import pytest
from templated import FOLDER, TEMPLATES, prepare, prepare_by_trl

TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "  two, zwei, deux \n"},
    {"role": "user", "content": "three 🦙 é"},
    {"role": "assistant", "content": "four"},
]
CHATS = [TURNS, TURNS[:2], [{"role": "system", "content": "Be brief."}, *TURNS], TURNS * 3]


def usable(tokenizer, chats):
    """Those conversations that a template takes, and in which it marks something, if it has marks."""
    from jinja2 import TemplateError

    found = []
    for chat in chats:
        try:
            tokenizer.apply_chat_template(chat, tokenize=False)
        except (TemplateError, TypeError):
            continue
        found.append(chat)
    return found


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_every_template_gives_what_trl_makes_of_it(tokenizer_of, job_of, template):
    tokenizer = tokenizer_of(template)
    chats = usable(tokenizer, CHATS)
    assert len(chats) >= 3, "the template takes usual conversations"
    ways = ["completion", "all"] + (["assistant"] if "{% generation %}" in template.read_text("utf-8") else [])
    for train_on in ways:
        for length in (None, 25):
            talks = [{"messages": chat} for chat in chats]
            job = job_of("sft", talks, tokenizer, {"max_length": length}, format="chat", train_on=train_on)
            rows = [{"messages": chat} for chat in chats]
            if train_on == "completion":
                rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats]
            assert prepare(job)[0] == prepare_by_trl(job, rows), (train_on, length)
    pairs = [
        {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [{"role": "assistant", "content": "no"}]}
        for chat in chats
    ]
    job = job_of("dpo", pairs, tokenizer, {"max_length": None})
    theirs = [row for row in prepare_by_trl(job, pairs) if row["chosen_ids"] != row["rejected_ids"]]
    assert prepare(job)[0] == theirs  # a template that renders no text makes all answers alike
    judged = [
        {"prompt": chat[:-1], "completion": chat[-1:], "label": bool(place % 2)} for place, chat in enumerate(chats)
    ]
    job = job_of("kto", judged, tokenizer, {"max_length": None})
    ours = [{name: row[name] for name in ("prompt_ids", "completion_ids")} for row in prepare(job)[0]]
    assert ours == prepare_by_trl(job, judged)


def test_plain_texts_are_those_of_trl(tokenizer_of, job_of):
    tokenizer = tokenizer_of(TEMPLATES[0])
    rows = [{"text": "first"}, {"text": f"second {tokenizer.eos_token}"}, {"text": " third\n\n"}]
    job = job_of("pretrain", rows, tokenizer, {"packing": False})
    job = dataclasses.replace(job, stage=dataclasses.replace(job.stage, name="sft"))
    assert prepare(job)[0] == prepare_by_trl(job, rows)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_rows_are_those_of_trl_for_any_number_of_workers(tokenizer_of, job_of, strategy):
    """More rows than TRL packs together, and than a worker takes at once; every seventh is dropped."""
    tokenizer = tokenizer_of(FOLDER / "qwen2_5_training.jinja")
    rows = [{"text": "" if number % 7 == 3 else f"{number} " * (number % 23 + 1)} for number in range(3200)]
    training = {"max_length": 64, "packing": True, "packing_strategy": strategy}
    job = job_of("pretrain", rows, tokenizer, training, max_dropped=0.5)
    kept = [row for row in rows if row["text"]]
    job = dataclasses.replace(job, stage=dataclasses.replace(job.stage, name="sft"))
    theirs = [{name: row[name] for name in ("input_ids", "labels")} for row in prepare_by_trl(job, kept)]
    for workers in (1, 2, 3):
        ours, tally = prepare(job, workers)
        assert ours == theirs, workers
        assert tally.dropped == {"with an empty text": 457}
        assert tally.packed_rows == len(ours)


def test_accounting_and_key_are_the_same_for_any_number_of_workers(tokenizer_of, job_of):
    from recipe_runner.data.store import describe_origin

    tokenizer = tokenizer_of(FOLDER / "qwen2_5_training.jinja")
    rows = [{"messages": CHATS[number % 4] if number % 9 else []} for number in range(2500)]
    jobs = [job_of("sft", rows, tokenizer, {"max_length": 80}, format="chat", workers=count) for count in (1, 2)]
    found = [prepare(job, workers) for job, workers in zip(jobs, (1, 3), strict=True)]
    assert found[0][0] == found[1][0]
    counted = [dataclasses.asdict(tally.finish()) for _, tally in found]
    assert counted[0] == counted[1]
    assert counted[0]["dropped"] == {"without turns": 278}
    assert describe_origin(jobs[0]) == describe_origin(jobs[1])
