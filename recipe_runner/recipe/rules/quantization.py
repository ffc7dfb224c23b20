"""Rules about `quantization`. One small function a rule."""

from recipe_runner.problems.problem import Found
from recipe_runner.recipe.sections import UpstreamSection

HEADS = ("lm_head", "embed_out", "output", "head")  # how architectures name the output layer
MIXED = {"bf16": "bfloat16", "fp16": "float16"}  # key of `training` -> dtype that it computes in


def quantization_without_peft(quantization: UpstreamSection, peft: UpstreamSection) -> Found:
    """Quantized weights cannot be trained: a quantized base needs an adapter."""
    if quantization and not peft:
        found = "a quantized base model can't be trained itself"
        yield ("quantization",), found, "add 'peft: {method: lora, target_modules: all-linear}', or remove quantization"


def quantization_width(quantization: UpstreamSection) -> Found:
    """Exactly one of 4-bit and 8-bit, and only its own options."""
    widths = [key for key in ("load_in_4bit", "load_in_8bit") if quantization[key]]
    if quantization and len(widths) != 1:
        found = "both 4-bit and 8-bit are on" if widths else "neither 4-bit nor 8-bit is on"
        yield ("quantization",), found, "set one of load_in_4bit and load_in_8bit to true"
    elif quantization:
        others = ("bnb_4bit_",) if widths == ["load_in_8bit"] else ("llm_int8_threshold", "llm_int8_has_fp16_weight")
        for key in quantization.said:
            if key.startswith(others):
                yield ("quantization", key), f"has no effect with {widths[0]}", "remove the key"


def skipped_modules(quantization: UpstreamSection) -> Found:
    """A list of modules that stay as they are replaces transformers' own, which spares the head."""
    skipped = quantization.said.get("llm_int8_skip_modules")
    if skipped is not None and not any(name.rpartition(".")[2] in HEADS for name in skipped):
        found = "the head is not in it, and would be quantized: the loss is computed from its own weights"
        yield ("quantization", "llm_int8_skip_modules"), found, "add lm_head, or remove the key"


def compute_dtype(quantization: UpstreamSection, training: UpstreamSection) -> Found:
    """4-bit weights are computed in the precision of training, or every layer converts twice."""
    computed = quantization.said.get("bnb_4bit_compute_dtype")
    mixed = next((name for key, name in MIXED.items() if training[key]), None)
    if computed and mixed and computed != mixed:
        found = f"4-bit weights are computed in {computed}, training is in {mixed}"
        yield ("quantization", "bnb_4bit_compute_dtype"), found, f"write {mixed}"
