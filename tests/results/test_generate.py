"""`recipe-run generate`: a model's answers, as transformers' own generate gives them to the prompts of training."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

QUESTIONS = ("say one", "say two", "say three", "say four")


@pytest.fixture(scope="session")
def expected(learned):
    """Question -> the answers of tuned model and base, by transformers alone, one by one."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(learned / "adapter", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(learned / "adapter")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]

    def answer(question):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=0)
        return tokenizer.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    tuned = {question: answer(question) for question in QUESTIONS}
    with model.disable_adapter():
        return tuned, {question: answer(question) for question in QUESTIONS}


def test_prompts_get_the_answers_of_training(run_cli, learned, expected):
    result = run_cli("generate", learned, *(f"--prompt={text}" for text in QUESTIONS), "--max-new-tokens", 8)
    assert result.status == 0, result.err
    said = dict(re.findall(r"^> (.+)\n(.+)$", result.out, flags=re.MULTILINE))
    assert said == expected[0]
    assert said["say two"] == "two it is"  # it learned something: the system prompt is in the prompt, too


def test_the_base_is_asked_the_same_with_the_adapter_switched_off(run_cli, learned, expected, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "id": text[-3:]}) + "\n" for text in QUESTIONS))
    output = tmp_path / "answers.jsonl"
    options = ("--file", prompts, "--output", output, "--compare-base", "--max-new-tokens", 8, "--batch-size", 3)
    result = run_cli("generate", learned, *options)
    assert result.status == 0, result.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(QUESTIONS)  # in their order, whatever the batches were
    assert [row["id"] for row in rows] == [text[-3:] for text in QUESTIONS]
    assert {row["prompt"]: row["answer"] for row in rows} == expected[0]
    assert {row["prompt"]: row["base_answer"] for row in rows} == expected[1]
    result = run_cli("generate", learned, *options)
    assert (result.status, "error[file-exists]" in result.err) == (1, True)


def test_a_whole_model_has_no_adapter_to_switch_off(run_cli, whole):
    result = run_cli("generate", whole, "--prompt", "say two", "--compare-base")
    assert result.status == 1
    assert "error[no-adapter]" in result.err
    assert "evaluate" in result.err


def test_an_interrupted_file_goes_on_where_it_stopped(run_cli, learned, tmp_path, monkeypatch):
    from recipe_runner.results import generation

    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    options = ("--file", prompts, "--output", output, "--max-new-tokens", "8", "--batch-size", "1")
    answered, ask = [], generation.answer_prompts

    def stop_after_two(model, tokenizer, rows, *args, **kwargs):
        for place, answers in enumerate(ask(model, tokenizer, rows, *args, **kwargs)):
            if len(answered) == 2:
                raise KeyboardInterrupt
            answered.append(place)
            yield answers

    monkeypatch.setattr(generation, "answer_prompts", stop_after_two)
    assert run_cli("generate", learned, *options).status == 130
    assert not output.exists()
    partial = tmp_path / "answers.jsonl.partial"
    partial.write_text(partial.read_text() + '{"place": 3, "ans')  # killed while it wrote
    monkeypatch.setattr(generation, "answer_prompts", ask)
    other = run_cli("generate", learned, *options, "--temperature", "0.5")
    assert (other.status, "error[other-settings]" in other.err) == (1, True)
    result = run_cli("generate", learned, *options)
    assert result.status == 0, result.err
    assert "2 of 4 answered" in result.err
    assert "1 of 4 answered" not in result.err  # what was answered is not asked again
    assert [json.loads(line)["answer"] for line in output.read_text().splitlines()] == [
        f"{text[4:]} it is" for text in QUESTIONS
    ]
    assert not partial.exists()


def test_sampling_is_by_transformers_names_and_by_the_seed(run_cli, learned):
    def ask(*options):
        result = run_cli("generate", learned, "--prompt", "tell me", "--max-new-tokens", 12, *options)
        assert result.status == 0, result.err
        return result.out

    hot = ("--temperature", "5.0", "--top-k", "0")
    assert ask(*hot) == ask(*hot)
    assert ask(*hot) != ask(*hot, "--seed", "7")
    assert ask("--temperature", "0") == ask("--no-do-sample")


