"""Answers while a model trains, and the golden rows at its end."""

import json

import pytest
from learned import ADAPTER, ROWS, TRAINING
from shared import LORA, PAIRS, losses, metrics

DATA = {"format": "instruction", "eval": {"source": "rows.jsonl"}, "system": "Be brief."}
ASKED = {"prompts": ["say five"], "rows": 2, "max_new_tokens": 8}


def sampled(folder):
    return [(entry["step"], entry["samples"]) for entry in metrics(folder) if "samples" in entry]


@pytest.fixture
def trained(run_recipe):
    def trained(**sections):
        sections = {"rows": ROWS, "dataset": DATA, "peft": ADAPTER, "training": TRAINING} | sections
        result, folder = run_recipe(**sections)
        assert result.status == 0, result.err
        return folder

    return trained


def test_answers_are_written_at_each_evaluation_and_change_nothing_else(trained):
    plain = trained()
    asked = trained(run={"samples": ASKED})
    assert losses(asked) == losses(plain)
    (before, first), (after, last) = sampled(asked)
    assert (before, after) == (0, 100)
    assert [sample["prompt"] for sample in last] == ["Be brief.\nsay five", "Be brief.\nsay one", "Be brief.\nsay two"]
    assert [sample["wanted"] for sample in last] == ["", "one it is", "two it is"]
    assert [sample["answer"] for sample in last[1:]] == ["one it is", "two it is"]
    assert first != last
    page = (asked / "report.html").read_text()
    assert "step 0" in page
    assert "one it is" in page


def test_answers_every_so_many_steps_take_a_tenth_of_the_time_at_most(trained, monkeypatch):
    from recipe_runner.training import samples

    training = {"eval_strategy": "no", "eval_on_start": False, "eval_steps": None, "max_steps": 10, "logging_steps": 1}
    sections = {"dataset": DATA | {"eval": None}, "training": TRAINING | training}
    sections["dataset"].pop("eval")
    sections["training"] = {key: value for key, value in sections["training"].items() if value is not None}
    sections["training"].pop("per_device_eval_batch_size")
    run = {"samples": {"prompts": ["say one"], "every": 2, "max_new_tokens": 4}}
    monkeypatch.setattr(samples, "SHARE", 1e9)
    assert [step for step, _ in sampled(trained(run=run, **sections))] == [2, 4, 6, 8, 10]
    monkeypatch.setattr(samples, "SHARE", 0)
    folder = trained(run=run, **sections)
    assert [step for step, _ in sampled(folder)] == [2, 10]  # the first, and the last
    assert [entry["samples_skipped"] for entry in metrics(folder) if "samples_skipped" in entry] == [3]


def test_pairs_are_asked_their_prompts(run_recipe):
    training = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    run = {"samples": {"rows": 1, "max_new_tokens": 4}}
    dataset = {"eval": {"source": "rows.jsonl"}}
    result, folder = run_recipe(stage="dpo", rows=PAIRS, dataset=dataset, training=training, run=run, peft=LORA)
    assert result.status == 0, result.err
    ((step, samples),) = sampled(folder)
    assert (step, samples[0]["prompt"], samples[0]["wanted"]) == (4, "say 0", "it is 0")


def golden_of(folder):
    return [json.loads(line) for line in (folder / "golden.jsonl").read_text().split("\n") if line]


def test_golden_rows_hold_the_tokens_of_prompts_and_answers(trained):
    from transformers import AutoTokenizer

    folder = trained()
    rows, tokenizer = golden_of(folder), AutoTokenizer.from_pretrained(folder / "adapter")
    assert len(rows) == 10
    assert {row["kind"] for row in rows} == {"as in the data", "without a system prompt", "several turns"}
    for row in rows:
        ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        assert row["prompt_ids"] == ids
        assert tokenizer.decode(row["answer_ids"], skip_special_tokens=True).strip() == row["answer"]
    assert [row["answer"] for row in rows[:4]] == [row["output"] for row in ROWS]
    assert all(row["ended"] for row in rows[:4])
    assert all(row["before"] not in (None, row["answer"]) for row in rows[:3])


def test_a_template_that_takes_no_system_turn_has_golden_rows_without(run_recipe, tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(template)
    training = {"chat_template_path": "own.jinja", "eos_token": "<|end|>"}
    result, folder = run_recipe(rows=ROWS, dataset={"format": "instruction"}, training=training, peft=LORA)
    assert result.status == 0, result.err
    kinds = [row["kind"] for row in golden_of(folder)]
    assert "several turns" in kinds
    assert "with a system prompt" not in kinds


def test_a_prompt_that_the_tokenizer_joins_to_its_answer_is_warned_of(run_recipe):
    """`A: {output}`: the space before an answer is a part of its first token, which a prompt alone does not have."""
    dataset = {"format": "instruction", "template": "Q: {instruction}\nA: {output}"}
    result, _ = run_recipe(rows=ROWS * 3, dataset=dataset, peft=LORA)
    assert result.status == 0, result.err
    assert (
        "warning[prompt-differs] dataset: in 12 of 12 rows the prompt alone, which a server asks, is not what is before"
        in result.err
    )
    dataset["template"] = "Q: {instruction}\nA:\n{output}"
    result, _ = run_recipe(rows=ROWS * 3, dataset=dataset, peft=LORA)
    assert "prompt-differs" not in result.err


def test_no_more_tokens_are_answered_at_a_time_than_are_trained_on(run_recipe, monkeypatch):
    """Keys and values of ten long prompts at once would take more memory than training did."""
    from transformers import GenerationMixin

    from recipe_runner.training import run as running

    shapes, generate = [], GenerationMixin.generate

    def watched(self, input_ids, **options):
        shapes.append(tuple(input_ids.shape))
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(GenerationMixin, "generate", watched)
    monkeypatch.setattr(running, "LEAST_ROOM", 16)
    rows = [{"instruction": f"say {'word ' * (20 + n)}", "output": "yes"} for n in range(12)]
    result, folder = run_recipe(
        rows=rows,
        dataset={"format": "instruction"},
        training={"per_device_train_batch_size": 3, "max_steps": 2},
        peft=LORA,
        run={"samples": {"prompts": ["say a"] * 9 + ["say " + "word " * 90], "every": 1, "max_new_tokens": 2}},
    )
    assert result.status == 0, result.err
    longest = int(result.out.split("longest    3 rows of up to ")[1].split()[0])
    assert max(height for height, _ in shapes) > 1
    assert all(height * width <= 3 * longest or height == 1 for height, width in shapes), shapes
    assert any(width > longest for _, width in shapes), "a prompt may be longer, alone"
    assert 3 <= len((folder / "golden.jsonl").read_text().splitlines()) <= 10
