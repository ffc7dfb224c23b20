"""`recipe-run check-server`: what a server does wrong is found, and its cause is named."""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PLAIN = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}### assistant:"


class Fake:
    """A server with OpenAI's interface around the golden rows of a run, which does one thing wrong."""

    def __init__(self, run, fault=""):
        from transformers import AutoTokenizer

        self.rows = [json.loads(line) for line in (run / "golden.jsonl").read_text().splitlines()]
        self.tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
        self.fault = fault
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(
                    200, {"data": [{"id": "tuned"}] if fake.fault != "two models" else [{"id": "a"}, {"id": "b"}]}
                )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(*fake.answer(self.path, body))

            def reply(self, status, value):
                text = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def render(self, messages):
        turns = messages
        if self.fault == "system dropped":
            turns = [turn for turn in messages if turn["role"] != "system"]
        if self.fault == "earlier turns dropped":
            turns = messages[-1:]
        options = {"chat_template": PLAIN} if self.fault == "other template" else {}
        generation = self.fault != "no generation prompt"
        ids = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=generation, return_dict=False, tokenize=True, **options
        )
        return [self.tokenizer.bos_token_id or 0] * (self.fault == "bos twice") + list(ids)

    def answer(self, path, body):
        if path == "/tokenize" and self.fault.startswith("shows"):
            return 200, {"tokens": self.render(body["messages"]), "count": 1}
        if not path.startswith("/v1/"):
            return 404, {"error": "not here"}
        if self.fault == "error 500":
            return 500, {"error": "no memory"}
        if self.fault == "no json":
            return 200, b"<html>hello</html>"
        if self.fault == "no completion":
            return 200, {"object": "list"}
        row = next(row for row in self.rows if row["messages"] == body["messages"])
        ids, text, finish = self.render(body["messages"]), row["answer"], "stop" if row["ended"] else "length"
        if self.fault == "no stop":
            text, finish = text + " and so on and on", "length"
        if self.fault == "prints stop":
            text, finish = text + "<|end|>\n<|user|>\nand", "length"
        if self.fault == "the base":
            text = row["before"] or "something else"
        usage = {} if self.fault == "no usage" else {"usage": {"prompt_tokens": len(ids)}}
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
        return 200, {"choices": [choice], **usage}


@pytest.fixture
def serve(learned):
    servers = []

    def serve(fault="", run=learned):
        servers.append(Fake(run, fault))
        return servers[-1].url

    yield serve
    for fake in servers:
        fake.server.shutdown()
        fake.server.server_close()


def test_a_server_that_does_as_in_training(run_cli, learned, serve):
    result = run_cli("check-server", serve(), "--run", learned)
    assert result.status == 0, result.err
    assert "This server does not show its tokens" in result.out
    assert len(re.findall(r"^ +\d+ .*\d+ of \d+ +stop +same text$", result.out, flags=re.MULTILINE)) == 10
    result = run_cli("check-server", f"{serve('shows')}/v1", "--run", learned)
    assert result.status == 0, result.err
    assert result.out.count("same ids") == 10


CAUSES = {
    "system dropped": "likely cause: the system prompt is dropped",
    "bos twice": "likely cause: BOS twice",
    "no generation prompt": "likely cause: the generation prompt is missing",
    "earlier turns dropped": "likely cause: earlier turns are dropped",
    "other template": "likely cause: another chat template",
    "no stop": "likely cause: the stop token <|endoftext|> is missing",
    "prints stop": "answers print <|end|>",
}


@pytest.mark.parametrize("fault", CAUSES)
def test_the_likely_cause_is_named(run_cli, learned, copy_of, serve, fault):
    run = learned
    if fault == "bos twice":  # needs a tokenizer that has one
        run = copy_of(learned)
        config = json.loads((run / "adapter" / "tokenizer_config.json").read_text())
        (run / "adapter" / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|endoftext|>"}))
    result = run_cli("check-server", serve(fault, run), "--run", run)
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert "error[server-differs]" in result.err
    assert CAUSES[fault] in result.err


def test_answers_of_the_base_are_a_hint_and_no_error(run_cli, learned, serve):
    result = run_cli("check-server", serve("the base"), "--run", learned)
    assert result.status == 0, result.err
    assert "hint: the answers are those of the base: is the adapter loaded?" in result.out


def test_what_a_server_does_not_tell_is_said(run_cli, learned, serve):
    result = run_cli("check-server", serve("no usage"), "--run", learned)
    assert result.status == 0, result.err
    assert "It does not count the prompt's tokens, either" in result.out


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("error 500", "server-refused"),
        ("no json", "server-unreachable"),
        ("no completion", "server-unreachable"),
        ("two models", "server-model"),
    ],
)
def test_a_server_that_answers_something_else_is_one_line(run_cli, learned, serve, fault, code):
    result = run_cli("check-server", serve(fault), "--run", learned)
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert f"error[{code}]" in result.err


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "localhost:8000", "http://nowhere.invalid"])
def test_no_server_is_one_line(run_cli, learned, url):
    result = run_cli("check-server", url, "--run", learned)
    assert (result.status, result.err.count("\n")) == (1, 1), result.err
    assert "error[server-unreachable]" in result.err


def test_a_run_without_golden_rows_is_one_line(run_cli, learned, copy_of):
    run = copy_of(learned)
    (run / "golden.jsonl").write_text("{")
    assert "error[golden-damaged]" in run_cli("check-server", "http://127.0.0.1:9", "--run", run).err
    (run / "golden.jsonl").unlink()
    assert "error[no-golden-rows]" in run_cli("check-server", "http://127.0.0.1:9", "--run", run).err


def test_transformers_serve_is_checked_with_a_fault_in_its_template(run_cli, learned, tmp_path, unused_tcp_port):
    """A real server, with the merged model: first as it was saved, then with a template that drops system prompts."""
    folder = tmp_path / "merged"
    assert run_cli("merge", learned, "--output", folder).status == 0
    template = folder / "chat_template.jinja"

    def check():
        command = [Path(sys.executable).parent / "transformers", "serve", folder, "--port", str(unused_tcp_port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{unused_tcp_port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            url = f"http://127.0.0.1:{unused_tcp_port}"
            return run_cli("check-server", url, "--run", learned, "--model", folder)
        finally:
            server.terminate()
            server.wait(30)

    fine = check()
    assert fine.status == 0, fine.err + fine.out
    assert fine.out.count("same text") == 10
    template.write_text(
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + template.read_text()
    )
    wrong = check()
    assert wrong.status == 1
    assert "likely cause: the system prompt is dropped" in wrong.err


@pytest.fixture
def unused_tcp_port():
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
