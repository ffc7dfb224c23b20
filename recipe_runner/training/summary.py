"""The start-up summary, which is printed before the first step: what is trained, on what, how long, and where."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe_runner.data.accounting import Accounting
from recipe_runner.data.job import Replaced
from recipe_runner.launch.processes import describe_launcher
from recipe_runner.problems.words import write_facts
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import FROM_DATA
from recipe_runner.recipe.sections import RewardSection, UpstreamSection
from recipe_runner.stages import Stage
from recipe_runner.training.calibration import ROWS
from recipe_runner.training.config import count_prompts, count_steps, steps_per_epoch
from recipe_runner.training.environment import describe_device, describe_processes
from recipe_runner.training.prepare import Prepared


def describe_start(recipe: Recipe, prepared: Prepared, folder: Path) -> str:
    """Describes a run that is about to begin, one fact a line. Needs no trainer and no weights."""
    config, model, accounting = prepared.config, recipe.model, prepared.train.accounting
    rows = len(prepared.train.dataset)
    packed = f" packed into {rows:,} rows of up to {config.max_length} tokens" if accounting.packed_rows else ""
    unpaged = "; no GPU: states are not paged" if "paged" in config.optim.value and config.device.type == "cpu" else ""
    trained, total = prepared.parameters
    held = prepared.evaluation.accounting if prepared.evaluation else None
    method = describe_method(recipe.peft, recipe.quantization, prepared.published, recipe.unfreeze)
    lines = {
        "model": f"{model.name_or_path} ({method})",
        "adapter": describe_continued(model.adapter, prepared.peft_config) if prepared.adapter else "",
        "reference": describe_reference(recipe.stage, recipe.training, bool(recipe.peft), bool(model.adapter)),
        "start": describe_initialisation(recipe.peft["init_lora_weights"], len(prepared.train.dataset))
        * (not prepared.adapter),
        "unfrozen": ", ".join(f"{name} ({len(of):,} tensors)" for name, of in prepared.unfrozen.items()),
        "trainable": f"{trained:,} of {total:,} parameters ({trained / total:.2%})",
        "vision": describe_seeing(prepared.seeing),
        "data": f"{accounting}{packed}",
        "lengths": accounting.describe_lengths(),
        "batches": accounting.describe_batches(),
        "template": describe_template(prepared.replaced, accounting),
        "sources": accounting.describe_sources(),
        "noted": accounting.describe_noted(),
        "not used": accounting.describe_unused(),
        "read as": accounting.describe_guessed(),
        "eval data": "; ".join(filter(None, (str(held), held.describe_sources()))) if held else "none",
        "steps": describe_steps(config, rows, config.world_size, accounting.streamed),
        "optimizer": f"{config.optim.value}, learning rate {config.learning_rate:g},"
        f" {config.lr_scheduler_type.value}{unpaged}",
        "answers": describe_answers(config),
        "rewards": describe_rewards(recipe.rewards),
        "teacher": model.teacher or "",
        "samples": describe_samples(recipe.run.samples, len(prepared.samples)),
        "precision": str(prepared.precision),
        "device": describe_device(config),
        "launcher": describe_launcher(),
        "timeout": f"a process that hangs ends the run after {config.ddp_timeout:,} s (training.ddp_timeout)"
        * (config.world_size > 1),
        "run folder": str(folder),
    }
    return write_facts(lines)


def describe_seeing(parts: Mapping[str, tuple[int, int]]) -> str:
    """What of the parts of a vision model that see is trained."""
    told = {
        name: f"{trained:,} of {total:,} parameters trained" if trained else "frozen"
        for name, (trained, total) in parts.items()
    }
    return ", ".join(f"{name} {what}" for name, what in told.items())


def describe_continued(adapter: object, peft_config: Any) -> str:
    """Which adapter is trained further, and what of the base it holds."""
    saved = len(getattr(peft_config, "modules_to_save", None) or [])
    return f"continued from {adapter}" + f", with {saved} modules of the base that it trains" * bool(saved)


def describe_initialisation(name: object, rows: int) -> str:
    """What an adapter begins with, where something is looked at for it before training."""
    if name in FROM_DATA:
        return f"{name}, by a pass over {min(rows, ROWS):,} rows of the training data before the first step"
    return "loftq, by what the base's weights lose in 4 bits" if name == "loftq" else ""


def describe_answers(config: Any) -> str:
    """How a trainer that generates does it."""
    if not hasattr(config, "max_completion_length"):
        return ""
    by = f"vLLM ({config.vllm_mode})" if config.use_vllm else "transformers"
    return f"of up to {config.max_completion_length:,} tokens, temperature {config.temperature:g}, by {by}"


def describe_rewards(rewards: Sequence[RewardSection]) -> str:
    """What answers are judged by, each with its weight."""
    named = [(one.name or Path(one.model or one.function or "").name, one.key, one.weight) for one in rewards]
    return ", ".join(f"{name}{f':{key}' * bool(key)} x {weight:g}" for name, key, weight in named)


def describe_samples(section: Mapping[str, Any] | None, prompts: int) -> str:
    """How many prompts are answered while the model trains, when, and what they may cost."""
    if not section:
        return ""
    when = "at each evaluation" if section["every"] == "eval" else f"every {section['every']:,} steps"
    most = prompts * section["max_new_tokens"]
    return f"{prompts} prompts {when}, up to {most:,} tokens; a tenth of the time at most"


def describe_steps(config: Any, rows: int, processes: int, streamed: bool = False) -> str:
    """Steps, epochs and batch size, in a line; of what is streamed no epochs, as its end is not known."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    steps = count_steps(config, rows, processes)
    if prompts := count_prompts(config, processes):
        answers = getattr(config, "num_generations", 1)
        told = (
            f"{answers} answers to each of {prompts:,} prompts"
            if answers > 1
            else f"an answer to each of {prompts:,} prompts"
        )
        return (
            f"{steps:,} of {batch:,} answers: {told}; {config.per_device_train_batch_size} per device"
            f" x {config.gradient_accumulation_steps} accumulated x {describe_processes(processes)};"
            f" {steps / steps_per_epoch(config, rows, processes):.3g} epochs"
        )
    if streamed:
        return (
            f"{steps:,} of {batch:,} rows: {config.per_device_train_batch_size} per device"
            f" x {config.gradient_accumulation_steps} accumulated x {describe_processes(processes)};"
            f" {steps * batch:,} rows of the stream in all"
        )
    size = f"{batch:,} rows" if batch <= rows else f"all {rows:,} rows" if rows > 1 else "the one row"
    return (
        f"{steps:,} of {size}: {'up to ' * (batch > rows)}{config.per_device_train_batch_size} per device"
        f" x {config.gradient_accumulation_steps} accumulated x {describe_processes(processes)};"
        f" {steps / steps_per_epoch(config, rows, processes):.3g} epochs"
    )


