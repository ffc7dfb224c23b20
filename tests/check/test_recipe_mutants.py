"""Thousands of broken copies of the shipped recipes, by a seed: no exception, no hang, what is broken is reported.

The figures stand at the end of pytest's output.
"""

import random
import re
import time
from collections import Counter

import pytest

from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.document import read_document
from recipe_runner.recipe.library import shipped_recipes
from recipe_runner.recipe.resolve import examine_recipe

KEY = re.compile(r"^( *)([a-z_0-9]+):( *)([^#\n]*?)( *#.*)?$")
FREE = {"description", "metadata", "license", "hardware", "tags"}  # people's words: anything goes


def key_lines(lines):
    """Numbers of the lines that hold a key with meaning, outside of comments and metadata."""
    meta = next((number for number, line in enumerate(lines) if line.startswith("metadata:")), len(lines))
    matches = ((number, KEY.match(line)) for number, line in enumerate(lines[:meta]))
    return [number for number, match in matches if match and match[2] not in FREE]


def misspell_key(lines, chance):
    number = chance.choice(key_lines(lines))
    match = KEY.match(lines[number])
    key, at = match[2], chance.randrange(len(match[2]))
    other = "q" if key[at] != "q" else "z"
    typo = chance.choice([key[:at] + key[at + 1 :], key[:at] + key[at] + key[at:], key[:at] + other + key[at + 1 :]])
    lines[number] = lines[number].replace(f"{key}:", f"{typo or 'q'}:", 1)
    return number


def change_type(lines, chance):
    number = chance.choice([n for n in key_lines(lines) if KEY.match(lines[n])[4]])
    match = KEY.match(lines[number])
    lines[number] = f"{match[1]}{match[2]}: {chance.choice(['{zz: 1}', '[[1]]', '[{zz: 1}]'])}"
    return number


def duplicate_key(lines, chance):
    number = chance.choice([n for n in key_lines(lines) if KEY.match(lines[n])[4]])
    lines.insert(number + 1, lines[number])
    return number + 1


def delete_line(lines, chance):
    del lines[chance.choice(key_lines(lines))]


def swap_values(lines, chance):
    first, second = chance.sample([n for n in key_lines(lines) if KEY.match(lines[n])[4]], 2)
    one, other = KEY.match(lines[first]), KEY.match(lines[second])
    lines[first] = f"{one[1]}{one[2]}: {other[4]}"
    lines[second] = f"{other[1]}{other[2]}: {one[4]}"


def indent(lines, chance):
    number = chance.randrange(len(lines))
    lines[number] = chance.choice([" ", "  ", "\t", "   "]) + lines[number]


def random_characters(lines, chance):
    number = chance.randrange(len(lines))
    at = chance.randrange(len(lines[number]) + 1)
    noise = "".join(chance.choice("\x00\x07\t:{}[]'\"&*!|>%@`#-?,é\u2028\U0001f600 \\") for _ in range(3))
    lines[number] = lines[number][:at] + noise + lines[number][at:]


def random_bytes(lines, chance):
    number = chance.randrange(len(lines))
    at = chance.randrange(len(lines[number]) + 1)
    noise = "".join(chr(0xDC80 + chance.randrange(128)) for _ in range(3))  # written as the bytes 0x80 to 0xff
    lines[number] = lines[number][:at] + noise + lines[number][at:]


def monstrous_value(lines, chance):
    number = chance.choice([n for n in key_lines(lines) if KEY.match(lines[n])[4]])
    match = KEY.match(lines[number])
    bomb = ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else 'x'}]" for n in range(8))
    value = chance.choice(["[" * 300 + "]" * 300, "{a: " * 80 + "1" + "}" * 80, "9" * 5000, "x" * 50_000, f"[{bomb}]"])
    lines[number] = f"{match[1]}{match[2]}: {value}"
    return None if KEY.match(lines[number]) is None else number


KINDS = [misspell_key, change_type, duplicate_key, delete_line, swap_values, indent, random_characters, random_bytes]
KINDS += [monstrous_value]


@pytest.mark.parametrize("mutate", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.mutants(2700, 10_000)
def test_mutants_are_answered(mutate, tmp_path, mutants, report_figure):
    chance, count = random.Random(f"{mutate.__name__} {mutants.seed}"), -(-mutants.count // len(KINDS))
    recipes = {file.stem: (file.read_text(), examine_recipe(file)[0].values) for file in shipped_recipes()}
    figures, slowest = Counter(), 0.0
    for _ in range(count):
        name = chance.choice(list(recipes))
        text, values = recipes[name]
        text = text.replace("../models", "/models").replace(
            "source: data/", f"source: {shipped_recipes()[0].parent}/data/"
        )
        lines = text.splitlines()
        number = mutate(lines, chance)
        file = tmp_path / f"{name}.yaml"
        file.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
        began = time.monotonic()
        recipe, problems = examine_recipe(file)
        slowest = max(slowest, time.monotonic() - began)
        places = {problem.mark.line for problem in problems if problem.mark}
        if mutate in (misspell_key, change_type, duplicate_key):
            assert number + 1 in places, (lines[number], problems)
        if recipe is None:
            assert problems
            assert all(str(problem) for problem in problems)
            figures["refused"] += 1
        elif {**recipe.values} == {**values} or not problems:
            figures["as valid as before" if problems or recipe.values == values else "another valid recipe"] += 1
        else:
            figures["accepted with a warning"] += 1
    told = ", ".join(f"{count} {kind}" for kind, count in figures.most_common())
    report_figure(
        f"{count} mutants of recipes by {mutate.__name__} (seed {mutants.seed}): {told};"
        f" slowest {slowest * 1000:.0f} ms"
    )
    assert slowest < 2
    assert sum(figures.values()) == count


def test_a_valid_mutant_says_what_it_says(tmp_path):
    """Whatever is accepted reads back as the file has it: nothing between the file and the run changes a value."""
    chance = random.Random(1)
    checked = 0
    for _ in range(300):
        file = tmp_path / f"{(shipped := chance.choice(shipped_recipes())).stem}.yaml"
        lines = shipped.read_text().replace("data/", f"{shipped.parent}/data/").splitlines()
        chance.choice([delete_line, swap_values, indent])(lines, chance)
        file.write_text("\n".join(lines))
        try:
            written = read_document(file).values
        except UserError:
            continue
        recipe, _ = examine_recipe(file)
        if recipe:
            for key, value in (written.get("training") or {}).items():
                assert recipe.values["training"][key] == value
            checked += 1
    assert checked > 50
