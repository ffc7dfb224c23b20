"""Tries thousands of broken copies of what people give: recipes, data, model folders, templates, runs, launch files.

No copy may end as a bug, and nothing that broken data says may be lost without a word. `make test` tries a sample.

    python scripts/try_mutants.py [SEED] [PYTEST OPTIONS]
"""

import random
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent / "tests"

if __name__ == "__main__":
    seed, *options = sys.argv[1:] or [str(random.randrange(10**6))]
    print(f"seed {seed}", flush=True)
    files = [str(TESTS / "mutants"), str(TESTS / "check" / "test_recipe_mutants.py")]
    sys.exit(pytest.main([*files, "--mutants", "all", "--mutants-seed", seed, "--numprocesses", "2", *options]))
