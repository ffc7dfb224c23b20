"""Runs commands one after another in the processes of one launch: `several_worker.py "RECIPE --resume auto" ...`."""

import os
import sys

from recipe_runner.cli import cli
from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.rules import packages

packages.find_unused = lambda *_: []  # another recipe in this process may use what one does not
for command in sys.argv[1:]:
    try:
        cli.main(["train", *command.split()], standalone_mode=False)
    except UserError as error:
        if os.environ["RANK"] == "0":
            print(error, file=sys.stderr)

sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # torch 2.13's threads may abort a process that ends in another order than the other one
