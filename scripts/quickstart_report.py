"""Scores the latest completed run of the quickstart on held-out tickets, before and after training.

    python scripts/quickstart_report.py runs/smollm2_tickets_lora

The base model is scored as the trained one with its adapter switched off: same weights, same prompts, greedy decoding.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from recipe_runner.launch.process import set_up_process

HELD_OUT = Path(__file__).resolve().parent.parent / "recipes" / "data" / "tickets_heldout.jsonl"


def main(runs: Path) -> None:
    completed = [file.parent for file in sorted(runs.glob("*/status.json")) if '"completed"' in file.read_text()]
    if not completed:
        sys.exit(f"{runs} holds no completed run")
    run = completed[-1]
    set_up_process()
    from recipe_runner.model.load import load_result

    model, tokenizer = load_result(run, dtype="float32")
    rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    began = time.monotonic()
    after = answer(model, tokenizer, rows)
    with model.disable_adapter():
        before = answer(model, tokenizer, rows)
    seconds = time.monotonic() - began

    print(f"\nHeld-out tickets ({len(rows)}, worded unlike the training tickets; scored in {seconds:.0f} s)\n")
    print("                              before    after")
    for name, score in (("exact match", exact), ("right category", category), ("right priority", priority)):
        counts = [
            sum(score(text, row["output"]) for text, row in zip(texts, rows, strict=True)) for texts in (before, after)
        ]
        print(f"  {name:<24}{counts[0]:>4}/{len(rows)} {counts[1]:>5}/{len(rows)}")
    for index in (0, 1):
        print(f"\n  ticket: {rows[index]['input']}")
        print(f"  wanted: {rows[index]['output']}")
        print(f"  before: {shorten(before[index])}")
        print(f"  after:  {shorten(after[index])}")
    print(f"\nThe run: {run}")


def answer(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[str]:
    """Greedy answers to the rows' prompts, rendered as the recipe renders them."""
    texts = []
    for start in range(0, len(rows), 10):
        prompts = [
            [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}] for row in rows[start : start + 10]
        ]
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**batch, max_new_tokens=40, do_sample=False)
        texts += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def exact(text: str, wanted: str) -> bool:
    return parse(text) == json.loads(wanted)


def category(text: str, wanted: str) -> bool:
    return parse(text).get("category") == json.loads(wanted)["category"]


def priority(text: str, wanted: str) -> bool:
    return parse(text).get("priority") == json.loads(wanted)["priority"]


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 90 else line[:87] + "..."


if __name__ == "__main__":
    main(Path(sys.argv[1]))
