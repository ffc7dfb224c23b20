"""The sections of a resolved recipe, typed: the one border between YAML and functions that need a few of its values.

The fields of `ModelSection`, `DatasetSection`, `SourceSection` and `RunSection` are the keys of the schema, which
documents them; `test_house.py` compares the two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipe_runner.problems.problem import KeyPath


@dataclass(frozen=True)
class UpstreamSection:
    """A section whose keys are the fields of an upstream class.

    Attributes:
        said: What the recipe says (with our own defaults).
        defaults: What upstream's class takes for the rest, from `schema/upstream`.
    """

    said: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def __bool__(self) -> bool:
        """Whether the recipe has the section."""
        return bool(self.said)

    def __getitem__(self, key: str) -> Any:
        """What holds: the recipe's value, else upstream's default; None where the class has no such field."""
        return self.said[key] if key in self.said else self.defaults.get(key)


@dataclass(frozen=True)
class ModelSection:
    """`model`: the base model, and the adapter that training continues from."""

    name_or_path: str
    revision: str
    use_safetensors: bool
    trust_remote_code: bool
    adapter: str | None = None
    teacher: str | None = None
    teacher_revision: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    add_tokens: Sequence[str] = ()
    add_special_tokens: Sequence[str] = ()
    experts_implementation: str | None = None
    use_kernels: bool = False
    new_weights: Sequence[str] = ()
    unused_weights: Sequence[str] = ()

    @property
    def folder(self) -> Path | None:
        """The model's folder; None for a model on the hub."""
        return Path(self.name_or_path) if Path(self.name_or_path).is_absolute() else None

    @property
    def adds_tokens(self) -> bool:
        """Whether the tokenizer gets more tokens than it has."""
        return bool(self.add_tokens or self.add_special_tokens)

    @property
    def location(self) -> dict[str, Any]:
        """What `from_pretrained` needs beside the name."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class SourceSection:
    """One source of rows, and `path`, where the recipe names it."""

    path: KeyPath
    source: str
    split: str
    subset: str | None = None
    revision: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    sample_by: str | None = None
    field: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    limit: int | None = None
    weight: float | None = None
    epochs: float | None = None
    format: str | None = None


@dataclass(frozen=True)
class DatasetSection:
    """`dataset`: sources, layout, and which tokens are learned. `eval` is empty where a `fraction` is held out."""

    format: str
    train: tuple[SourceSection, ...]
    on_overlong: str
    max_dropped: float
    workers: int | None = None
    streaming: bool = False
    ignore: Sequence[str] = ()
    eval: tuple[SourceSection, ...] = ()
    fraction: float | None = None
    train_on: str | None = None
    reward_columns: Sequence[str] = ()
    system: str | None = None
    input_separator: str = "\n\n"
    merge_system: bool = False
    merge_turns: bool = False
    thinking: str = "keep"
    weight_by: str = "rows"
    template: str | Mapping[str, str] | None = None
    images: str | None = None
    image_folder: str | None = None

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """All sources, those of the training data first."""
        return (*self.train, *self.eval)

    def of(self, source: SourceSection) -> "DatasetSection":
        """The section with the layout of a source's rows."""
        return replace(self, format=source.format) if source.format else self

    @property
    def has_eval(self) -> bool:
        """Whether there is evaluation data."""
        return bool(self.eval) or self.fraction is not None

    @property
    def is_plain_text(self) -> bool:
        """Whether rows are rendered without the chat template."""
        return self.format in ("text", "segments") or self.template is not None


@dataclass(frozen=True)
class RewardSection:
    """One of `rewards`: a model, a known function by name, or one of the user's own."""

    weight: float
    tokenizer: str
    model: str | None = None
    name: str | None = None
    function: str | None = None
    column: str | None = None
    key: str | None = None
    pattern: str | None = None
    min: int | None = None
    max: int | None = None
    ngram_size: int | None = None
    max_penalty: float | None = None
    soft_punish_cache: int | None = None


@dataclass(frozen=True)
class RunSection:
    """`run`: where results go, and the seed."""

    output_dir: str
    seed: int
    global_batch_size: int | None = None
    allow_code: bool = False
    longest_batch_first: bool = True
    early_stopping: Mapping[str, Any] | None = None
    samples: Mapping[str, Any] | None = None


def read_dataset(section: Mapping[str, Any]) -> DatasetSection:
    """The dataset section of a recipe, typed."""
    held_out = section.get("eval") or {}
    fraction = held_out.get("fraction") if isinstance(held_out, dict) else None
    values = {key: value for key, value in section.items() if key not in ("train", "eval")}
    evaluation = () if fraction is not None else _read_sources(held_out, "eval")
    return DatasetSection(**values, train=_read_sources(section["train"], "train"), eval=evaluation, fraction=fraction)


def _read_sources(entry: Any, split: str) -> tuple[SourceSection, ...]:
    if isinstance(entry, list):
        return tuple(SourceSection(("dataset", split, number), **source) for number, source in enumerate(entry))
    return (SourceSection(("dataset", split), **entry),) if entry else ()
