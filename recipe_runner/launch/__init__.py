"""How processes are started, and whether that suits the recipe."""
