"""What the tools share: schedules, precision, attention, checkpointing, saving, templates."""

import json
import re
from collections.abc import Mapping
from typing import Any

from recipe_runner.importing.draft import CONVERTED, IGNORED, NONE, SAME, Draft, Line, show, true
from recipe_runner.recipe import schema
from recipe_runner.stages import KTO

COMMIT = 40  # letters of a full commit hash
OPTIMIZERS = {
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_bnb_8bit": "paged_adamw_8bit",
    "adamw_torch_npu_fused": "adamw_torch_fused",
    "adamw_hf": "adamw_torch",
    "adamw_apex_fused": "adamw_torch_fused",
    "lion_pytorch": "lion_32bit",
    "paged_adamw": "paged_adamw_32bit",
}
NO_OPTIMIZERS = (
    *("muon", "dion", "optimi_adamw", "ao_adamw_4bit", "ao_adamw_8bit", "ao_adamw_fp8", "adopt_adamw", "came_pytorch"),
    *("q_galore_adamw8bit", "flash_adamw", "schedule_free_radam"),
)
ATTENTION = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager", "flash": "flash_attention_2"}


def convert_model(draft: Draft, name: str, revision: str) -> None:
    """The model, by the tool's keys of its name and its revision.

    Raises:
        UserError: The file names none.
    """
    draft.recipe["model"] = {}
    said = draft.get(name)
    if not said:
        raise draft.refuse(f"it names no {name}")
    if not isinstance(said, str):
        raise draft.refuse(f"{name} is {show(said)}, no name of a model", f"name the model: {name}: OWNER/NAME")
    draft.convert("model.name_or_path", draft.place_model(said), name)
    if draft.get(revision):
        draft.convert("model.revision", str(draft.get(revision)), revision)
    convert_remote_code(draft)


def one_or_all(sources: list[dict[str, Any]]) -> Any:
    """Sources as a recipe has them: one alone, several as a list."""
    return sources if len(sources) > 1 else sources[0]


def convert_remote_code(draft: Draft) -> None:
    """Code of the model's own runs only with a pinned revision."""
    if not true(draft.get("trust_remote_code")):
        draft.note(SAME, "no code of the model's runs", "trust_remote_code")
    elif len(str(draft.recipe.get("model", {}).get("revision", ""))) == COMMIT:
        draft.convert("model.trust_remote_code", True, "trust_remote_code")
    else:
        told = "most models need no code of their own; else set it, and model.revision to a commit that you have read"
        draft.note(NONE, told, "trust_remote_code")


def convert_warm_up(draft: Draft, default: float | None = None) -> None:
    """TRL 1 has one key: steps, or below 1 a share of all."""
    steps, ratio = draft.number("warmup_steps"), draft.number("warmup_ratio")
    if steps is not None and (steps or ratio is None):
        draft.convert("training.warmup_steps", steps, "warmup_steps")
        draft.note(IGNORED, "warmup_steps goes before it", "warmup_ratio")
    elif ratio is not None:
        draft.convert("training.warmup_steps", ratio, "warmup_ratio", note="a share of all steps" if ratio else "")
        draft.note(IGNORED, "0 steps: warmup_ratio holds", "warmup_steps")
    elif default is not None:
        draft.put("training.warmup_steps", default, f"{draft.tool.name}'s default")


def convert_precision(draft: Draft) -> None:
    """What the file says of bfloat16 and float16; `auto` is what the runner does."""
    if str(draft.get("bf16")).lower() == "auto":
        draft.note(SAME, "bfloat16 where the device has it", "bf16")
    elif true(draft.get("bf16")) or draft.get("bf16") == "full":
        draft.convert("training.bf16", True, "bf16")
    elif true(draft.get("fp16")):
        draft.convert("training.fp16", True, "fp16")
    for key in ("bfloat16", "pure_bf16"):
        if true(draft.get(key)):
            draft.convert("model.dtype", "bfloat16", key)
    if true(draft.get("float16")):
        draft.convert("model.dtype", "float16", "float16")
    draft.note(SAME, "another precision is chosen", *("bf16", "fp16", "bfloat16", "float16", "float32", "pure_bf16"))


def convert_tf32(draft: Draft) -> None:
    """Only a yes is worth a key: training on a CPU refuses it."""
    if true(draft.get("tf32")):
        draft.note(NONE, "set training.tf32: true on a GPU (Ampere or newer): of float32 products only", "tf32")
    draft.note(SAME, "off", "tf32")


def convert_attention(draft: Draft, name: Any, *keys: str) -> None:
    """How attention is computed; `auto` leaves it to transformers."""
    name = ATTENTION.get(str(name), name)
    if name in (None, "auto", False):
        draft.note(SAME, "transformers chooses", *keys)
    else:
        draft.convert("model.attn_implementation", str(name), *keys)


def convert_optimizer(draft: Draft, key: str, default: str) -> None:
    """The optimizer by TRL's name for it; one that transformers does not have becomes AdamW."""
    name = str(draft.get(key) or default)
    if name in NO_OPTIMIZERS:
        draft.put("training.optim", "adamw_torch_fused", key)
        draft.note(
            NONE, f"transformers has no {name}: adamw_torch_fused is written, which wants another learning rate", key
        )
        return
    made = OPTIMIZERS.get(name, name)
    draft.convert("training.optim", made, key)
    if isinstance(said := draft.get("optim_args"), dict):
        draft.convert("training.optim_args", ", ".join(f"{name}={value}" for name, value in said.items()), "optim_args")
    elif said:
        draft.convert("training.optim_args", str(said), "optim_args")
    if key not in draft.values:
        draft.origins["training.optim"] = f"{draft.tool.name}'s default"


