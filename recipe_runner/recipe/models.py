"""Facts of the models that shipped recipes name: `recipes/models.json`, each from a source that it names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recipe_runner.files import read_json
from recipe_runner.problems.errors import user_error
from recipe_runner.problems.problem import Mark
from recipe_runner.problems.words import suggest
from recipe_runner.recipe.library import shelf

FILE = "models.json"
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a published model.

    Attributes:
        name: Its id on the hub.
        model_type: transformers' name of the architecture.
        config: What its `config.json` says of the architecture.
        published: Its number of parameters, as its publisher writes it: `3.8B`.
        license: Of the weights.
        gated: Whether the hub asks for agreement first; None where that is not known.
        context: Tokens that it can see.
        tokens: `bos`, `eos`, `pad` and `stops`, at which it stops to generate.
        template: Its chat template: `trl/NAME` for one that TRL stores, else a file in `recipes/templates/`; empty for
            none.
        sources: Where all this was read: `what` and `where`.
    """

    name: str
    model_type: str
    config: Mapping[str, Any]
    published: str
    license: str
    gated: bool | None
    context: int
    tokens: Mapping[str, Any]
    template: str
    sources: tuple[Mapping[str, str], ...]

    @property
    def parameters(self) -> int:
        """The published number."""
        return read_count(self.published)


def read_count(text: str) -> int:
    """A number of parameters as people write it: 3.8B, 135M, 3,821,079,552.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"([0-9][0-9,]*(?:\.[0-9]+)?)\s*([KMB]?)", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"'{text}' is no number of parameters: write 3.8B or 135M")
    return round(float(found[1].replace(",", "")) * _UNITS.get(found[2].upper(), 1))


# Key of an entry -> the types that its value may have.
_KEYS: dict[str, tuple[type, ...]] = {
    "model_type": (str,),
    "config": (dict,),
    "parameters": (str,),
    "license": (str,),
    "gated": (bool, type(None)),
    "context": (int,),
    "tokens": (dict,),
    "template": (str,),
    "sources": (list,),
}
_WORDS = {str: "a text", dict: "an object", bool: "true or false", type(None): "null", int: "a number", list: "a list"}


@cache
def read_models() -> dict[str, ModelFacts]:
    """All facts, by the id of the model.

    Raises:
        UserError: The file is no JSON, or an entry lacks something.
    """
    file = shelf() / "recipes" / FILE
    try:
        entries = read_json(file)
    except ValueError as error:
        raise user_error("model-facts", f"it is no JSON: {error}", "correct it", Mark(str(file))) from error
    return {name: _read_entry(name, entry, file) for name, entry in entries.items()}


def _read_entry(name: str, entry: Mapping[str, Any], file: Path) -> ModelFacts:
    place = Mark(str(file))
    for key, types in _KEYS.items():
        wanted = " or ".join(_WORDS[kind] for kind in types)
        if key not in entry:
            raise user_error("model-facts", f"{name}: '{key}' is missing", f"give it {wanted}", place)
        if not isinstance(entry[key], types):
            message = f"{name}: '{key}' is {entry[key]!r}"
            raise user_error("model-facts", message, f"it is {wanted}", place)
    if unknown := [key for key in entry if key not in _KEYS]:
        fix = suggest(unknown[0], list(_KEYS)) or f"keys: {', '.join(_KEYS)}"
        raise user_error("model-facts", f"{name}: unknown key '{unknown[0]}'", fix, place)
    try:
        read_count(entry["parameters"])
    except ValueError as error:
        raise user_error("model-facts", f"{name}: {error}", "", place) from error
    template = entry["template"]
    if template and not template.startswith("trl/") and not (file.parent / "templates" / template).is_file():
        fix = "put it in recipes/templates/, name one of TRL's (trl/NAME), or leave the text empty"
        raise user_error("model-facts", f"{name}: there is no template {template}", fix, place)
    values = {key: entry[key] for key in _KEYS if key not in ("parameters", "sources")}
    return ModelFacts(name=name, published=entry["parameters"], sources=tuple(entry["sources"]), **values)


def find_facts(model: str) -> ModelFacts | None:
    """The facts of a model: by its id, or by the name of its folder; None where there are none."""
    models = read_models()
    folder = Path(model).name
    return models.get(model) or next(
        (facts for name, facts in models.items() if Path(model).is_absolute() and name.endswith(f"/{folder}")), None
    )
