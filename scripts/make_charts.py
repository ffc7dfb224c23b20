"""Draws the pictures of `recipes/data/charts`, and writes the rows about them: bar charts, the same each time.

python scripts/make_charts.py
"""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "data"
NAMES = "ABCD"
COLOURS = ("#2f6fde", "#d9534f", "#3c9d5b", "#e0a21b")
SIZE, TRAINED, HELD_OUT = (192, 144), 24, 8


def draw(heights: list[int], file: Path) -> None:
    """A chart of four bars, with their names below."""
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture)
    pen.line((16, 8, 16, 120, 184, 120), fill="black")
    for place, (height, name) in enumerate(zip(heights, NAMES, strict=True)):
        left = 28 + place * 40
        pen.rectangle((left, 120 - height, left + 24, 119), fill=COLOURS[place])
        pen.text((left + 9, 126), name, fill="black")
    picture.quantize(16).save(file, optimize=True)


def main() -> None:
    """Writes pictures and rows."""
    chance = random.Random(7)
    (FOLDER / "charts").mkdir(exist_ok=True)
    rows, pairs = [], []
    for number in range(TRAINED + HELD_OUT):
        heights = chance.sample(range(10, 110, 10), 4)
        name = f"charts/{number + 1:02}.png"
        draw(heights, FOLDER / name)
        order = sorted(range(4), key=lambda place: -heights[place])
        tall, low = NAMES[order[0]], NAMES[order[-1]]
        question, answer, other = [
            ("Which bar is the tallest?", f"Bar {tall} is the tallest.", f"Bar {low} is the tallest."),
            ("Which bar is the lowest?", f"Bar {low} is the lowest.", f"Bar {tall} is the lowest."),
        ][number % 2]
        turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
        rows.append({"messages": turns, "images": [name]})
        pairs.append({"prompt": f"<image>{question}", "chosen": answer, "rejected": other, "images": [name]})
    for file, part in (
        ("charts_train.jsonl", rows[:TRAINED]),
        ("charts_heldout.jsonl", rows[TRAINED:]),
        ("charts_pairs.jsonl", pairs[:TRAINED]),
        ("charts_pairs_heldout.jsonl", pairs[TRAINED:]),
    ):
        (FOLDER / file).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


if __name__ == "__main__":
    main()
