"""Writes a new recipe: valid, commented, ready to run."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from recipe_runner.recipe import schema
from recipe_runner.recipe.document import write_scalar
from recipe_runner.recipe.library import find_shipped
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.stages import FORMATS, STAGES

# For editors: the whole schema, of the version that is developed.
SCHEMA = "https://raw.githubusercontent.com/recipe-runner/recipe-runner/main/schema/recipe.bundle.schema.json"
BATCH, INTERVAL = 4, 100  # rows on a device; steps between evaluations
CHARACTERS, TURNS = 3, 40  # characters of a token, fewer than most have; tokens of the chat template
OFFERED = 100  # tokens of what templates say of tools beside the declarations: Qwen 3's says 90
LENGTHS = (256, 512, 1024, 2048, 4096)
FEW = 500  # rows: below, several epochs of small steps
# Role -> columns that hold it in well-known data sets, which are taken for it by themselves; conversations with a label
# end with what is judged (ShareGPT).
OTHER_NAMES = {
    "messages": ("conversations",),
    "prompt": ("conversations",),
    "tools": ("functions",),
    "images": ("image",),
    "completion": ("messages", "conversations"),
    "label": ("kto_tag",),
}
# Role -> what else its column is called, in data of other tools: what is proposed where none of these is there.
FAMILIAR = {
    "messages": ("conversation", "turns", "dialog", "dialogue"),
    "instruction": ("question", "query", "prompt", "problem"),
    "output": ("answer", "response", "reply", "completion", "target", "solution"),
    "input": ("context",),
    "prompt": ("question", "query", "instruction"),
    "completion": ("answer", "response", "output"),
    "text": ("content", "document", "body", "article"),
}
# Columns whose names say that they change what the model should see or learn -> the role that takes them, if any.
SYSTEM = ("system_prompt", "system_message", "sys_prompt")
MEANINGS = {"context": "input", **dict.fromkeys(SYSTEM, "system")} | dict.fromkeys(
    (
        *("chat_template_kwargs", "chat_history", "conversation_history", "chain_of_thought", "cot"),
        *("sample_weight", "loss_weight", "image_url", "documents"),
        *("system", "history", "input", "label", "kto_tag", "weight", "reasoning_content", "reasoning", "thinking"),
        *("tools", "functions", "images", "image", "videos", "video", "audios", "audio"),
    ),
    "",
)
MAY_BE_LISTS = ("prompt", "chosen", "rejected", "completion", "tools", "history")
BESIDE = ("../", "data/", "reward_functions/", "samples/", "templates/")  # how paths of shipped recipes begin
Columns = Mapping[str, Sequence[Any]]  # of local data: name -> its cells in the first rows
QUANTIZATION = """\
quantization:                      # 4-bit NormalFloat weights under the adapter: QLoRA
  load_in_4bit: true
  bnb_4bit_quant_type: nf4
  bnb_4bit_use_double_quant: true  # saves about 0.4 bit per weight
  bnb_4bit_compute_dtype: bfloat16
"""
PEFT = """\
peft:
  method: lora
  r: 16                            # rank: more room to learn, more memory
  lora_alpha: 32
  target_modules: all-linear
"""


def stage_for(form: str) -> str:
    """The stage that a new recipe has for a format: the first that takes it."""
    return next(stage for stage in STAGES if form in schema.formats_of(stage))


def guess_format(look: Columns) -> str | None:
    """The first format whose columns are there: pairs may have turns beside them, and turns plain texts."""
    order = ("preference", "unpaired_preference", "segments", "chat", "instruction", "text")
    return next((form for form in order if not find_columns(form, look, {})[1]), None)


def find_columns(form: str, look: Columns, given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Maps the roles of a format to columns of local data.

    Args:
        form: The format.
        look: Column -> its cells in the first rows.
        given: Role -> column, as the person says.

    Returns:
        Role -> column; and the roles that must have one and have none.
    """
    layout = FORMATS[form]
    columns, missing = dict(given), []
    for role in (role for role in (*layout.required, *layout.optional, *layout.context) if role not in given):
        free = [column for column in look if column not in columns.values() and _suits(role, look[column])]
        names = names_of(role)
        known = {column.strip().lower(): column for column in free}
        if found := next((known[name] for name in names if name in known), None):
            columns[role] = found
        elif role in layout.required:
            missing.append(role)
    return columns, missing


