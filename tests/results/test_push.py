"""`recipe-run push`: what is sent, what is not, and what is said when the hub does not take it. No hub is reached."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

BASE = ("--base-model", "someone/some-base")


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what it is sent; `fails` is raised by the upload."""
    found = SimpleNamespace(files={}, made=[], there=False, fails=None)

    class Api:
        def repo_exists(self, repository):
            return found.there

        def create_repo(self, repository, private, exist_ok):
            found.made.append((repository, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            if found.fails:
                raise found.fails
            found.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
            return SimpleNamespace(repo_url=f"https://hub/{repo_id}")

    monkeypatch.setattr("recipe_runner.results.publishing.HfApi", Api)
    return found


def card_of(text):
    header, _, body = text.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(header), body


def test_an_adapter_is_sent_with_a_card_that_others_can_use(run_cli, learned, copy_of, hub):
    run = copy_of(learned)
    assert run_cli("evaluate", run, "--limit", "2", "--max-new-tokens", "8").status == 0
    (run / "adapter" / "notes.txt").write_text("private")
    (run / "adapter" / "secret.json").symlink_to("/etc/hostname")
    result = run_cli("push", run, "--repo", "me/tickets", "--private", *BASE)
    assert result.status == 0, result.err
    assert result.out == "https://hub/me/tickets\n"
    assert hub.made == [("me/tickets", True, False)]
    assert sorted(hub.files) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "left here: notes.txt, secret.json" in result.err
    header, body = card_of(hub.files["README.md"].decode())
    assert header == {
        "base_model": "someone/some-base", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["trl", "sft"],
    }  # fmt: skip
    assert 'folder = "me/tickets"' in body
    assert re.search(r"^\| exact_match \| 0\.000 \| 1\.000 \|$", body, flags=re.MULTILINE)
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "someone/some-base"
    places = (str(run), str(run.parent), "/tmp/", f"{Path.home()}/")
    for name, data in hub.files.items():
        assert not [place for place in places if place.encode() in data], name


def test_what_a_recipe_says_of_places_is_not_sent(run_cli, learned, copy_of, hub):
    run = copy_of(learned)
    values = yaml.safe_load((run / "resolved.yaml").read_text())
    odd = "see file:///usr/share/x.json, //usr/lib/dd, ~root/x, ../up/secret and https://hub/a/b, either/or"
    values |= {"description": odd, "metadata": {"license": "MIT", "tags": ["s:/usr/share/tag"]}}
    values["dataset"]["train"] = [values["dataset"]["train"], {"source": "someone/some-data", "split": "train"}]
    (run / "resolved.yaml").write_text(yaml.safe_dump(values))
    assert run_cli("push", run, "--repo", "me/x", *BASE).status == 0
    text = hub.files["README.md"].decode()
    header, body = card_of(text)
    assert header["license"] == "mit"
    assert header["datasets"] == ["someone/some-data"]
    for place in ("/usr", "~root", "../up"):
        assert place not in text
    assert "see file:x.json, dd, x, secret and https://hub/a/b, either/or" in body


def test_a_dry_run_shows_files_and_card_and_sends_nothing(run_cli, learned, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    result = run_cli("push", learned, "--repo", "me/tickets", "--dry-run", *BASE)
    assert result.status == 0, result.err
    assert (hub.made, hub.files) == ([], {})
    assert re.search(r"^ +[\d,]+ bytes  adapter_model\.safetensors$", result.out, flags=re.MULTILINE)
    assert "base_model: someone/some-base" in result.out
    assert "hf_verysecret" not in result.out + result.err
    assert not [file for file in learned.rglob("*") if file.is_file() and b"hf_verysecret" in file.read_bytes()]


def test_the_merged_model_is_sent_once_it_is_there(run_cli, learned, copy_of, hub):
    run = copy_of(learned)
    result = run_cli("push", run, "--repo", "me/x", "--merged")
    assert (result.status, "error[not-merged]" in result.err, str(run) in result.err) == (1, True, True)
    assert run_cli("merge", run).status == 0
    assert run_cli("push", run, "--repo", "me/x", "--merged").status == 0
    assert "model.safetensors" in hub.files
    assert not hub.files.keys() & {"golden.jsonl", "merge.json", "Modelfile", "adapter_config.json"}
    header, body = card_of(hub.files["README.md"].decode())
    assert header["library_name"] == "transformers"
    assert "AutoPeftModel" not in body


def test_a_whole_model_needs_no_base(run_cli, whole, hub):
    assert run_cli("push", whole, "--repo", "me/x").status == 0
    assert "base_model" not in card_of(hub.files["README.md"].decode())[0]


def test_a_repository_that_is_there_is_written_into_only_when_asked(run_cli, learned, hub):
    hub.there = True
    result = run_cli("push", learned, "--repo", "me/x", *BASE)
    assert (result.status, "error[repository-exists]" in result.err, hub.made) == (1, True, [])
    assert run_cli("push", learned, "--repo", "me/x", "--update", *BASE).status == 0
    assert hub.made == [("me/x", False, True)]


def hub_error(status):
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    request = httpx2.Request("POST", "https://hub")
    return HfHubHTTPError(f"{status} bad for Bearer hf_verysecret", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ConnectionError("refused"),
            "error[hub-unreachable] me/x: the hub did not answer (refused); check the network",
        ),
        (403, "error[hub-refused] me/x: the hub does not let this account write there"),
        (500, "error[hub-refused] me/x: status 500"),
        (
            UnicodeEncodeError("ascii", "é", 0, 1, "no"),
            "error[hub-refused] the token holds characters that no token has",
        ),
    ],
    ids=["network", "403", "500", "token"],
)
def test_a_hub_that_does_not_take_it_is_one_line(run_cli, learned, hub, monkeypatch, error, said):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    hub.fails = hub_error(error) if isinstance(error, int) else error
    result = run_cli("push", learned, "--repo", "me/x", *BASE)
    lines = [line for line in result.err.splitlines() if "error[" in line]
    assert (result.status, len(lines)) == (1, 1), result.err
    assert said in lines[0]
    assert "hf_verysecret" not in result.err
    if error == 500:
        assert "--update" in lines[0]  # the repository was made already


def test_what_cannot_be_sent_is_one_line(run_cli, learned, copy_of, hub, tiny_phi3):
    def said(run, *options):
        result = run_cli("push", run, "--repo", "me/x", *options)
        assert (result.status, hub.made) == (1, []), result.err
        (line,) = [line for line in result.err.splitlines() if "error[" in line]
        return re.search(r"error\[([a-z-]+)\]", line)[1]

    assert said(learned) == "base-unknown"
    assert said(learned, "--base-model", str(tiny_phi3)) == "repository-name"
    assert said(tiny_phi3) == "run-not-found"
    run = copy_of(learned)
    template = run / "adapter" / "chat_template.jinja"
    own = template.read_text()
    template.write_text(own + "{# from /usr/share/templates/x.jinja #}")
    (run / "golden.jsonl").unlink()  # else it is the tokenizer that is not what it was
    assert said(run, *BASE) == "path-in-upload"
    template.write_text(own)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert said(run, *BASE) == "result-not-loaded"
    (run / "adapter" / "adapter_config.json").write_text('{"peft_type": "LO')
    assert said(run, *BASE) == "result-not-loaded"
    result = run_cli("push", learned, "--repo", "a/b/c", *BASE)
    assert "error[repository-name]" in result.err
