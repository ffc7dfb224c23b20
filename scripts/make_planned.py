"""Plans the memory of every recipe on the shelf: recipes/planned.json, which `list` and the catalogue show.

    python scripts/make_planned.py [NAME]...

Each is planned for what it is meant for (`metadata.hardware`, `metadata.launch`): a CPU, or any GPU with bfloat16; of a
pipeline the largest of its stages counts. Data of recipes for a CPU is prepared first (`make model`). What was prepared
or trained on this machine before has no say.
"""

import json
import os
import sys
import tempfile
from collections import deque
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "recipes" / "planned.json"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        plan_shelf(folder)


def plan_shelf(folder: str) -> None:
    from recipe_runner.launch.configuration import find_launch, read_launch
    from recipe_runner.plan.device import ANY_GPU, CPU
    from recipe_runner.plan.planning import plan
    from recipe_runner.preview import prepare_recipe
    from recipe_runner.recipe.library import shipped_recipes
    from recipe_runner.recipe.resolve import load_recipe

    wanted = sys.argv[1:]
    found = json.loads(FILE.read_text(encoding="utf-8")) if wanted else {}
    for file in shipped_recipes():
        if wanted and file.stem not in wanted:
            continue
        recipe = load_recipe(str(file), (f"run.output_dir={folder}/runs",))
        told = recipe.values.get("metadata") or {}
        if told.get("not_run"):
            continue
        launch = read_launch(find_launch(told["launch"])) if told.get("launch") else None
        device = CPU if "CPU" in told.get("hardware", "") else ANY_GPU
        if device is CPU:  # model and data are here: their longest rows are known
            for stage in recipe.stages or (recipe,):
                deque(prepare_recipe(stage), maxlen=0)
        peaks = [plan(stage, device, launch).peak.total for stage in recipe.stages or (recipe,)]
        found[file.stem] = {"peak_bytes": max(peaks), "device": device.name}
        print(f"{file.stem}: {max(peaks) / 2**30:.1f} GiB; {told.get('hardware', '')}", flush=True)
    FILE.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