def convert_report_to(draft: Draft) -> None:
    """Where losses go to beside the run folder."""
    names = draft.names("report_to")
    if not names or names == ["none"]:
        draft.note(SAME, "the run folder holds all of it", "report_to")
    elif names == ["all"]:
        draft.note(NONE, "name them: training.report_to: [tensorboard]", "report_to")
    else:
        draft.convert("training.report_to", names, "report_to")


def hold_out(draft: Draft, key: str) -> None:
    """A share of the training rows that is held out."""
    size = draft.number(key)
    if not size:
        draft.note(SAME, "nothing is held out", key)
    elif isinstance(size, float) and size < 1:
        draft.convert("dataset.eval", {"fraction": size}, key, note="other rows: the seeds draw otherwise")
    else:
        told = "name a share: dataset.eval: {fraction: 0.05}, with training.eval_strategy: steps"
        draft.note(NONE, f"{size} rows; {told}", key)


def evaluate_as_said(draft: Draft, strategy: Any, steps: Any, *keys: str) -> None:
    """When is evaluated, where the recipe has rows for it."""
    if not draft.recipe.get("dataset", {}).get("eval") or strategy in ("no", False):
        if draft.recipe.get("dataset", {}).pop("eval", None):
            for place, line in enumerate(draft.lines):
                if line.kind == CONVERTED and line.text.startswith("dataset.eval"):
                    more = ": all rows are trained on" * ("fraction" in line.text)
                    draft.lines[place] = Line(line.key, NONE, f"nothing is evaluated{more}")
        draft.note(IGNORED if strategy not in (None, "no", False) else SAME, "nothing is evaluated", *keys)
        return
    draft.put("training.eval_strategy", strategy or "steps", keys[0])
    if steps is not None and (strategy or "steps") == "steps":
        draft.put("training.eval_steps", steps, keys[0])
    told = {"eval_strategy": strategy or "steps"} | ({"eval_steps": steps} if steps is not None else {})
    draft.note(CONVERTED, f"training: {show(told)}", *keys)


def convert_checkpointing(draft: Draft, on: bool, *keys: str) -> None:
    """Whether activations are computed again: by either of TRL's names for it, whichever the stage has."""
    known = schema.section_keys("training", draft.recipe["stage"])
    path = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    draft.convert(f"training.{path}", on, *keys)
    draft.origins.setdefault(f"training.{path}", f"{draft.tool.name}'s default")


def compute_dtype(draft: Draft) -> str:
    """What 4-bit weights are computed in: what training is in."""
    half = true(draft.get("fp16")) and not draft.get("bf16")
    return "float16" if half else "bfloat16"


def convert_bits(draft: Draft, bits: int, double: bool, *keys: str, kind: Any = None, more: Any = None) -> None:
    """Weights of 4 or 8 bits, by bitsandbytes.

    Args:
        draft: The recipe.
        bits: 4 or 8.
        double: Whether the constants of quantization are quantized as well.
        keys: Of the file, that said so.
        kind: nf4 or fp4; nf4 where the file does not say.
        more: Other settings of BitsAndBytesConfig.
    """
    if bits == 8:
        draft.convert("quantization", {"load_in_8bit": True}, *keys)
    else:
        made = {"load_in_4bit": True, "bnb_4bit_quant_type": kind or "nf4", "bnb_4bit_use_double_quant": double}
        made |= (more or {}) | {"bnb_4bit_compute_dtype": compute_dtype(draft)}
        draft.convert("quantization", made, *keys)


def convert_batches(draft: Draft) -> None:
    """KTO compares within a batch: with one row in it, TRL refuses."""
    key = "micro_batch_size" if draft.tool.name == "axolotl" else "per_device_train_batch_size"
    if draft.recipe["stage"] == KTO and draft.number(key) == 1:
        steps = int(draft.number("gradient_accumulation_steps") or 1)
        draft.convert("training.per_device_train_batch_size", 2, key, note="KTO compares rows of a batch")
        told = (
            "half as many of twice the rows" if steps % 2 == 0 else f"{2 * max(1, steps // 2)} rows a step, not {steps}"
        )
        draft.convert(
            "training.gradient_accumulation_steps", max(1, steps // 2), "gradient_accumulation_steps", note=told
        )


def write_template(parts: Mapping[str, str]) -> str:
    """A chat template that writes turns as a tool's own template does; it marks what the assistant says.

    Args:
        parts: What stands around the turns of each role, by `{content}`; `prefix`, before all; `default_system`, of
            rows without one; `last`, what follows the last answer; and `after`, what follows an answer and is not
            learned.
    """

    def write(name: str, content: str) -> str:
        values = {"{content}": content, "{bos}": "bos_token", "{eos}": "eos_token"}
        pieces = re.split(r"(\{content\}|\{bos\}|\{eos\})", parts.get(name, ""))
        return "".join(f"{{{{ {values.get(piece) or json.dumps(piece)} }}}}" for piece in pieces if piece)

    said = "message['content']"
    last = f"{{%- if loop.last %}}{write('last', '')}{{% endif %}}" if "last" in parts else ""
    return (
        f"{{%- set begin = messages[0]['content'] if messages[0]['role'] == 'system'"
        f" else {json.dumps(parts.get('default_system', ''))} -%}}\n"
        f"{write('prefix', '')}{{%- if begin %}}{write('system', 'begin')}{{% endif -%}}\n"
        "{%- for message in messages -%}\n"
        f"{{%- if message['role'] == 'user' %}}{write('user', said)}\n"
        "{%- elif message['role'] == 'assistant' %}"
        f"{{% generation %}}{write('assistant', said)}{last}{{% endgeneration %}}{write('after', '')}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}"
    )
