"""Writes resolved values as YAML."""

from typing import Any

import yaml

from recipe_runner.recipe.document import parse_scalar


def dump_values(values: Any) -> str:
    """Writes resolved values as YAML that reads back the same by the strict rules."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes aliases out, and quotes what YAML 1.2 would not read as a string (PyYAML thinks in YAML 1.1)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        unusual = not text.replace("\n", "").isprintable()
        style = '"' if unusual else "'" if parse_scalar(text) != text else "|" if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
