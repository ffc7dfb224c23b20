"""Facts of the models that shipped recipes name: `recipes/models.json`, each from a source that it names."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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


@cache
def read_models() -> dict[str, ModelFacts]:
    """All facts, by the id of the model."""
    entries = json.loads((shelf() / "recipes" / FILE).read_text(encoding="utf-8"))
    return {
        name: ModelFacts(
            name,
            entry["model_type"],
            entry["config"],
            entry["parameters"],
            entry["license"],
            entry["gated"],
            entry["context"],
            entry["tokens"],
            entry["template"],
            tuple(entry["sources"]),
        )
        for name, entry in entries.items()
    }


def find_facts(model: str) -> ModelFacts | None:
    """The facts of a model: by its id, or by the name of its folder; None where there are none."""
    models = read_models()
    folder = Path(model).name
    return models.get(model) or next(
        (facts for name, facts in models.items() if Path(model).is_absolute() and name.endswith(f"/{folder}")), None
    )
