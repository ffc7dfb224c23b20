"""Everything that a run needs before weights are loaded, the cheapest first."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from recipe_runner.data.findings import check_labels, find_problems
from recipe_runner.data.job import Job, Replaced
from recipe_runner.data.prepare import order_rows
from recipe_runner.data.prompts import Orders, Prompt, choose_golden, choose_prompts, find_split_prompts, pose
from recipe_runner.data.sources import open_sources
from recipe_runner.data.store import PreparedData, PreparedSplit, hash_tokenizer, prepare_data
from recipe_runner.data.tables import check_vocabulary
from recipe_runner.data.thinking import MARKS
from recipe_runner.files import hash_file, hash_weights
from recipe_runner.launch import processes
from recipe_runner.launch.configuration import Launch
from recipe_runner.model import adapter as new_adapter
from recipe_runner.model import base, continuation, hub
from recipe_runner.model.adapter import is_norm
from recipe_runner.model.load import is_reward_model
from recipe_runner.model.precision import Precision
from recipe_runner.model.quantization import build_quantization, check_published, describe_published
from recipe_runner.model.tokenizer import find_stops, load_tokenizer
from recipe_runner.model.unfreeze import check_new_rows, freeze_others, select_parameters, train_beside_adapter
from recipe_runner.problems.errors import UserError, user_error
from recipe_runner.problems.problem import Problem, as_warning, sort_problems
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules import check_steps
from recipe_runner.recipe.sections import DatasetSection, ModelSection, UpstreamSection
from recipe_runner.runs.golden import ROWS
from recipe_runner.training.config import build_config, count_prompts, count_steps
from recipe_runner.training.environment import check_offloading, choose_precision, describe_environment
from recipe_runner.training.optimizer import check_optimizer, freeze_first_matrices
from recipe_runner.training.resume import describe_batches
from recipe_runner.training.reward_models import check_reward_models, compare_tokens, find_trained, read_own_tokenizer

BASE, ADAPTER = "the base model's weights", "the adapter that it continues from"  # of what a run is made from
BASE_CONFIG, TOKENIZER = "the base model's config.json", "the tokenizer (or its chat template)"


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs before weights are loaded.

    Attributes:
        config: The trainer's configuration, of the stage's class.
        precision: Of weights and computation, and why.
        tokenizer: With the chat template that is trained with.
        adapter: The folder of the adapter that is trained further.
        peft_config: The adapter's configuration; None for full fine-tuning.
        published: How the base's weights were published quantized; empty when they were not.
        unfrozen: Pattern of `unfreeze` -> names of the base's parameters that it stands for.
        parameters: Numbers of parameters that are trained, and of all; 4-bit weights count as what they stand for.
        seeing: Part of a vision model beside its language model -> as `parameters`, of it.
        data: All splits.
        replaced: The model's own chat template, where another is trained with.
        inputs: What else the run is made from, in words -> its hash.
        warnings: What a person should know.
        golden: Prompts by which a served model is compared with the trained one.
        samples: Prompts that are answered while the model trains.
        job: What rows are made with.
        known: Tokens that the model has.
    """

    config: Any
    precision: Precision
    tokenizer: PreTrainedTokenizerBase
    adapter: Path | None
    peft_config: PeftConfig | None
    published: str
    unfrozen: Mapping[str, list[str]]
    parameters: tuple[int, int]
    seeing: Mapping[str, tuple[int, int]]
    data: PreparedData
    inputs: dict[str, str]
    replaced: Replaced | None
    warnings: tuple[Problem, ...]
    golden: list[Prompt]
    samples: list[Prompt]
    job: Job
    known: int

    @property
    def train(self) -> PreparedSplit:
        """The training rows; of what is streamed the first ones."""
        return self.data.splits["train"]

    @property
    def evaluation(self) -> PreparedSplit | None:
        """The evaluation rows, when the recipe evaluates."""
        return self.data.splits.get("eval")


