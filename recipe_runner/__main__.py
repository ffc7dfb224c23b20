"""`python -m recipe_runner` is the same as `recipe-run`."""

from recipe_runner.cli import main

if __name__ == "__main__":
    main()
