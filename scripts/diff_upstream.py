"""Prints which fields upstream added, removed and changed between two sets of installed versions.

    python scripts/diff_upstream.py schema/upstream OTHER/bin/python    # what is committed, and another environment
    python scripts/diff_upstream.py OLD/bin/python NEW/bin/python

A side is a Python of an environment with trl, peft and transformers, or a folder of generated schemas. A removed field
that recipes may use wants an entry with its version in schema/recipe.schema.json (`x-replaced-by` if it was renamed).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main(old: str, new: str) -> None:
    before, after = read_side(old), read_side(new)
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name, {}), after.get(name, {})
        print(f"{name}: {version_of(one)} -> {version_of(other)}")
        lines = list(differences(one.get("properties", {}), other.get("properties", {})))
        print("\n".join(f"  {line}" for line in lines) or "  no difference")


def read_side(side: str) -> dict[str, dict[str, Any]]:
    """Class -> schema, from a folder of schemas or by asking the Python of an environment."""
    folder = Path(side)
    if folder.is_dir():
        schemas = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*_config.schema.json")]
        if not schemas:
            sys.exit(f"{side} holds no generated schema")
        return {schema["title"]: schema for schema in schemas}
    with tempfile.TemporaryDirectory() as written:
        command = [side, str(ROOT / "scripts" / "build_schema.py"), "--output", written]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        try:
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"{side} could not write its schemas: {error}")
        return read_side(written)


def version_of(schema: dict[str, Any]) -> str:
    found = re.search(r"from (\S+ [\d.]+\w*)\. ", schema.get("$comment", ""))
    return found[1] if found else "absent"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line a field, and for a changed one each of type, choices, default and help text that differs."""
    lines = [f"+ {field}: {facts(new[field])}" for field in new.keys() - old.keys()]
    lines += [f"- {field}: {facts(old[field])}" for field in old.keys() - new.keys()]
    for field in old.keys() & new.keys():
        for key in sorted(old[field].keys() | new[field].keys()):
            was, is_now = old[field].get(key), new[field].get(key)
            if was != is_now and key == "enum" and isinstance(was, list) and isinstance(is_now, list):
                gone, come = [c for c in was if c not in is_now], [c for c in is_now if c not in was]
                lines.append(f"~ {field}: choices added {come}, removed {gone}")
            elif was != is_now:
                lines.append(f"~ {field}: {key} {json.dumps(was)} -> {json.dumps(is_now)}")
    return sorted(lines, key=lambda line: ("+-~".index(line[0]), line))


def facts(entry: dict[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(entry[key])}" for key in ("type", "enum", "default") if key in entry)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
