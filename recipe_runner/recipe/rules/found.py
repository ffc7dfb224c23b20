"""What a rule yields: the key path of each contradiction, what was found, and what to do."""

from collections.abc import Iterator

from recipe_runner.problems.problem import KeyPath

Found = Iterator[tuple[KeyPath, str, str]]
