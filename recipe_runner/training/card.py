"""The model card of a run: what was trained, on what, how, and how to use it."""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe_runner.data.accounting import Accounting
from recipe_runner.files import hide_home, read_object, write_text
from recipe_runner.methods import METHODS
from recipe_runner.recipe.document import dump_values
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import CONFIG
from recipe_runner.runs.metrics import measure_series
from recipe_runner.training.allocation import read_ranks


def write_card(
    recipe: Recipe, folder: Path, result: Path, accounting: Accounting, history: list[dict[str, Any]]
) -> None:
    """Writes README.md into the run folder and beside the weights, in the hub's layout."""
    base, method = recipe.model.name_or_path, recipe.peft["method"]
    header = describe_header(recipe, bool(recipe.peft), None if recipe.model.folder else base)
    facts = [f"Base model: `{base}`", f"Training data: {accounting}"]
    if recipe.model.adapter:
        facts.insert(1, f"Continued from the adapter `{recipe.model.adapter}`")
    trained = recipe.stage.shown if recipe.stage.rewarded else {"loss": "training loss"}
    for key, name in (*trained.items(), *recipe.stage.measures.items()):
        if series := measure_series(history, key):
            (first, before), (last, after) = series[0], series[-1]
            begun = f"{before:.4f} at step {first}, " * (first != last)
            facts.append(f"{name[0].upper()}{name[1:]}: {begun}{after:.4f} at step {last}")
    kept = read_ranks(read_object(result / CONFIG).get("rank_pattern") or {}) if method == "adalora" else {}
    if kept:
        begun = len(kept) * recipe.peft["init_r"]
        facts.append(f"Ranks after allocation: {sum(kept.values()):,} of {begun:,} (table below)")
    if method in METHODS:
        facts.append(f"Method: {method} ({METHODS[method].paper}), {METHODS[method].trains}")
    if recipe.unfreeze:
        beside = " beside the adapter, and saved in it" if recipe.peft else ", all else frozen"
        facts.append(f"Trained of the base: {', '.join(f'`{pattern}`' for pattern in recipe.unfreeze)}{beside}")
    if method == "bottleneck":
        facts.append("PEFT has no bottleneck adapters: this one loads only where recipe_runner is installed, as below")
    packages = ("trl", "transformers", "peft", "datasets", "torch")
    facts.append("Versions: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    for place, weights in ((folder, result.name), (result, ".")):
        parts = [
            f"---\n{dump_values(header)}---\n",
            f"# {recipe.name}\n",
            f"{recipe.description}\n",
            *[f"- {fact}" for fact in facts],
            f"\n## Use\n\n```python\n{write_usage(base, result.name, weights, method, recipe.stage.scores)}```\n",
            *([f"## Ranks\n\n{_rank_table(kept)}"] if kept else []),
            "## Recipe\n\nAs it was run, with everything resolved:\n",
            f"```yaml\n{dump_values(dict(recipe.values))}```\n",
        ]
        write_text(place / "README.md", hide_home("\n".join(parts)))


def describe_header(recipe: Recipe, adapter: bool, base: str | None) -> dict[str, Any]:
    """The front matter of a card, by which the hub files it. Source: huggingface.co/docs/hub/model-cards."""
    sources = [source.source for source in recipe.dataset.train]
    published = [name for name in dict.fromkeys(sources) if not Path(name).is_absolute()]
    metadata = recipe.values.get("metadata") or {}
    header = {
        "base_model": base,
        "datasets": published,
        "license": str(metadata["license"]).lower() if metadata.get("license") else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if recipe.stage.scores else "text-generation",
        "tags": ["trl", recipe.stage.name, *recipe.tags],
    }
    return {key: value for key, value in header.items() if value}


def _rank_table(ranks: Mapping[str, int]) -> str:
    """Module -> its rank, as a table of Markdown."""
    return "| module | rank |\n|---|---:|\n" + "".join(f"| {name} | {rank} |\n" for name, rank in ranks.items())


def write_usage(base: str, kind: str, weights: str, method: str | None, scores: bool = False) -> str:
    """Lines of Python that load a result: an `adapter`, or a `model`; `weights` is its folder or id."""
    folder = f'folder = "{weights}"  # or its id on the hub\n'
    known = "import recipe_runner.model.bottleneck  # makes the method known to PEFT\n" * (method == "bottleneck")
    if scores:
        return _write_scoring(base, kind, folder, known)
    if kind == "model":
        return f'from transformers import pipeline\n\n{folder}generate = pipeline("text-generation", model=folder)\n'
    return (
        f"{known}from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer, GenerationConfig\n\n"
        f"{folder}model = AutoPeftModelForCausalLM.from_pretrained(folder)  # loads {base} and the adapter\n"
        "model.generation_config = GenerationConfig.from_pretrained(folder)  # where it stops\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
    )


def _write_scoring(base: str, kind: str, folder: str, known: str) -> str:
    """Lines of Python that score a conversation with a reward model."""
    adapter = kind == "adapter"
    cls = "AutoPeftModelForSequenceClassification" if adapter else "AutoModelForSequenceClassification"
    imports = f"from peft import {cls}\nfrom transformers import AutoTokenizer\n"
    imports = imports if adapter else f"from transformers import {cls}, AutoTokenizer\n"
    loads = f"  # loads {base} and the adapter" * adapter
    return (
        f"{known}{imports}\n"
        f"{folder}model = {cls}.from_pretrained(folder, num_labels=1){loads}\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model.config.pad_token_id = tokenizer.pad_token_id  # by which the last token is found\n"
        'turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello. How can I help?"}]\n'
        'batch = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")\n'
        "score = model(**batch).logits[0, 0].item()  # higher is better, beside other answers to the same prompt\n"
    )
