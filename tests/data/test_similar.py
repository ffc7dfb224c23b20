"""Rows that say nearly the same: counted before training, named where held-out rows are like training rows."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from recipe_runner.data.similar import SIMILAR, _cut, find_similar, find_similar_among, sketch

WORDS = [f"word{n}" for n in range(300)]


def write(seed, count=60):
    return random.Random(seed).choices(WORDS, k=count)


def row(words):
    return {"instruction": " ".join(words[:20]), "output": " ".join(words[20:])}


def change(words, *places):
    return [f"other{place}" if place in places else word for place, word in enumerate(words)]


def test_rows_that_say_nearly_the_same_are_counted_and_named(run_recipe, run_cli, tmp_path):
    rows = [row(write(seed)) for seed in range(8)]
    near, far = change(write(0), 30), change(write(1), *range(0, 60, 6))
    held = [row(write(100)), row(change(write(2), 45)), row(write(3)), row(far)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    dataset = {"format": "instruction", "eval": {"source": "held.jsonl"}}
    training = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "max_length": 512}
    result, folder = run_recipe(rows=[*rows, row(near), row(far)], dataset=dataset, training=training)
    assert result.status == 0, result.err
    assert "10 kept, 0 dropped, 0 truncated, 1 near duplicates;" in result.out
    message = "warning[eval-rows-near-train] dataset.eval: 1 of 4 eval rows say nearly the same as training rows"
    assert f"{message} (row 2 of held.jsonl is like row 3 of rows.jsonl);" in result.out + result.err
    assert "2 of 4 eval rows are training rows, too (row 3 of held.jsonl is row 4 of rows.jsonl; row 4" in (
        result.out + result.err
    )
    assert run_cli("evaluate", folder, "--rows").status == 0
    entries = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    flags = {(entry["split"], entry["row"]): " ".join(entry["flags"]) for entry in entries}
    assert "nearly the same as row 1 of" in flags["train", 9]
    assert f"nearly the same as row 3 of {tmp_path / 'rows.jsonl'}, which was trained on" in flags["eval", 2]
    assert sum("nearly" in told for told in flags.values()) == 2


def test_what_is_found_is_what_the_sets_of_pieces_say():
    chance = random.Random(7)
    rows = [{"text": " ".join(write(seed))} for seed in range(300)]
    for seed in range(300):
        changed = change(write(seed), *chance.sample(range(60), chance.choice([1, 2, 4, 8])))
        rows.append({"text": " ".join(changed)})
    pieces = [set(_cut(each)) for each in rows]
    found = find_similar(sketch(rows))
    shares = [len(one & two) / len(one | two) for one, two in zip(pieces[:300], pieces[300:], strict=True)]
    assert (found[:300] == -1).all()
    assert all(place in (-1, number) for number, place in enumerate(found[300:]))
    right = [share for share, place in zip(shares, found[300:], strict=True) if place >= 0]
    assert min(right) > SIMILAR - 0.15
    missed = [share for share, place in zip(shares, found[300:], strict=True) if place < 0]
    assert sum(share > SIMILAR + 0.1 for share in missed) == 0
    assert len(right) > 100
    among = find_similar_among(sketch(rows[300:]), sketch(rows[:300]))
    assert np.array_equal(among, found[300:])


def test_rows_that_are_like_each_other_are_found_among_others_all_the_same():
    chance = random.Random(3)

    def vary(words):
        return {"text": " ".join(change(words, chance.randrange(60)))}

    train = [{"text": " ".join(write(seed))} for seed in range(200)]
    held = [vary(write(seed)) for seed in range(200) for _ in range(3)]
    found = find_similar_among(sketch(held), sketch(train))
    assert all(place in (-1, number // 3) for number, place in enumerate(found))
    alone = find_similar_among(sketch(held[2::3]), sketch(train))
    assert (found[2::3] == alone).all()
    assert (found >= 0).mean() > 0.9


def test_a_system_prompt_that_rows_share_makes_none_alike():
    system = {"role": "system", "content": " ".join(write(99, 200))}

    def chat(seed):
        asked, said = write(seed, 10), write(seed + 500, 10)
        roles = (("user", asked), ("assistant", said))
        return {"messages": [system, *({"role": role, "content": " ".join(words)} for role, words in roles)]}

    assert (find_similar(sketch([chat(seed) for seed in range(50)])) == -1).all()
    assert find_similar(sketch([chat(1), chat(2), chat(1)])).tolist() == [-1, -1, 0]


def test_rows_are_alike_only_with_the_same_images_and_calls():
    text = " ".join(write(1, 20))
    shown = [{"text": text, "images": [{"path": None, "bytes": content}]} for content in (b"one", b"two", b"one")]
    assert find_similar(sketch(shown)).tolist() == [-1, -1, 0]

    def call(seed):
        calls = [{"type": "function", "function": {"name": "look", "arguments": {"for": " ".join(write(seed, 20))}}}]
        turns = [
            {"role": "user", "content": "please look it up"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        return {"messages": turns}

    assert find_similar(sketch([call(1), call(2), call(1)])).tolist() == [-1, -1, 0]


def test_letters_are_words_where_no_spaces_are_written():
    text = "今日は天気がとても良いので、公園まで散歩に行き、友達と一緒に昼ご飯を食べました。明日は雨が降るそうです。"
    rows = [{"text": text}, {"text": text.replace("友達", "家族")}, {"text": text[::-1]}]
    assert find_similar(sketch(rows)).tolist() == [-1, 0, -1]


def test_short_rows_and_none_are_never_alike():
    assert find_similar(sketch([{"text": "yes"}, {"text": "yes"}, {"text": ""}])).tolist() == [-1, -1, -1]
    assert find_similar(sketch([])).tolist() == []


def test_no_threads_are_left_for_which_forked_processes_would_wait():
    """Linux alone forks (`workers.METHOD`), and alone lists threads there."""
    tasks = Path("/proc/self/task")
    before = len(list(tasks.glob("*")))
    sketch([{"text": " ".join(write(seed))} for seed in range(3000)])
    assert len(list(tasks.glob("*"))) == before


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_two_answers_of_a_pair_are_not_each_other_s_duplicates(run_cli, write_recipe, tiny_phi3, tmp_path, stage):
    asked = [" ".join(write(seed, 60)) for seed in range(4)]
    pairs = [
        {"prompt": ask, "chosen": "yes it is", "rejected": "no it is not"} for ask in [*asked, change_one(asked[0])]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = write_recipe(
        stage=stage,
        model={"name_or_path": str(tiny_phi3)},
        dataset={"format": "preference", "train": {"source": "rows.jsonl"}},
    )
    result = run_cli("prepare", recipe)
    assert result.status == 0, result.err
    assert ", 1 near duplicates;" in result.out


def change_one(text):
    return " ".join(change(text.split(), 30))
