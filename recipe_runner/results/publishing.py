"""`recipe-run push`: a result on the hub, with a card that others can use and no path of this machine in any file."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import SafetensorError, safe_open

from recipe_runner.files import read_json, read_object, read_text
from recipe_runner.model.hub import explain_hub_error
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.recipe.document import dump_values
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import CONFIG
from recipe_runner.results.merging import NAME as MERGED
from recipe_runner.results.target import Target
from recipe_runner.runs.report import latest_evaluation
from recipe_runner.training.card import describe_header, write_usage

# What is sent: the result as transformers and PEFT save it. What else is in its folder may be private.
SENT = re.compile(
    r"(adapter_|generation_|tokenizer_|special_tokens_|processor_|)(config|map)\.json|(adapter_)?model[\w.-]*\.safetensors"
    r"|model\.safetensors\.index\.json|(tokenizer|vocab|added_tokens)\.json|merges\.txt|vocab\.txt|[\w.]+\.model"
    r"|[\w.-]+\.jinja"
)
VOCABULARY = ("tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt", "vocab.txt")  # has words like /usr
# A place in files: from a root, from the home of somebody, from a folder above; addresses on the web are none.
PATH = re.compile(r"(?<![\w.~/-])(?<!https:)(?<!http:)((?:~[\w-]*|\.\.?)?(?:/+[^\s/'\"`,;:()\[\]{}<>|*]+)+/?)")


@dataclass(frozen=True)
class Upload:
    """What is uploaded.

    Attributes:
        repository: Its id on the hub.
        folder: The files, as they are uploaded.
        private: Whether only the owner sees it.
        left: Names of files in the result's folder that are not sent.
    """

    repository: str
    folder: Path
    private: bool
    left: tuple[str, ...]


def stage_upload(
    target: Target, merged: bool, base: str | None, repository: str, folder: Path, private: bool
) -> Upload:
    """Copies a result into a folder as it is to be published, with a new card.

    Args:
        target: A completed run.
        merged: Whether the merged model is published, instead of the adapter.
        base: The base model's id on the hub, where training took it from a folder.
        repository: The id on the hub.
        folder: An empty one.
        private: Whether only the owner sees it.

    Raises:
        UserError: There is nothing to publish, the base is unknown to others, or a file names a place on this machine.
    """
    for option, name in (("--repo", repository), ("--base-model", base)):
        try:
            validate_repo_id(name or repository)
        except HFValidationError as error:
            raise user_error("repository-name", f"{option}: {first_line(error)}", "write ACCOUNT/NAME") from error
    if target.run is None or target.recipe is None:
        raise user_error("run-not-found", f"{target.name} is no run", "name a run folder: its recipe is in the card")
    source = target.run / MERGED if merged else Path(target.result)
    if merged and not (source / "config.json").is_file():
        fix = f"recipe-run merge {target.run}" if target.is_adapter else "leave out --merged"
        raise user_error("not-merged", f"{source} holds no merged model", fix)
    recipe = target.recipe
    known = base or (recipe.model.name_or_path if not recipe.model.folder else None)
    if known is None and target.is_adapter and not merged:
        message = (
            f"the base is a folder of this machine, {recipe.model.name_or_path}: nobody else could load the adapter"
        )
        raise user_error("base-unknown", message, "name it on the hub: --base-model ID")
    left = []
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.is_symlink() and SENT.fullmatch(file.name):
            shutil.copyfile(file, folder / file.name)
        elif file.name != "README.md":
            left.append(file.name)
    _check_whole(folder, source)
    if (folder / CONFIG).is_file():
        config = read_object(folder / CONFIG) | {"base_model_name_or_path": known}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kind = "adapter" if target.is_adapter and not merged else "model"
    card = compose_card(target.run, recipe, kind, known, repository)
    (folder / "README.md").write_text(card, encoding="utf-8")
    _refuse_paths(folder)
    return Upload(repository, folder, private, tuple(left))


def _check_whole(folder: Path, source: Path) -> None:
    """Checks that weights and configuration can be read.

    Raises:
        UserError: They can't.
    """
    if not any(folder.glob("*.safetensors")):
        raise user_error("result-not-loaded", f"{source} holds no weights", "was it copied whole?")
    for file in sorted(folder.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(str(file), framework="pt") as tensors:
                    tensors.keys()
            elif file.suffix == ".json":
                read_json(file)
        except (SafetensorError, OSError, ValueError) as error:
            message = f"{source / file.name} is damaged: {first_line(error)}"
            raise user_error("result-not-loaded", message, "was it copied whole?") from error


def compose_card(run: Path, recipe: Recipe, kind: str, base: str | None, repository: str) -> str:
    """The model card of a published result: front matter, what it is, how to use it, the recipe."""
    own = _read_card(run).partition("\n---\n")[2]
    facts = [
        line
        for line in own.partition("\n## ")[0].split("\n")
        if line.startswith("- ") and not line.startswith("- Base model:")
    ]
    header = describe_header(recipe, kind == "adapter", base)
    usage = write_usage(base or "", kind, repository, recipe.peft["method"], recipe.stage.scores)
    parts = [
        f"---\n{dump_values(header)}---\n",
        f"# {repository.rpartition('/')[2]}\n",
        f"{recipe.description}\n",
        *([f"- Base model: `{base}`"] if base else []),
        *facts,
        *_describe_evaluation(run),
        f"\n## Use\n\n```python\n{usage}```\n",
        "## Recipe\n\nAs it was run, with everything resolved:\n",
        f"```yaml\n{dump_values(dict(recipe.values))}```\n",
    ]
    return shorten_paths("\n".join(parts), recipe)


def _read_card(run: Path) -> str:
    """The run's own card, whose facts are told; empty where it is gone."""
    try:
        return read_text(run / "README.md")
    except (OSError, ValueError):
        return ""


