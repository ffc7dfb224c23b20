"""The model card of a run: what was trained, on what, how, and how to use it."""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

from recipe_runner.recipe import Recipe
from recipe_runner.resolve import dump_values
from recipe_runner.training.data import Accounting


def write_card(
    recipe: Recipe, folder: Path, result: Path, accounting: Accounting, history: list[dict[str, Any]]
) -> None:
    """Writes README.md into the run folder and beside the weights, in the hub's layout."""
    values, base = recipe.values, recipe.values["model"]["name_or_path"]
    metadata: dict[str, Any] = {
        "library_name": "peft" if values.get("peft") else "transformers",
        "tags": ["trl", values["stage"], *(values.get("metadata") or {}).get("tags", [])],
    }
    if not Path(base).is_absolute():
        metadata = {"base_model": base, **metadata}
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    evaluations = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("trl", "transformers", "peft", "datasets", "torch")
    )
    parts = [
        f"---\n{dump_values(metadata)}---\n",
        f"# {values['name']}\n",
        f"{values.get('description', '')}\n",
        f"- Base model: `{base}`",
        f"- Training rows: {accounting}",
        *[
            f"- {name}: {series[0][1]:.4f} at step {series[0][0]}, {series[-1][1]:.4f} at step {series[-1][0]}"
            for name, series in (("Training loss", losses), ("Evaluation loss", evaluations))
            if series
        ],
        f"- Versions: {versions}\n",
        f"## Use\n\n```python\n{_usage(base, result)}```\n",
        f"## Recipe\n\nTrain it again with `recipe-run recipe.yaml`:\n\n```yaml\n{recipe.text.rstrip()}\n```\n",
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")
    shutil.copyfile(folder / "README.md", result / "README.md")


def _usage(base: str, result: Path) -> str:
    if result.name == "model":
        return (
            f'from transformers import pipeline\n\ngenerate = pipeline("text-generation", model="{result}")\n'
        )
    return (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{result}")  # loads {base} and the adapter\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{result}")\n'
    )