PROMPTS = [
    ('{"prompt": ""}', "error[empty-prompt] PROMPTS: the prompt of line 1 is empty; write a prompt"),
    ('{"prompt": "a"}\n{"prompt": 3}', "PROMPTS:2:1: error[prompts-unreadable] neither a prompt nor messages"),
    ("not json", "PROMPTS:1:1: error[prompts-unreadable] no JSON"),
    ("", "error[prompts-unreadable] PROMPTS holds no prompt"),
    ("[" * 200_000, "PROMPTS:1:1: error[prompts-unreadable] no JSON"),
    ('{"prompt": "a", "answer": "gold"}', "PROMPTS:1:1: error[prompts-unreadable] a line has 'answer' already"),
    ('{"prompt": "\\ud800"}', "error[prompts-unreadable] PROMPTS: the prompt of line 1 is not valid Unicode"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "error[prompts-unreadable] the last turn is an answer"),
    ('{"messages": [{"role": "user"}]}', "error[prompts-unreadable] a turn is no {role, content}"),
    (json.dumps({"prompt": "word " * 4000}), "error[prompt-too-long] PROMPTS: the prompt of line 1 has"),
]


@pytest.mark.parametrize(("text", "said"), PROMPTS, ids=[said[:40] for _, said in PROMPTS])
def test_a_prompt_that_cannot_be_asked_is_one_line(run_cli, learned, tmp_path, text, said):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    result = run_cli("generate", learned, "--file", file, "--output", tmp_path / "out.jsonl")
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert said.replace("PROMPTS", str(file)) in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl"]


def test_lines_are_as_json_has_them(run_cli, learned, tmp_path):
    """A mark at the begin of a file, and characters that Python takes for the end of a line."""
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    file.write_text('\ufeff{"prompt": "say\u2028two"}\n\n{"prompt": "say\x85one"}\n', encoding="utf-8")
    result = run_cli("generate", learned, "--file", file, "--output", output, "--max-new-tokens", 4)
    assert result.status == 0, result.err
    rows = [json.loads(line) for line in output.read_text().split("\n") if line]
    assert [row["prompt"] for row in rows] == ["say\u2028two", "say\x85one"]


def test_virtual_tokens_get_no_padding(train, tmp_path):
    """PEFT gives such a model no position ids: what pads a prompt would count."""
    from recipe_runner.data.prompts import render_prompt
    from recipe_runner.model.answers import GREEDY, answer_all
    from recipe_runner.model.load import load_result

    model, tokenizer = load_result(train("prompts", peft={"method": "prompt_tuning", "num_virtual_tokens": 8}))
    texts = ["say one", "say two and then all that comes to mind, at length", "say three", "four"]
    prompts = [render_prompt([{"role": "user", "content": text}], tokenizer) for text in texts]
    options = GREEDY | {"max_new_tokens": 8, "min_new_tokens": 8}
    together, alone = (answer_all(model, tokenizer, prompts, size, **options) for size in (4, 1))
    assert together == alone


OPTIONS = [
    ("--temperature", "nan"), ("--num-beams", "1000"), ("--seed", "99999999999"), ("--max-new-tokens", "0"),
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option[0])
def test_an_option_that_cannot_be_is_exit_status_2(run_cli, learned, option):
    assert run_cli("generate", learned, "--prompt", "x", *option).status == 2


def test_a_prompt_that_spells_a_special_token_is_warned_of(run_cli, learned):
    result = run_cli("generate", learned, "--prompt", "say <|end|>", "--max-new-tokens", 2)
    assert result.status == 0
    assert "warning[special-tokens-in-prompt] a prompt spells <|end|>" in result.err


def test_what_cannot_be_asked_is_one_line(run_cli, learned, copy_of, tmp_path):
    run = copy_of(learned)
    (run / "status.json").write_text(json.dumps({"status": "running"}))
    for name, code in (
        (run, "run-not-completed"),
        (run.parent, "run-not-completed"),
        (tmp_path / "nowhere", "run-not-found"),
        ("someone/some-model", "hub-unreachable"),
    ):
        result = run_cli("generate", name, "--prompt", "x")
        assert (result.status, result.err.count("\n")) == (1, 1), result.err
        assert f"error[{code}]" in result.err


def test_a_result_that_is_not_what_it_was_is_one_line(run_cli, learned, copy_of):
    def said(run):
        result = run_cli("generate", run, "--prompt", "say one")
        assert (result.status, result.err.count("\n")) == (1, 1), result.err
        return re.search(r"error\[([a-z-]+)\]", result.err)[1]

    run = copy_of(learned)
    resolved = (run / "resolved.yaml").read_text()
    (run / "resolved.yaml").write_text(resolved + "made_by: another version\n")
    assert said(run) == "other-version"
    (run / "resolved.yaml").write_text(resolved)
    template = run / "adapter" / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before.replace("<|user|>", "<|assistant|>"))
    assert said(run) == "tokenizer-changed"
    template.write_text(before)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    moved = config | {"base_model_name_or_path": "/nowhere/base"}
    environment = json.loads((run / "environment.json").read_text())
    environment["base_model"]["name_or_path"] = "/nowhere/base"
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(moved))
    assert said(run) == "base-moved"
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert said(run) == "result-not-loaded"


