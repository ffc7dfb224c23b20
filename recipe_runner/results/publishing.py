"""`recipe-run push`: a result on the hub, with a card that others can use and no path of this machine in any file."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils._validators import validate_repo_id

from recipe_runner.files import read_object
from recipe_runner.model.hub import explain_hub_error
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.recipe.document import dump_values
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import CONFIG
from recipe_runner.results.merging import NAME as MERGED
from recipe_runner.results.target import Target
from recipe_runner.training.card import describe_header, write_usage

SUFFIXES = (".json", ".jsonl", ".txt", ".md", ".jinja", ".model", ".safetensors", ".yaml")
LEFT_OUT = ("README.md", "golden.jsonl", "merge.json", "Modelfile")  # the card is written anew; rows may be private
PATH = re.compile(r"(?<![\w.:/~-])(?:~|\.\.?)?(?:/[\w.@+ -]*[\w.@+-])+/?")  # from a root, the home or a folder on


@dataclass(frozen=True)
class Upload:
    """What is uploaded.

    Attributes:
        repository: Its id on the hub.
        folder: The files, as they are uploaded.
        private: Whether only the owner sees it.
    """

    repository: str
    folder: Path
    private: bool


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
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise user_error("repository-name", first_line(error), "write --repo NAME/RESULT") from error
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
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in SUFFIXES and file.name not in LEFT_OUT:
            shutil.copyfile(file, folder / file.name)
    if (folder / CONFIG).is_file():
        config = read_object(folder / CONFIG) | {"base_model_name_or_path": known}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kind = "adapter" if target.is_adapter and not merged else "model"
    card = compose_card(target.run, recipe, kind, known, repository)
    (folder / "README.md").write_text(card, encoding="utf-8")
    _refuse_paths(folder)
    return Upload(repository, folder, private)


def compose_card(run: Path, recipe: Recipe, kind: str, base: str | None, repository: str) -> str:
    """The model card of a published result: front matter, what it is, how to use it, the recipe."""
    own = (run / "README.md").read_text(encoding="utf-8").partition("\n---\n")[2]
    facts = [
        line
        for line in own.partition("\n## ")[0].split("\n")
        if line.startswith("- ") and not line.startswith("- Base model:")
    ]
    header = describe_header(recipe, kind == "adapter", base)
    parts = [
        f"---\n{dump_values(header)}---\n",
        f"# {repository.rpartition('/')[2]}\n",
        f"{recipe.description}\n",
        *([f"- Base model: `{base}`"] if base else []),
        *facts,
        *_describe_evaluation(run),
        f"\n## Use\n\n```python\n{write_usage(base or '', kind, repository, recipe.peft['method'])}```\n",
        "## Recipe\n\nAs it was run, with everything resolved:\n",
        f"```yaml\n{dump_values(dict(recipe.values))}```\n",
    ]
    return shorten_paths("\n".join(parts), recipe)


def _describe_evaluation(run: Path) -> Iterator[str]:
    """The figures of the latest evaluation, as a table of Markdown."""
    found = sorted(run.glob("evaluations/*/results.json"))
    columns = read_object(found[-1]).get("columns") if found else None
    if not isinstance(columns, dict):
        return
    yield "\n## Evaluation\n\n| | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns)
    for name in dict.fromkeys(measure for of in columns.values() for measure in of):
        cells = (of.get(name, {}).get("value") for of in columns.values())
        yield f"| {name} | " + " | ".join("-" if cell is None else f"{cell:.3f}" for cell in cells) + " |"


def shorten_paths(text: str, recipe: Recipe) -> str:
    """A text in which files of this machine are named by their last name."""
    named: list[str | None] = [source.source for source in recipe.dataset.sources]
    named += [
        recipe.model.name_or_path,
        recipe.model.adapter,
        recipe.training["chat_template_path"],
        recipe.run.output_dir,
    ]
    for path in sorted({name for name in named if name and Path(name).is_absolute()}, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return PATH.sub(lambda match: Path(match[0].rstrip("/")).name if _is_place(match[0]) else match[0], text)


def _is_place(text: str) -> bool:
    """Whether a text is a place in this machine's files: below the home, or below a folder that there is."""
    if text.startswith("~"):
        return True
    parts = Path(text).parts
    return text.startswith("/") and len(parts) > 2 and Path(*parts[:2]).is_dir()


def _refuse_paths(folder: Path) -> None:
    """Checks that no text file names the person's home or the current folder.

    Raises:
        UserError: One does.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".model"):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for place in {str(Path.home()), str(Path.cwd())} - {"/"}:
            if f"{place}/" in text:
                message = f"{file.name} names a place on this machine: {place}/"
                raise user_error("path-in-upload", message, "take it out of that file in the run folder")


def list_files(upload: Upload) -> list[tuple[str, int]]:
    """Name and bytes of each file."""
    return [(file.name, file.stat().st_size) for file in sorted(upload.folder.iterdir())]


def send(upload: Upload, update: bool) -> str:
    """Uploads, and returns the address. The token is the one that huggingface_hub finds.

    Raises:
        UserError: The hub can't be reached, refuses, or has such a repository already.
    """
    api = HfApi()
    try:
        there = api.repo_exists(upload.repository)
        if there and not update:
            fix = "choose another --repo, or --update it: its history is kept"
            raise user_error("repository-exists", f"{upload.repository} is on the hub already", fix)
        api.create_repo(upload.repository, private=upload.private, exist_ok=update)
        done: Any = api.upload_folder(
            repo_id=upload.repository, folder_path=str(upload.folder), commit_message="Upload by recipe-run push"
        )
    except UserError:
        raise
    except Exception as error:  # of the hub, or of whatever package carries its requests
        raise _explain(error, upload.repository) from error
    return str(getattr(done, "repo_url", "") or f"https://huggingface.co/{upload.repository}")


def _explain(error: Exception, repository: str) -> Exception:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        message = f"{repository}: the hub does not let this account write there ({first_line(error)})"
        return user_error("hub-refused", message, "`hf auth login`, or set HF_TOKEN to a token that may write")
    if isinstance(error, HfHubHTTPError) and status:
        return user_error("hub-refused", f"{repository}: status {status}: {first_line(error)}", "check --repo")
    _, what, _ = explain_hub_error(error)
    message = f"{repository}: {what} ({first_line(error)})"
    return user_error("hub-unreachable", message, "check the network; nothing is lost: push again")