def prepare(recipe: Recipe, launch: Launch | None, before: PreTrainedTokenizerBase | None = None) -> Prepared:
    """Checks and prepares everything but the weights, the cheapest first.

    Args:
        recipe: A resolved recipe.
        launch: What the launcher had set up when this process began.
        before: The tokenizer of the stage before, whose adapter is not there yet.

    Raises:
        UserError: The recipe, the data or the environment is at fault.
    """
    processes.check_launcher(launch, recipe)
    precision = choose_precision(
        recipe.training, recipe.model.dtype, bool(recipe.peft), launch.precision if launch else "no"
    )
    check_offloading(recipe.training)
    hub.find_model(recipe.model)
    training = accumulate(recipe, int(os.environ.get("WORLD_SIZE", 1)))
    if recipe.run.early_stopping:
        training.setdefault("metric_for_best_model", "loss")
    training = processes.join_processes(recipe.training["use_cpu"], recipe.training["ddp_timeout"]) | training
    config = build_config(recipe.stage, training, recipe.model, recipe.run.seed, precision)
    processes.check_processes(config)
    if config.process_index == 0:
        print(f"Preparing {recipe.name} ...", flush=True)
    job, adapter = open_job(recipe, config, before)
    peft_config, model, unfrozen = _check_model(recipe, adapter, len(job.tokenizer))
    published = getattr(model.config, "quantization_config", None)
    check_published(published, recipe.quantization.said)
    check_optimizer(config, model)
    check_norms(model, precision)
    judged_by = check_reward_models(recipe, job.tokenizer)
    if recipe.stage.taught:
        judged_by |= _check_teacher(recipe, job.tokenizer)
    data = prepare_data(job)
    _check_tokens(recipe.model.name_or_path, job.tokenizer, data, model.config.get_text_config().vocab_size)
    orders = order_rows(job)
    problems = find_data_problems(recipe.model, job, data, orders)
    check_completions(config, data, model.config)
    steps = count_steps(config, len(data.splits["train"].dataset), config.world_size)
    if recipe.training["max_steps"] <= 0:  # else known, and said, before
        problems += check_steps(recipe, steps)
    raise_errors(problems)
    if isinstance(peft_config, AdaLoraConfig) and not adapter:
        peft_config.total_step = steps
    if warning := processes.find_default_config():
        problems.append(warning)
    if (recipe.training["peft_optimizer"] or {}).get("name") == "lorafa":
        freeze_first_matrices(model)
    parameters = count_parameters(model)
    if recipe.peft and parameters[0] > parameters[1] - parameters[0]:
        message = (
            f"{parameters[0]:,} parameters are trained, and the model itself has {parameters[1] - parameters[0]:,}"
        )
        problems.append(as_warning(Problem("large-adapter", message, path=("peft",))))
    if not recipe.peft and precision.dtype in ("bfloat16", "float16"):
        message = f"the weights themselves are trained in {precision.dtype}: a step below 1/256 of a number is lost"
        fix = "leave model.dtype out (float32 weights, mixed precision), or train an adapter"
        problems.append(as_warning(Problem("half-precision-weights", message, None, ("model", "dtype"), fix)))
    problems += check_prompt_text(peft_config, job.tokenizer)
    inputs = _hash_inputs(recipe.model, model.config, job.tokenizer, adapter) | judged_by
    return Prepared(
        config,
        precision,
        job.tokenizer,
        adapter,
        peft_config,
        describe_published(published),
        unfrozen,
        parameters,
        count_seeing(model),
        data,
        inputs,
        job.replaced,
        tuple(problems),
        choose_golden(job, orders, ROWS),
        choose_samples(recipe.run.samples or {}, job, orders),
        job,
        model.config.get_text_config().vocab_size,
    )