def describe_template(replaced: Replaced | None, accounting: Accounting) -> str:
    """Which chat template is trained with, where it is not the model's own."""
    if not replaced or accounting.changed_texts:
        return ""  # a warning says how the text changes
    return f"{replaced.name} stands in for the model's own: it marks the answers, and changes no row's text"


def describe_method(
    peft: UpstreamSection, quantization: UpstreamSection, published: str = "", unfreeze: Sequence[str] = ()
) -> str:
    """How the model is adapted, in a few words."""
    if not peft:
        return "partial fine-tuning" if unfreeze else "full fine-tuning"
    if unfreeze:
        return f"{describe_method(peft, quantization, published)}, and parts of the base"
    if published:
        return f"{peft['method']} adapter on a base that was published as {published}"
    if not quantization:
        return f"{peft['method']} adapter"
    bits = "8-bit" if quantization["load_in_8bit"] else f"4-bit {quantization['bnb_4bit_quant_type']}"
    return f"{peft['method']} adapter on a {bits} base"


def describe_reference(stage: Stage, training: UpstreamSection, adapter: bool, continued: bool) -> str:
    """What the trained model is compared with; empty for a stage without a reference.

    Source: trl/trainer/{dpo,kto,rloo,grpo}_trainer.py 1.16.0, __init__.
    """
    if not stage.reference or not training["beta"]:  # GRPO's default has none
        return ""
    if continued:
        which = "a frozen copy of the adapter"
    else:
        which = "the base model, the adapter disabled" if adapter else "a second copy of the model"
    return which + ", computed once before training" * bool(training["precompute_ref_log_probs"])
