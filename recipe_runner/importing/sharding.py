"""DeepSpeed and FSDP of other tools, as launch configurations of accelerate."""

import json
import re
from pathlib import Path
from typing import Any

from recipe_runner.importing.common import convert_checkpointing
from recipe_runner.importing.draft import CONVERTED, NONE, SAME, Draft, number, show, true

LAUNCH = {
    "compute_environment": "LOCAL_MACHINE",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 2,
    "machine_rank": 0,
}
OF_FSDP1 = ("use_orig_params", "sync_module_states", "backward_prefetch", "forward_prefetch", "limit_all_gathers")
FSDP = ("fsdp", "fsdp_config", "fsdp_version", "fsdp_final_state_dict_type")


def convert_sharding(draft: Draft) -> None:
    """DeepSpeed and FSDP are the launcher's: a configuration for it is written beside the recipe.

    Raises:
        UserError: What the file says of DeepSpeed is no configuration.
    """
    if draft.get("deepspeed") not in (None, False):
        _convert_deepspeed(draft)
    elif draft.get("fsdp") or draft.get("fsdp_config"):
        _convert_fsdp(draft)
    draft.note(SAME, "one process, or DDP", "deepspeed", *FSDP)


def _launch_with(draft: Draft, kind: str, **more: Any) -> dict[str, Any]:
    """A launch configuration of the recipe's precision."""
    training = draft.recipe.get("training", {})
    half = "no" if training.get("bf16") is False else "bf16"
    return {**LAUNCH, "distributed_type": kind, "mixed_precision": "fp16" if training.get("fp16") else half, **more}


def _convert_deepspeed(draft: Draft) -> None:
    said = draft.get("deepspeed")
    values = said if isinstance(said, dict) else _read_beside(draft, said)
    if not isinstance(said, dict | str):
        raise draft.refuse(f"deepspeed is {show(said)}, no file and no configuration")
    if values is None:
        stage = re.search(r"(?:zero|z)[_-]?([0-3])", Path(str(said)).name.lower())
        if not stage:
            told = (
                f"{said} is not here: name a launch configuration when you launch, deepspeed_zero2 or deepspeed_zero3"
            )
            draft.note(NONE, told, "deepspeed")
            return
        offload = {"device": "cpu"} if "offload" in str(said).lower() else {}
        zero: Any = {"stage": int(stage[1]), "offload_optimizer": offload}
        zero |= {"offload_param": offload} if stage[1] == "3" else {}
    else:
        zero = values.get("zero_optimization", {})
    stage_said = number(zero.get("stage", 0)) if isinstance(zero, dict) else None
    if not isinstance(stage_said, int) or not 0 <= stage_said <= 3:
        raise draft.refuse(f"deepspeed: zero_optimization is {show(zero)}, which names no stage of 0 to 3")
    section: dict[str, Any] = {"zero_stage": stage_said}
    if stage_said == 3:
        section |= {"zero3_init_flag": True, "zero3_save_16bit_model": True}
    for key in ("offload_optimizer", "offload_param"):
        device = zero[key].get("device", "none") if isinstance(zero.get(key), dict) else "none"
        section |= {f"{key}_device": device} if device != "none" else {}
    draft.launch = _launch_with(draft, "DEEPSPEED", deepspeed_config=section)
    offloaded = [f"{key.split('_')[1]} on {section[key]}" for key in section if key.startswith("offload")]
    told = ", ".join([f"NAME.accelerate.yaml, beside the recipe: ZeRO stage {stage_said}", *offloaded])
    draft.note(CONVERTED, told if values is not None else f"{told}; by the file's name, as it is not here", "deepspeed")


def _read_beside(draft: Draft, said: Any) -> dict[str, Any] | None:
    """The values of a DeepSpeed file that is beside the configuration, or where it says; None where it is not here."""
    for file in (draft.file.parent / str(said), Path(str(said))) if isinstance(said, str) else ():
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(values, dict):
            return values
    return None


def _convert_fsdp(draft: Draft) -> None:
    """FSDP2 of whatever FSDP the file says; what is another there is said of each key."""
    said = draft.get("fsdp_config") if isinstance(draft.get("fsdp_config"), dict) else {}
    options: dict[str, Any] = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    options |= {"fsdp_reshard_after_forward": True, "fsdp_state_dict_type": "FULL_STATE_DICT"}
    if "offload" in str(draft.get("fsdp")):
        options["fsdp_offload_params"] = True
    for name, value in said.items():
        key, (kind, text) = str(name).removeprefix("fsdp_"), (SAME, "as it is here")
        if key in ("reshard_after_forward", "offload_params", "cpu_ram_efficient_loading"):
            options[f"fsdp_{key}"] = true(value)
            kind, text = CONVERTED, f"fsdp_{key}: {str(true(value)).lower()}"
        elif key in ("auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"):
            options[f"fsdp_{key}"] = value
            kind, text = CONVERTED, f"fsdp_{key}: {show(value)}"
        elif key in ("sharding_strategy", "reshard") and str(value) in ("SHARD_GRAD_OP", "2"):
            options["fsdp_reshard_after_forward"] = False
            kind, text = CONVERTED, "fsdp_reshard_after_forward: false"
        elif key == "sharding_strategy" and str(value) not in ("FULL_SHARD", "1"):
            kind, text = NONE, "FSDP2 shards over all devices: see docs/distributed.md"
        elif key in ("state_dict_type", "final_state_dict_type") and value != "FULL_STATE_DICT":
            kind, text = NONE, "FULL_STATE_DICT: transformers saves no model at the end otherwise"
        elif key == "activation_checkpointing" and true(value):
            convert_checkpointing(draft, True)
            kind, text = CONVERTED, "training.activation_checkpointing: true"
        elif key in ("version",) and str(value) == "1":
            kind, text = NONE, "FSDP2 is written"
        elif key in OF_FSDP1:
            kind, text = NONE, "FSDP2 has no such key"
        draft.say(kind, f"fsdp_config.{name}", text)
    draft.launch = _launch_with(draft, "FSDP", fsdp_config=options)
    draft.note(CONVERTED, "NAME.accelerate.yaml, beside the recipe, as FSDP2", "fsdp", "fsdp_config")
    draft.note(SAME if str(draft.get("fsdp_version")) == "2" else NONE, "FSDP2 is written", "fsdp_version")
    draft.note(NONE, "FULL_STATE_DICT: transformers saves no model at the end otherwise", "fsdp_final_state_dict_type")