def check_prompt_text(config: PeftConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """Warns where PEFT cuts off the end of the text that a prompt of virtual tokens begins with."""
    text, most = getattr(config, "prompt_tuning_init_text", None), getattr(config, "num_virtual_tokens", None)
    count = len(tokenizer(text)["input_ids"]) if text else 0
    if not most or count <= most:
        return []
    message = f"the text has {count} tokens, and {most} virtual tokens begin with it: PEFT cuts off its end"
    fix = f"set num_virtual_tokens to {count}, or write less"
    return [as_warning(Problem("prompt-text-cut", message, None, ("peft", "prompt_tuning_init_text"), fix))]


def compare_prompts(job: Job, orders: Orders) -> list[Problem]:
    """Warns where a server would ask otherwise than the model is trained to answer."""
    found, looked, change = find_split_prompts(job, orders)
    if not found:
        return []
    message = f"in {found} of {looked} rows the prompt alone, which a server asks, is not what is before the answer"
    message += f": {change}" * bool(change)
    fix = "end the prompt of dataset.template with a line break"
    if job.dataset.format == "segments":
        fix = (
            f"begin rows with {job.tokenizer.bos_token or 'what the tokenizer adds'}, and let a segment that is learned"
        )
        fix += " begin where the text before it ends a line or a word"
    elif job.dataset.template is None:
        fix = "take a chat template that renders both alike (training.chat_template_path)"
    if any(begin in change for begin, _ in MARKS):
        fix = (
            "the template opens a block of thinking: take rows with thinking, and dataset.thinking: keep or mask; or a"
        )
        fix += " template that opens none (training.chat_template_path)"
    return [as_warning(Problem("prompt-differs", message, None, ("dataset",), fix))]


def choose_samples(section: Mapping[str, Any], job: Job, orders: Orders) -> list[Prompt]:
    """The prompts of `run.samples`: those that it says, then those of the first rows of the evaluation data."""
    said = [pose(text, job.dataset) for text in section.get("prompts", ())]
    return said + (choose_prompts(job, orders, section["rows"]) if section.get("rows") else [])


def check_norms(model: torch.nn.Module, precision: Precision) -> None:
    """Checks that norms which are trained can move: near 1, bfloat16 has no number within 1/256 of another.

    Raises:
        UserError: They are in half precision, and no mixed precision lets them be in float32. Full fine-tuning, of
            which they are the least part, is not looked at.
    """
    if precision.bf16 or precision.fp16 or precision.dtype not in ("bfloat16", "float16"):
        return
    if all(parameter.requires_grad for parameter in model.parameters()):
        return
    for name, module in model.named_modules():
        if is_norm(module) and any(parameter.requires_grad for parameter in module.parameters()):
            message = (
                f"{name.removeprefix('base_model.model.')} is trained in {precision.dtype}, in which it does not move"
            )
            fix = "set training.bf16: true, or model.dtype: float32"
            raise user_error("norms-do-not-move", message, fix, path=("model", "dtype"))


def accumulate(recipe: Recipe, count: int) -> dict[str, Any]:
    """The recipe's `training`, with the accumulation that `run.global_batch_size` takes on a number of processes."""
    training = dict(recipe.training.said)
    if size := recipe.run.global_batch_size:
        device = recipe.training["per_device_train_batch_size"]
        training["gradient_accumulation_steps"] = processes.derive_accumulation(size, device, count)
    return training


def check_completions(config: Any, data: PreparedData, model_config: Any) -> None:
    """Checks that there are prompts for a batch, and that answers have room after the longest one.

    Raises:
        UserError: There are not, or they have none.
    """
    prompts = count_prompts(config, config.world_size)
    if not prompts:
        return
    rows = len(data.splits["train"].dataset)
    if rows < prompts:
        message = f"{rows:,} prompts to train on, and {prompts:,} are answered at a time: there is no whole batch"
        fix = "take more data, a smaller batch, or more num_generations"
        raise user_error("too-few-rows", message, fix, path=("dataset", "train"))
    context, most = (
        getattr(model_config.get_text_config(), "max_position_embeddings", None),
        config.max_completion_length,
    )
    for split in data.splits.values():
        longest = split.accounting.lengths["max"]
        if context and longest + most > context:
            message = f"{most:,} tokens of an answer and {longest:,} of the longest prompt are {longest + most:,},"
            message += f" and the model has {context:,} positions"
            fix = f"set it to {context - longest:,} or less" if longest < context else "leave out the longest prompts"
            raise user_error("no-room-to-answer", message, fix, path=("training", "max_completion_length"))


def _check_teacher(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Compares the teacher's tokenizer with the model's: what is learned is its distribution over the same tokens.

    Returns:
        What the teacher is, in words -> its hash, where it is a folder.

    Raises:
        UserError: There is no such teacher, or it knows other tokens.
    """
    path, model = ("model", "teacher"), recipe.model
    found = find_trained(str(model.teacher), path)
    scores = found.recipe.stage.scores if found.recipe else is_reward_model(Path(found.folder))
    if scores:
        message = f"{model.teacher} is a reward model: it gives numbers, and has no words to learn from"
        raise user_error("teacher-differs", message, "name a model that answers", path=path)
    place = {"revision": model.teacher_revision} if model.teacher_revision else {}
    if changed := compare_tokens(read_own_tokenizer(found.folder, path, **place), tokenizer):
        message = f"{model.teacher} has another tokenizer than {model.name_or_path}: {changed}"
        raise user_error("teacher-differs", message, "take a teacher of the same family", path=path)
    digest = hash_weights(Path(found.folder)) if Path(found.folder).is_dir() else ""
    return {"the teacher": digest} if digest else {}


def _hash_inputs(
    model: ModelSection, model_config: Any, tokenizer: PreTrainedTokenizerBase, adapter: Path | None
) -> dict[str, str]:
    """What a run is made from beside its data, in words -> its hash (on the hub: the commit)."""
    folder = model.folder
    found = {
        BASE: hash_weights(folder) if folder else getattr(model_config, "_commit_hash", None),
        BASE_CONFIG: hash_file(folder / "config.json") if folder else None,
        TOKENIZER: hash_tokenizer(tokenizer),
        ADAPTER: hash_weights(adapter) if adapter else None,
    }
    return {name: digest for name, digest in found.items() if digest}


def open_job(recipe: Recipe, config: Any, before: PreTrainedTokenizerBase | None = None) -> tuple[Job, Path | None]:
    """Opens data, tokenizer and template, and finds the adapter that training continues from.

    Raises:
        UserError: One of them is at fault.
    """
    adapter = continuation.find_adapter(recipe.model, recipe.peft)
    sources = open_sources(recipe.dataset)
    tokenizer, replaced = _load_tokenizer(recipe.model, recipe.dataset, recipe.training, adapter, before)
    return Job(recipe.stage, recipe.dataset, recipe.run.seed, sources, tokenizer, config, replaced), adapter


def _load_tokenizer(
    model: ModelSection,
    dataset: DatasetSection,
    training: UpstreamSection,
    adapter: Path | None,
    before: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedTokenizerBase, Replaced | None]:
    """The tokenizer, with the chat template of the recipe, else of the adapter that is trained further."""
    saved = continuation.read_tokenizer(adapter) if adapter else before
    tokenizer, replaced = load_tokenizer(model, dataset, training, saved)
    if adapter and saved is not None:
        continuation.check_tokenizer(saved, tokenizer, model.name_or_path)
    return tokenizer, replaced


def _check_model(
    recipe: Recipe, adapter: Path | None, tokens: int
) -> tuple[PeftConfig | None, Any, dict[str, list[str]]]:
    """The adapter's configuration, the model without weights that it was put on, and what is trained of the base.

    Raises:
        UserError: The adapter does not suit the model.
    """
    model_config = base.load_model_config(recipe.model, recipe.stage.scores)

    def build() -> torch.nn.Module:
        empty = base.build_empty(model_config, recipe.model.trust_remote_code, recipe.stage.scores)
        if recipe.model.adds_tokens and tokens > empty.get_input_embeddings().num_embeddings:
            with torch.device("meta"):
                empty.resize_token_embeddings(tokens, mean_resizing=False)
        checked: torch.nn.Module = empty
        return checked

    name = recipe.model.name_or_path
    asked = new_adapter.build_peft(recipe.peft.said, recipe.stage.task, recipe.model)
    model, unfrozen = build(), {}
    if recipe.unfreeze:
        quantized = build_quantization(recipe.quantization.said) or getattr(model_config, "quantization_config", None)
        unfrozen = select_parameters(recipe.unfreeze, model, quantized)
        if asked:
            train_beside_adapter(asked, unfrozen, model)
        elif recipe.model.adds_tokens:
            check_new_rows(unfrozen, model)
    if adapter:
        fitted, again = (continuation.load_peft(adapter, name, recipe.peft, recipe.stage.task) for _ in range(2))
        model = continuation.check_fit(adapter, fitted, asked, build, f"{model_config.model_type}, {name}")
        return again, model, unfrozen  # PEFT has written into the first
    if asked:
        if recipe.model.adds_tokens:  # after unfreeze, which may name the embeddings
            new_adapter.check_new_tokens(asked, model)
        return asked, new_adapter.fit_adapter(asked, model, build, model_config.model_type), unfrozen
    if unfrozen:
        freeze_others(model, unfrozen)
    return None, model, unfrozen


def _check_tokens(name: str, tokenizer: PreTrainedTokenizerBase, data: PreparedData, known: int) -> None:
    """Checks that the model has an embedding for every token: the tokenizer may have been given more since.

    Raises:
        UserError: It does not.
    """
    for which in ("pad", "eos", "bos"):
        number = getattr(tokenizer, f"{which}_token_id")
        if number is not None and number >= known:
            token = getattr(tokenizer, f"{which}_token")
            message = (
                f"{name}: the {which} token {token} is token {number:,}, the model has the tokens 0 to {known - 1:,}"
            )
            fix = (
                f"name a token of the model as {which}_token in tokenizer_config.json, or resize the model's embeddings"
            )
            raise user_error("tokens-not-in-model", message, fix, path=("model", "name_or_path"))
    for prepared in data.splits.values():
        check_vocabulary(prepared.dataset.data, known, name)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Numbers of parameters that are trained, and of all, by the model on the meta device, with its adapter."""
    if isinstance(model, PeftModel):
        trained, total = model.get_nb_trainable_parameters()
        return int(trained), int(total)
    return _count(model)


def count_seeing(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Part of a vision model beside its language model -> numbers of parameters that are trained, and of all."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    named = dict(base.named_modules())
    return {name.rpartition(".")[2]: _count(named[name]) for name in new_adapter.find_seeing(base)}


def _count(module: torch.nn.Module) -> tuple[int, int]:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def find_data_problems(model: ModelSection, job: Job, data: PreparedData, orders: Orders) -> list[Problem]:
    """What was found in the data of all splits: errors and warnings."""
    stops = find_stops(model, job.tokenizer)
    found = [
        problem
        for split, prepared in data.splits.items()
        for problem in find_problems(job.dataset, job.tokenizer, stops, prepared.accounting, split, job.replaced)
    ]
    found += check_labels(job.config, data.splits["train"].accounting)
    found += compare_prompts(job, orders)
    return sort_problems(found)


def raise_errors(problems: list[Problem]) -> None:
    """Ends a command for the errors among what was found.

    Raises:
        UserError: There are some.
    """
    if errors := [problem for problem in problems if problem.severity == "error"]:
        raise UserError(errors)


def describe_run(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """What `environment.json` holds: versions and hardware, precision, what became of the data."""
    base, adapter = recipe.model, prepared.adapter
    weights = prepared.inputs.get(BASE) if base.folder else None
    return describe_environment(recipe.file.parent) | {
        "base_model": {"name_or_path": base.name_or_path, "weights": weights},
        "adapter": {"folder": str(adapter), "weights": prepared.inputs.get(ADAPTER)} if adapter else None,
        "processes": describe_batches(prepared.config),
        "precision": str(prepared.precision),
        "parameters": {"trained": prepared.parameters[0], "total": prepared.parameters[1]},
        "data": {name: asdict(split.accounting) for name, split in prepared.data.splits.items()},
        "dataset_fingerprint": prepared.data.key,
        "data_files": prepared.data.files,
        "inputs": prepared.inputs,
        "warnings": [str(recipe.place(problem)) for problem in prepared.warnings],
    }