def names_of(role: str) -> tuple[str, ...]:
    """What the column of a role may be called, the likeliest first."""
    return (role, *OTHER_NAMES.get(role, ()), *FAMILIAR.get(role, ()))


def _suits(role: str, cells: Sequence[Any]) -> bool:
    """Whether the cells of a column can be what a role is for: lists of turns, true and false, texts."""
    cells = [cell for cell in cells if cell is not None]
    if role == "messages":
        return bool(cells) and all(isinstance(cell, list) for cell in cells)
    if role == "segments":
        parts = [part for cell in cells if isinstance(cell, list) for part in cell]
        return bool(parts) and all(isinstance(part, dict) and {"text", "label"} <= part.keys() for part in parts)
    if role == "label":
        return bool(cells) and all(isinstance(cell, bool) or str(cell).lower() in ("true", "false") for cell in cells)
    return not any(isinstance(cell, list) for cell in cells) or role in MAY_BE_LISTS


class Looked(Protocol):
    """What `data.look.Look` has."""

    @property
    def rows(self) -> int:
        """How many rows there are."""

    @property
    def options(self) -> Mapping[str, str]:
        """Keys of a source that say how it is written."""

    @property
    def characters(self) -> int:
        """Of the longest rows."""


def compose(
    name: str,
    model: str,
    stage_name: str,
    form: str,
    way: str,
    data: str,
    columns: Mapping[str, str],
    look: Looked | None,
    context: int | None = None,
    ignored: Sequence[str] = (),
) -> str:
    """The text of a recipe.

    Args:
        name: Its name.
        model: Hub id or folder.
        stage_name: Of a stage that takes the format.
        form: Format of the data.
        way: What is tuned, of `methods.WAYS`.
        data: Hub id, or file as it is named from the recipe.
        columns: Role -> column.
        look: What is in local data: batches, steps, evaluations and the length of rows suit it.
        context: Tokens that the model can see, where that is known.
        ignored: Columns that say something and have no place in the format: a run would refuse them.
    """
    stage = STAGES[stage_name]
    rows = look.rows if look else None
    rates = stage.full_rates if way == "full" else stage.adapter_rates
    why = "all weights take small steps" if way == "full" else "adapters start from zero and take larger steps"
    packing = "  packing: true                    # documents share rows, without seeing each other\n"
    packing += "  packing_strategy: bfd_split      # long documents are split, not cut\n"
    schedule = "  lr_scheduler_type: cosine\n  warmup_steps: 0.03               # below 1: a share of all steps\n"
    if stage.packs:
        schedule = "  # Left to the stage's defaults: warm-up over 1% of the steps, a cosine down to a tenth.\n"
    few = rows is not None and rows < FEW
    fraction, epochs, accumulation = (0.1, 3, 1) if few else (0.02, 1, 4)
    steps = None if rows is None else max(1, round(rows * (1 - fraction)) // (BATCH * accumulation)) * epochs
    held_out = f"  eval: {{fraction: {fraction}}}{' ' * (11 - len(str(fraction)) + 4)}# held out, by the seed\n"
    held_out *= rows != 1  # which can't be on both sides
    named = ", ".join(map(write_scalar, ignored))
    left_out = f"  ignore: [{named}]  # columns that have no place in this format\n" if ignored else ""
    intervals = _choose_intervals(steps, epochs, bool(held_out))
    return (
        f"# yaml-language-server: $schema={SCHEMA}\n"
        f"# accelerate launch --no_python recipe-run {name}.yaml\n"
        "# What a key means: recipe-run explain training.learning_rate\n"
        f"schema_version: 1\nname: {write_scalar(name)}\n"
        f"description: {write_scalar(f'{way} of {Path(model).name} on {form} data.')}\n"
        f"stage: {stage.name}\nmodel:\n  name_or_path: {write_scalar(model)}\n"
        f"{QUANTIZATION if way == 'qlora' else ''}{PEFT if way != 'full' else ''}"
        f"dataset:\n{_describe_data(form, data, columns, look)}"
        f"{left_out}{held_out}"
        "training:\n"
        f"{stage.notes.get('first', '')}  learning_rate: {_write_rate(rates.usual)}              # {why}\n"
        f"  num_train_epochs: {epochs}{_tell_steps(steps, stage.packs)}\n"
        f"  per_device_train_batch_size: {BATCH}   # halve it when memory runs out ...\n"
        f"  gradient_accumulation_steps: {accumulation}   # ... and double this: rows in a step stay the same\n"
        f"{_choose_length(look, 'tools' in columns, context or LENGTHS[-1], 'left out' if stage.scores else 'cut')}"
        f"{packing if stage.packs else ''}{stage.notes.get('batches', '')}{schedule}{intervals}"
        "  save_total_limit: 2\n"
        "run:\n  output_dir: runs\n  seed: 42\n"
    )


def _tell_steps(steps: int | None, packs: bool) -> str:
    if steps is None or packs:  # packed rows are not those of the file
        return ""
    return f"              # about {steps:,} steps of the optimizer"


def _choose_length(look: Looked | None, offers: bool, context: int, lost: str) -> str:
    """`max_length` for the longest rows, by a guess of characters a token; no more than the model can see."""
    most = math.ceil(look.characters / CHARACTERS) + TURNS if look and look.characters else None
    most = most + OFFERED if most and offers else most
    if most is None:
        return f"  max_length: {min(1024, context):<20} # tokens; longer rows are {lost}, and counted\n"
    length = min(context, next((of for of in LENGTHS if of >= most), LENGTHS[-1]))
    told = f"tokens; rows have up to about {most:,}; longer ones are {lost}, and counted"
    return f"  max_length: {length:<20} # {told}\n"


def _choose_intervals(steps: int | None, epochs: int, evaluates: bool) -> str:
    """When to evaluate, save and log: every hundred steps, or so that few steps have some of each."""
    if steps is None or steps >= 10 * INTERVAL:
        return f"  eval_strategy: steps\n  eval_steps: {INTERVAL}\n  save_steps: {INTERVAL}\n"
    share, told = f"{1 / epochs / 2:.3g}", " # below 1: a share of all steps"
    logging = next((of for of in (1, 2, 5, 10, 20) if steps / of <= 50), 20)
    evaluations = f"  eval_strategy: steps\n  eval_steps: {share:<20}{told}\n"
    if not evaluates:
        return f"  save_steps: {share:<20}{told}\n  logging_steps: {logging}\n"
    return f"{evaluations}  save_steps: {share}\n  logging_steps: {logging}\n"


def _describe_data(form: str, data: str, columns: Mapping[str, str], look: Looked | None) -> str:
    """The format, the source and its columns, as lines of the section `dataset`."""
    layout = FORMATS[form]
    names = ", ".join(f"{role}: {write_scalar(column)}" for role, column in columns.items())
    count = f"  # {look.rows:,} row{'s' * (look.rows != 1)}" if look else ""
    options = "".join(f"    {key}: {write_scalar(value)}\n" for key, value in (look.options if look else {}).items())
    return (
        f"  format: {form:<25}# {layout.about}\n  train:\n    source: {write_scalar(data)}{count}\n{options}"
        f"{f'    columns: {{{names}}}':<34} # role: its name in the data\n{layout.note}"
    )


def _write_rate(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def copy_shipped(file: Path, source: str) -> str:
    """The text of a shipped recipe for another file, with its name, and with the paths in it made absolute.

    In the shelf's own folder paths stay as they are, and what was measured with the other recipe is left out.
    """
    recipe, name = load_recipe(str(find_shipped(source))), file.stem
    text = recipe.text.replace(f"name: {source}", f"name: {write_scalar(name)}", 1)
    if file.resolve().parent == recipe.file.resolve().parent:
        text = text.replace(f"recipes/{source}.yaml", f"recipes/{name}.yaml")
        return re.sub(r"^(# For [^\n:]*): [^\n]* were allocated [^\n]*$", r"\1.", text, count=1, flags=re.MULTILINE)
    text = text.replace(f"recipes/{source}.yaml", f"{name}.yaml").replace(
        "launch recipe-run", "launch --no_python recipe-run"
    )
    schema_line, _, rest = text.partition("\n")
    if schema_line.startswith("# yaml-language-server"):  # its path is relative to the shelf
        text = f"# yaml-language-server: $schema={SCHEMA}\n{rest}"
    for word in sorted({word for word in text.split() if word.startswith(BESIDE)}, key=len, reverse=True):
        text = text.replace(word, str((recipe.file.parent / word).resolve()))
    return text
