"""Trains recipes one after another in the processes of one launch: `accelerate launch several_worker.py RECIPE...`."""

import sys

from recipe_runner.cli import cli

for recipe in sys.argv[1:]:
    cli.main(["train", recipe], standalone_mode=False)
