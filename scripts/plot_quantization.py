"""Draws docs/images/quantization.svg, and prints the tables of docs/quantization.md.

    python scripts/plot_quantization.py [MODEL]

A matrix of a real model (by default SmolLM2-135M, made by `make model`) is stored in 4 bits in several ways, and all
linear layers of the model in turn; the model's perplexity is measured on pages that it was not trained on.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe_runner.model.scores import score_sequences
from recipe_runner.pages.plots import COLOURS

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
MATRIX = "model.layers.15.mlp.gate_proj.weight"
PAGES = [ROOT / "recipes" / "data" / f"handbook_{part}.jsonl" for part in ("train", "heldout")]
PICTURE = ROOT / "docs" / "images" / "quantization.svg"
BLOCK = 64  # weights that share a scale. Source: QLoRA, arXiv 2305.14314, section 3
BINS = 120
WIDTH, HEIGHT, LEFT, GAP = 640, 92, 110, 14

# Levels between -1 and 1: each weight takes the nearest, once its block is divided by its largest absolute value.
INT4 = [number / 7 for number in range(-7, 8)]  # even distances; -8 is left out, so that 0 is a level
FP4 = [sign * of / 12 for of in (0.0625, 2, 3, 4, 6, 8, 12) for sign in (-1, 1)] + [0.0]  # bitsandbytes 0.50.2
NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0),
    *(0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]  # bitsandbytes 0.50.2, functional.py


def store_int4(weights: torch.Tensor) -> torch.Tensor:
    """A matrix as it is after linear 4-bit quantization by blocks."""
    blocks = weights.reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 7
    return (torch.round(blocks / scale).clamp(-7, 7) * scale).reshape(weights.shape)


def store_bnb(kind: str, twice: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """What bitsandbytes makes of a matrix."""

    def store(weights: torch.Tensor) -> torch.Tensor:
        packed, state = bnb.quantize_4bit(weights, blocksize=BLOCK, quant_type=kind, compress_statistics=twice)
        return bnb.dequantize_4bit(packed, state).reshape(weights.shape)

    return store


# Name -> bits a weight with its scales, levels, and how a matrix is stored.
FORMATS: dict[str, tuple[float, list[float], Callable[[torch.Tensor], torch.Tensor]]] = {
    "float32": (32, [], lambda weights: weights),
    "int4": (4 + 32 / BLOCK, INT4, store_int4),
    "FP4": (4 + 32 / BLOCK, FP4, store_bnb("fp4", False)),
    "NF4": (4 + 32 / BLOCK, NF4, store_bnb("nf4", False)),
    "NF4, double": (4 + 8 / BLOCK + 32 / (BLOCK * 256), NF4, store_bnb("nf4", True)),
}


def draw(weights: torch.Tensor) -> str:
    """The density of the weights, each divided by the largest of its block, with the levels of each format."""
    blocks = weights.reshape(-1, BLOCK)
    scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()
    counts = torch.histc(scaled, BINS, -1, 1)
    counts[0], counts[-1] = counts[1], counts[-2]  # one of each block is 1 or -1 by definition: a spike at both ends
    rows = [(name, levels) for name, (_, levels, _) in FORMATS.items() if levels and name != "NF4, double"]
    height = len(rows) * (HEIGHT + GAP) + 40
    parts = []
    for number, (name, levels) in enumerate(rows):
        up = 10 + number * (HEIGHT + GAP)

        def across(value: float) -> float:
            return LEFT + (value + 1) / 2 * (WIDTH - LEFT - 12)

        places = [
            (across(-1 + (place + 0.5) * 2 / BINS), up + HEIGHT * (1 - float(count / counts.max())))
            for place, count in enumerate(counts)
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(across(-1), up + HEIGHT), *places, (across(1), up + HEIGHT)])
        parts.append(f'<polygon points="{line}" fill="var(--line)"/>')
        parts += [
            f'<line x1="{across(level):.1f}" y1="{up}" x2="{across(level):.1f}" y2="{up + HEIGHT}" stroke="var(--c0)"/>'
            for level in sorted(levels)
        ]
        parts.append(f'<text class="title" x="12" y="{up + 20}">{name}</text>')
        parts.append(f'<text x="12" y="{up + 38}">{len(set(levels))} levels</text>')
    for tick in (-1, -0.5, 0, 0.5, 1):
        x = LEFT + (tick + 1) / 2 * (WIDTH - LEFT - 12)
        parts.append(f'<text x="{x:.1f}" y="{height - 24}" text-anchor="middle">{tick}</text>')
    middle = (LEFT + WIDTH) / 2
    parts.append(
        f'<text x="{middle}" y="{height - 6}" text-anchor="middle">weight / largest of its block of {BLOCK}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="levels of 4-bit formats on the density of weights"><style>{COLOURS}</style>'
        f'<rect width="{WIDTH}" height="{height}" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


def measure_error(weights: torch.Tensor, store: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The root of the mean squared error, as a share of the root of the mean square."""
    return float((store(weights) - weights).pow(2).mean().sqrt() / weights.pow(2).mean().sqrt())


def count_distinct(weights: torch.Tensor) -> float:
    """Distinct values in a block, on average over 1,000 blocks."""
    blocks = weights.reshape(-1, BLOCK)[:1000]
    return sum(len(torch.unique(block)) for block in blocks) / len(blocks)


def measure_matrix(weights: torch.Tensor) -> list[list[str]]:
    """Bits, errors and distinct values of a matrix in each format; and the error of a matrix of normal numbers."""
    normal = torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    before, rows = count_distinct(weights), []
    for name, (bits, _, store) in FORMATS.items():
        errors = [f"{measure_error(of, store):.2%}" for of in (weights, normal)]
        kept = count_distinct(store(weights))
        rows.append([name, f"{bits:.3f}", *errors, f"{kept:.1f} ({1 - kept / before:.0%} lost)"])
    return rows


def measure_perplexity(folder: Path) -> dict[str, float]:
    """The perplexity of a model on held-out pages, with all linear layers but the head in each format."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [line for file in PAGES for line in file.read_text(encoding="utf-8").splitlines()]
    pages = [json.loads(line)["text"] for line in lines]
    ids = [tokenizer(page)["input_ids"] for page in pages]
    found = {}
    for name, (_, _, store) in FORMATS.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            for label, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and label != "lm_head":
                    module.weight.copy_(store(module.weight.data.contiguous()))
        scores = score_sequences(model, [(row, row) for row in ids])
        found[name] = math.exp(sum(score.loss for score in scores) / sum(score.tokens for score in scores))
    return found


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = dict(model.named_parameters())[MATRIX].detach().contiguous()
    PICTURE.write_text(draw(weights), encoding="utf-8")
    perplexity = measure_perplexity(folder)
    head = ["stored as", "bits a weight", "error", "error, normal numbers", "values in a block", "perplexity"]
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    for row in measure_matrix(weights):
        print(f"| {' | '.join(row)} | {perplexity[row[0]]:.2f} |")


if __name__ == "__main__":
    main()