def test_a_plain_text_template_is_filled(train, run_cli):
    run = train("plain", dataset={"template": "Q: {instruction}\nA:\n{output}"})
    from recipe_runner.results.generation import Asker
    from recipe_runner.runs.find import recipe_of

    prompt = Asker(None, recipe_of(run).dataset, {}, 1).pose("say two").content
    assert prompt == "Q: say two\nA:\n"
    golden = json.loads((run / "golden.jsonl").read_text().splitlines()[1])
    assert golden["text"] == prompt  # as in training
    result = run_cli("generate", run, "--prompt", "say two", "--max-new-tokens", 32)
    assert result.out.strip() == golden["answer"], result.err


class Terminal:
    """A terminal with a conversation in it."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "recipe_runner", "generate", *map(str, arguments)]
        environment = os.environ | {"TERM": "dumb", "COLUMNS": "80"}
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment)
        os.close(slave)
        self.waiting = ""

    def read_until(self, text, seconds=90):
        """Reads until a text comes; what came after it is kept for the next call."""
        end = time.monotonic() + seconds
        while text not in self.waiting:
            assert time.monotonic() < end, f"{text!r} did not come: {self.waiting}"
            if select.select([self.master], [], [], 1)[0]:
                self.waiting += os.read(self.master, 4096).decode()
        self.waiting = self.waiting.partition(text)[2]

    def type(self, text):
        os.write(self.master, text.encode())


def test_a_conversation_in_a_terminal(learned):
    terminal = Terminal(learned, "--max-new-tokens", "150", "--temperature", "50", "--top-k", "0")
    terminal.read_until("> ")
    try:
        terminal.type("tell me a long story\n")
        terminal.read_until("story\r\n")
        terminal.process.send_signal(signal.SIGINT)  # wherever it is: reading, thinking, answering
        terminal.type("/reset\n")
        terminal.read_until("A new conversation.")
        terminal.read_until("> ")
        terminal.process.send_signal(signal.SIGINT)  # at the prompt, Ctrl-C ends nothing either
        terminal.type("\n")
        terminal.read_until("> ")
        for _ in range(60):  # a signal that comes just before readline waits is noticed at the next key, and takes it
            if terminal.process.poll() is not None:
                break
            terminal.type("\x04")
            time.sleep(0.5)
        assert terminal.process.poll() == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()


def test_ctrl_c_ends_an_answer_and_not_the_program(learned):
    from recipe_runner.results import chat
    from recipe_runner.results.generation import open_asker
    from recipe_runner.results.target import find_target

    asker = open_asker(find_target(str(learned)), None, True, {"max_new_tokens": 100, "min_new_tokens": 100}, 42)
    made = []

    class Impatient(chat.Words):
        def put(self, value):
            made.append(value)
            if len(made) == 4:
                signal.raise_signal(signal.SIGINT)

    words, chat.Words = chat.Words, Impatient
    typed = iter(["say two"])
    try:
        chat.talk(asker, False, lambda _: next(typed, None) or pytest.fail("ended"), lambda text: None)
    except pytest.fail.Exception:
        pass  # it asked for the next line: it goes on
    finally:
        chat.Words = words
    assert 4 <= len(made) <= 5


def test_turns_before_are_part_of_a_conversation(learned):
    from recipe_runner.results.chat import talk
    from recipe_runner.results.generation import open_asker
    from recipe_runner.results.target import find_target

    asker = open_asker(find_target(str(learned)), None, True, {"max_new_tokens": 8}, 42)
    typed, said, rendered = iter(["say two", "say one", "/reset", "say four", ""]), [], []
    render = type(asker).render

    def read(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    def remember(self, prompt, what):
        rendered.append([(turn["role"], turn["content"]) for turn in prompt.content])
        return render(self, prompt, what)

    type(asker).render = remember
    try:
        talk(asker, True, read, said.append)
    finally:
        type(asker).render = render
    system, two = ("system", "Be brief."), ("user", "say two")
    assert rendered[0] == [system, two]
    assert rendered[1] == [system, two, ("assistant", "two it is"), ("user", "say one")]
    assert rendered[2] == [system, ("user", "say four")]
    assert any("four it is" in line and " | " in line for line in said)  # base and tuned, side by side


def test_two_answers_stand_side_by_side_where_there_is_room():
    from recipe_runner.results.chat import side_by_side

    wide = side_by_side("one two three " * 6, "yes", 80)
    assert all(len(line) <= 80 for line in wide.splitlines())
    assert wide.splitlines()[0].split() == ["base", "|", "tuned"]
    assert side_by_side("a", "b", 40) == "base: a\ntuned: b"
