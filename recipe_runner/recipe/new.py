"""Writes a new recipe: valid, commented, ready to run."""

from pathlib import Path

from recipe_runner.recipe import schema
from recipe_runner.recipe.library import find_shipped
from recipe_runner.recipe.resolve import load_recipe
from recipe_runner.stages import FORMATS, STAGES

WAYS = ("qlora", "lora", "full")  # of tuning
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


def compose(name: str, model: str, form: str, way: str, data: str) -> str:
    """The text of a recipe for the stage that a format is for; `way` is what is tuned, `data` a hub id or file."""
    stage = STAGES[stage_for(form)]
    rates = stage.full_rates if way == "full" else stage.adapter_rates
    why = "all weights take small steps" if way == "full" else "adapters start from zero and take larger steps"
    packing = "  packing: true                    # documents share rows, without seeing each other\n"
    packing += "  packing_strategy: bfd_split      # long documents are split, not cut\n"
    schedule = "  lr_scheduler_type: cosine\n  warmup_steps: 0.03               # below 1: a share of all steps\n"
    if stage.packs:
        schedule = "  # Left to the stage's defaults: warm-up over 1% of the steps, a cosine down to a tenth.\n"
    return (
        f"# accelerate launch --no_python recipe-run {name}.yaml\n"
        "# What a key means: recipe-run explain training.learning_rate\n"
        f"schema_version: 1\nname: {name}\n"
        f"description: {way} of {Path(model).name} on {form} data.\n"
        f"stage: {stage.name}\nmodel:\n  name_or_path: {_quote(model)}\n"
        f"{QUANTIZATION if way == 'qlora' else ''}{PEFT if way != 'full' else ''}"
        f"dataset:\n{_describe_data(form, data)}"
        "  eval: {fraction: 0.02}           # held out, by the seed\n"
        "training:\n"
        f"{stage.notes.get('first', '')}  learning_rate: {_write_rate(rates.usual)}              # {why}\n"
        "  num_train_epochs: 1\n"
        "  per_device_train_batch_size: 4   # halve it when memory runs out ...\n"
        "  gradient_accumulation_steps: 4   # ... and double this: rows in a step stay the same\n"
        "  max_length: 1024                 # tokens; longer rows are cut, and counted\n"
        f"{packing if stage.packs else ''}{stage.notes.get('batches', '')}{schedule}"
        "  eval_strategy: steps\n  eval_steps: 100\n  save_steps: 100\n  save_total_limit: 2\n"
        "run:\n  output_dir: runs\n  seed: 42\n"
    )


def _describe_data(form: str, data: str) -> str:
    """The format, the source and its columns, as lines of the section `dataset`."""
    layout = FORMATS[form]
    columns = f"    columns: {{{', '.join(f'{role}: {role}' for role in (*layout.required, *layout.optional))}}}"
    return (
        f"  format: {form:<25}# {layout.about}\n  train:\n    source: {_quote(data)}\n"
        f"{columns:<34} # role: its name in the data\n{layout.note}"
    )


def _write_rate(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def copy_shipped(name: str, source: str) -> str:
    """The text of a shipped recipe under another name, with the paths in it made absolute."""
    recipe = load_recipe(str(find_shipped(source)))
    text = recipe.text.replace(f"name: {source}", f"name: {name}", 1)
    text = text.replace(f"recipes/{source}.yaml", f"{name}.yaml").replace(
        "launch recipe-run", "launch --no_python recipe-run"
    )
    schema_line, _, rest = text.partition("\n")
    text = rest if schema_line.startswith("# yaml-language-server") else text  # its path is relative to the shelf
    for word in sorted({word for word in text.split() if word.startswith(("../", "data/"))}, key=len, reverse=True):
        text = text.replace(word, str((recipe.file.parent / word).resolve()))
    return text


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'" if set(text) & set(" :#'\"{}[],&*!|>%@`") or not text else text
