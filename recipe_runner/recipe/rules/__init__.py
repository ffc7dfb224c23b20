"""What each section allows, but the whole does not: one file a subject, one small function a rule."""

from collections.abc import Iterable, Iterator

from recipe_runner.problems.problem import Found, Problem, as_warning, at_most
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules import adapter, data, model, packages, quantization, rewards, training
from recipe_runner.recipe.schema import is_name

# What may be meant: it is said, and never fails a run.
WARNINGS = {
    "ignored-key",
    "random-adapter",
    "wrapped-packing",
    "never-evaluated",
    "context-length",
    "unusual-learning-rate",
    "packed-evaluation",
    "paged-optimizer-on-cpu",
    "missing-package",
}


def apply_rules(recipe: Recipe) -> Iterator[tuple[str, Found]]:
    """Every rule by its code, applied to the sections that it is about."""
    base, quantized, peft = recipe.model, recipe.quantization, recipe.peft
    dataset, trained, run = recipe.dataset, recipe.training, recipe.run
    yield "quantized-full-training", quantization.quantization_without_peft(quantized, peft)
    yield "quantization-width", quantization.quantization_width(quantized)
    yield "compute-dtype", quantization.compute_dtype(quantized, trained)
    yield "quantized-head", quantization.skipped_modules(quantized)
    yield "precision-conflict", training.precision_conflict(trained)
    yield "eval-without-data", training.eval_without_data(trained, dataset)
    yield "eval-data-unused", training.eval_data_unused(trained, dataset)
    yield "best-model-schedule", training.best_model_schedule(trained)
    yield "early-stopping", training.early_stopping(trained, run)
    yield "samples", training.samples(trained, run, dataset.has_eval, recipe.stage)
    yield "best-metric", training.best_metric(recipe.stage, trained)
    yield "warmup-length", training.warmup_length(trained, trained["max_steps"])
    yield "least-rate", training.least_rate(trained)
    yield "wrapped-packing", training.wrapped_packing(trained, dataset)
    yield "never-evaluated", training.never_evaluated(trained, trained["max_steps"])
    yield "packing-without-length", training.packing_without_length(trained)
    yield "synced-reference", training.synced_reference(trained, peft)
    yield "packed-evaluation", training.packed_evaluation(recipe.stage, trained, dataset)
    yield "paged-optimizer-on-cpu", training.paged_optimizer_on_cpu(trained, peft)
    yield "global-batch-size", training.global_batch_size(trained, run)
    yield "ignored-key", training.ignored_keys(recipe.stage, trained, dataset)
    yield "unusual-learning-rate", training.learning_rate(recipe.stage, trained, peft)
    yield "peft-optimizer", training.peft_optimizer(trained, peft)
    yield "missing-package", packages.missing_packages(base, trained)
    yield "remote-code-unpinned", model.remote_code_unpinned(base)
    yield "local-model", model.local_model(base)
    yield "fused-projections", model.fused_projections(base, peft)
    yield "context-length", model.context_length(base, trained, peft)
    yield "adapter-not-found", adapter.adapter_folder(base)
    yield "new-tokens", adapter.new_tokens(recipe.stage, base, peft, recipe.unfreeze)
    yield "adapter-without-peft", adapter.adapter_needs_peft(base, peft)
    yield "adapter-base-differs", adapter.adapter_base(base)
    yield "adapter-not-trainable", adapter.adapter_continuation(recipe.stage, base, quantized)
    yield "adapter-config-differs", adapter.adapter_config(base, peft)
    yield "prompt-learning", adapter.prompt_learning(base, peft, trained)
    yield "ignored-key", adapter.placement(peft)
    yield "ignored-key", adapter.dropout_off(peft, trained)
    yield "unfreeze-method", adapter.unfreeze_beside(recipe.unfreeze, peft)
    yield "method-unquantized", adapter.method_on_quantized(quantized, peft)
    yield "rank-allocation", adapter.allocation(base, peft, trained["max_steps"])
    yield "random-adapter", adapter.random_adapter(peft)
    yield "initialisation", adapter.initialisation(recipe.stage, peft, quantized, recipe.unfreeze)
    yield "reward-kind", rewards.reward_kinds(recipe.rewards, dataset)
    yield "reward-kind", rewards.reward_names(recipe.rewards)
    yield "reward-weight", rewards.reward_weights(recipe.rewards)
    yield "code-not-allowed", rewards.reward_code(recipe.rewards, run)
    yield "reward-function", rewards.reward_files(recipe.rewards)
    yield "reward-kind", rewards.unused_columns(recipe.stage, dataset)
    yield "reward-kind", rewards.punished_length(recipe.rewards, trained)
    yield "reward-model", rewards.reward_models(recipe.rewards)
    yield "missing-package", rewards.needed_packages(recipe.rewards, trained)
    yield "generation-batch", rewards.generation_batch(recipe.stage, trained, run)
    yield "prompt-learning", rewards.generating_method(recipe.stage, peft)
    yield "new-head", rewards.scoring_head(recipe.stage, peft)
    yield "wrong-column-role", data.column_roles(dataset)
    yield "source-format", data.source_formats(dataset)
    yield "streaming", data.streamed(recipe.stage, dataset, trained)
    yield "image-use", data.image_use(recipe.stage, dataset, trained, peft)
    yield "mixture-weight", data.mixture_weights(dataset)
    yield "mixture-weight", data.mixture_epochs(dataset)
    yield "wrong-source", data.source_files(dataset)
    yield "template-use", data.template_use(dataset, trained)


def check_rules(recipe: Recipe) -> list[Problem]:
    """Applies every rule to a recipe that passed the schema."""
    return _as_problems(apply_rules(recipe)) + check_name(recipe)


def check_steps(recipe: Recipe, steps: int) -> list[Problem]:
    """Applies the rules about the number of steps, once it is known."""
    trained = recipe.training
    late = [
        ("warmup-length", training.warmup_length(trained, steps)),
        ("rank-allocation", adapter.allocation(recipe.model, recipe.peft, steps)),
        ("never-evaluated", training.never_evaluated(trained, steps)),
    ]
    return _as_problems(late)


def _as_problems(rules: Iterable[tuple[str, Found]]) -> list[Problem]:
    problems: list[Problem] = []
    for code, found in rules:
        problems += at_most(Problem(code, message, None, path, suggestion) for path, message, suggestion in found)
    return [as_warning(problem) if problem.code in WARNINGS else problem for problem in problems]


def check_name(recipe: Recipe) -> list[Problem]:
    """A recipe and its file have one name."""
    if recipe.file.stem in (recipe.name, "recipe", "resolved"):  # a run folder keeps copies by those names
        return []
    message = f"the recipe is named '{recipe.name}', its file '{recipe.file.name}'"
    fix = "give both the same name"
    if not is_name(recipe.file.stem):
        fix = "rename the file: letters, digits, '.', '_' and '-'"
    return [as_warning(Problem("name-differs", message, None, ("name",), fix))]
