"""Writes the table of docs/methods.md: every method, and its trained part of a Llama of 1B parameters.

    python scripts/make_methods_table.py            # write
    python scripts/make_methods_table.py --check    # exit status 1 if the page differs

The model is built from its configuration without weights; each method has PEFT's defaults, on all linear layers where
it is put on linear layers.
"""

import sys
from pathlib import Path
from typing import Any

from recipe_runner.launch.process import set_up_process
from recipe_runner.methods import METHODS, Method

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- table: scripts/make_methods_table.py -->\n", "<!-- end of table -->\n"
VIRTUAL, TOKENS = 20, 10  # of prompt learning, of trainable_tokens
SIZES = {  # of Llama-3.2-1B
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
}


def main() -> None:
    set_up_process()
    head = "| method | trained part | merges | 4-bit base | extra latency | what it trains | source |\n"
    head += "|---|---:|---|---|---|---|---|\n"
    table = head + "".join(f"{row(method)}\n" for method in METHODS.values())
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    new = before + BEGIN + table + END + rest.split(END)[1]
    if "--check" not in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    elif new != text:
        sys.exit("docs/methods.md is not what the records and PEFT say; run scripts/make_methods_table.py")
    print(f"docs/methods.md: {len(METHODS)} methods")


def row(method: Method) -> str:
    name = f"`{method.name}`{' (tested for three steps only)' if method.tried else ''}"
    marks = ["yes" if fact else "no" for fact in (method.merges, method.quantized)]
    facts = [name, measure_share(method), *marks, method.latency, method.trains, method.paper]
    return f"| {' | '.join(facts)} |"


def measure_share(method: Method) -> str:
    """Trained parameters over those of the base, in percent."""
    from transformers import LlamaConfig

    from recipe_runner.model.adapter import build_peft, put_on
    from recipe_runner.model.base import build_empty

    def build() -> Any:
        return build_empty(LlamaConfig(**SIZES, tie_word_embeddings=method.name != "trainable_tokens"))

    section: dict[str, Any] = {"method": method.name}
    if method.is_prompt:
        section["num_virtual_tokens"] = VIRTUAL
    elif method.name == "trainable_tokens":
        section["token_indices"] = list(range(TOKENS))
    elif method.kind == "linear" and method.name != "ia3":
        section["target_modules"] = "all-linear"
    empty = build()
    total = sum(parameter.numel() for parameter in empty.parameters())
    fitted = put_on(build_peft(section, "CAUSAL_LM"), empty, build)
    trained, _ = fitted.get_nb_trainable_parameters()
    return f"{100 * trained / total:.2g} %"


if __name__ == "__main__":
    main()
