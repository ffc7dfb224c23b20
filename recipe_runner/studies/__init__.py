"""Studies: a recipe with something varied, run one after another, measured and put side by side."""