def _describe_evaluation(run: Path) -> Iterator[str]:
    """The figures of the latest evaluation, as a table of Markdown."""
    found = latest_evaluation(run)
    columns = read_object(found).get("columns") if found else None
    table = {
        str(name): {
            measure: cell["value"] for measure, cell in of.items() if isinstance(cell, dict) and "value" in cell
        }
        for name, of in (columns.items() if isinstance(columns, dict) else ())
        if isinstance(of, dict)
    }
    if not table:
        return
    yield "\n## Evaluation\n\n| | " + " | ".join(table) + " |\n|---|" + "---:|" * len(table)
    for measure in dict.fromkeys(name for of in table.values() for name in of):
        cells = (of.get(measure) for of in table.values())
        yield f"| {measure} | " + " | ".join(f"{c:.3f}" if isinstance(c, int | float) else "-" for c in cells) + " |"


def shorten_paths(text: str, recipe: Recipe) -> str:
    """A text in which files of this machine are named by their last name."""
    written = [path for path in [recipe.run.output_dir] if Path(path).is_absolute()]
    for path in sorted([*recipe.local_paths, *written], key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return PATH.sub(lambda match: Path(match[1].rstrip("/")).name if _is_place(match[1]) else match[1], text)


def _is_place(text: str) -> bool:
    """Whether a text is a place in this machine's files: from a home or a folder above on, or in a folder there is."""
    if text.startswith(("~", "../", "./")):
        return True
    parts = [part for part in text.split("/") if part]
    return len(parts) > 1 and Path("/", parts[0]).is_dir()


def _refuse_paths(folder: Path) -> None:
    """Checks that no file but the vocabulary names a place on this machine.

    Raises:
        UserError: One does.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".model") or file.name in VOCABULARY:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if place := next((match[1] for match in PATH.finditer(text) if _is_place(match[1])), ""):
            message = f"{file.name} names a place on this machine: {place}"
            raise user_error("path-in-upload", message, "take it out of that file of the result")


def list_files(upload: Upload) -> list[tuple[str, int]]:
    """Name and bytes of each file."""
    return [(file.name, file.stat().st_size) for file in sorted(upload.folder.iterdir())]


def send(upload: Upload, update: bool) -> str:
    """Uploads, and returns the address. The token is the one that huggingface_hub finds.

    Raises:
        UserError: The hub can't be reached, refuses, or has such a repository already.
    """
    api, created = HfApi(), False
    try:
        if api.repo_exists(upload.repository) and not update:
            fix = "choose another --repo, or --update it: its history is kept"
            raise user_error("repository-exists", f"{upload.repository} is on the hub already", fix)
        api.create_repo(upload.repository, private=upload.private, exist_ok=update)
        created = True
        done: Any = api.upload_folder(
            repo_id=upload.repository, folder_path=str(upload.folder), commit_message="Upload by recipe-run push"
        )
    except UserError:
        raise
    except Exception as error:  # of the hub, or of whatever package carries its requests
        raise _explain(error, upload.repository, "push again" + " with --update" * created) from error
    return str(getattr(done, "repo_url", "") or f"https://huggingface.co/{upload.repository}")


def _explain(error: Exception, repository: str, again: str) -> UserError:
    """What went wrong at the hub; the token is in no message."""
    told, token = first_line(error).removesuffix("None.").strip(), get_token()
    told = told.replace(token, "***") if token else told
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, UnicodeError):
        return user_error(
            "hub-refused", "the token holds characters that no token has", "copy it again: `hf auth login`"
        )
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        message = f"{repository}: the hub does not let this account write there ({told})"
        return user_error("hub-refused", message, "`hf auth login`, or set HF_TOKEN to a token that may write")
    if isinstance(error, HfHubHTTPError) and status:
        fix = f"the hub is busy: later, {again}" if status == 429 or status >= 500 else f"check --repo; then {again}"
        return user_error("hub-refused", f"{repository}: status {status}: {told}", fix)
    _, what, _ = explain_hub_error(error)
    return user_error("hub-unreachable", f"{repository}: {what} ({told})", f"check the network; then {again}")
