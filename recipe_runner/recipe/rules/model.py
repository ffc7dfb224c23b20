"""Rules about a recipe's base model: where it is, and what its architecture allows. One small function a rule."""

import re
from pathlib import Path
from typing import Any

from recipe_runner.files import read_object
from recipe_runner.problems.problem import Found
from recipe_runner.recipe.sections import ModelSection, UpstreamSection

_ATTENTION = ("q_proj", "k_proj", "v_proj")
# Pattern of a model's name or type -> its name for people, and separate projections -> the fused one.
_FUSED = {
    r"phi-?[34](?!-small)": (
        "Phi-3",
        {**dict.fromkeys(_ATTENTION, "qkv_proj"), **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")},
    ),
    r"pythia|neox|falcon(?![-_]?(h1|e-|mamba|3))|bloom": (
        "this architecture",
        dict.fromkeys(_ATTENTION, "query_key_value"),
    ),
}


def remote_code_unpinned(model: ModelSection) -> Found:
    """Code from the hub runs on this machine: the recipe must say which code."""
    pinned = re.fullmatch(r"[0-9a-f]{40}", model.revision)
    if model.trust_remote_code and not pinned and not model.folder:
        fix = "set model.revision to a full commit hash"
        yield ("model", "trust_remote_code"), "remote code from a revision that can change", fix


def local_model(model: ModelSection) -> Found:
    """A local folder has no revision, and a hub id is not the name of a folder here."""
    name = model.name_or_path
    if model.folder:
        if model.revision != "main":
            yield ("model", "revision"), "a local folder has no revision", "remove the key"
    elif Path(name).is_dir():
        found = f"the folder {name} in the current folder would be taken for the hub id"
        yield ("model", "name_or_path"), found, f"write its path ({Path(name).absolute()}), or work in another folder"


def fused_projections(model: ModelSection, peft: UpstreamSection) -> Found:
    """Some architectures fuse their projections: the names of Llama's match nothing.

    Source: transformers/models/{phi3,gpt_neox,falcon,bloom}. Phi-4 models are of the phi3 architecture.
    """
    targets = peft["target_modules"]
    if not isinstance(targets, list):
        return
    kind = str(_local_config(model).get("model_type", Path(model.name_or_path).name.lower()))
    for pattern, (name, fusions) in _FUSED.items():
        if re.search(pattern, kind):
            for index, target in enumerate(targets):
                if fused := fusions.get(target):
                    place = ("peft", "target_modules", index)
                    yield place, f"{name} has no '{target}'", f"use '{fused}', or all-linear"


def context_length(model: ModelSection, training: UpstreamSection, peft: UpstreamSection) -> Found:
    """Tokens beyond the model's context are out of its range; virtual ones of a prompt stand before the row's."""
    virtual = peft["num_virtual_tokens"] or 0
    length = training.said.get("max_length") or 0
    if not length and not virtual:
        return
    context = find_context(model.name_or_path, model.folder)
    if isinstance(context, int) and length + virtual > context:
        found = f"{length} tokens{f' and {virtual} virtual ones' * bool(virtual)}, the model's context is {context}"
        if length:
            yield ("training", "max_length"), found, f"lower it to {max(context - virtual, 1)} at most"
        else:
            yield ("peft", "num_virtual_tokens"), found, "20 to 100 are usual"


def find_context(name: str, folder: Path | None) -> int | None:
    """The tokens that a model can see: a local one's config.json says it, and some hub ids do (4k, 128k)."""
    said = re.search(r"-(\d+)k(-|$)", Path(name).name.lower())
    known = int(said[1]) * 1024 if said else None
    found = read_object(folder / "config.json").get("max_position_embeddings", known) if folder else known
    return found if isinstance(found, int) else None


def _local_config(model: ModelSection) -> dict[str, Any]:
    """The config.json of a local model; empty when there is none that can be read: training says why."""
    return read_object(model.folder / "config.json") if model.folder else {}
