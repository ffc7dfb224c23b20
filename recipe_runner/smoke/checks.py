"""What smoke checks of a run, each by itself: what is expected comes from the recipe, not from the code that trained.

A check yields what it found wrong, one sentence each. `CHECKS` at the end is the list, in the order of the table.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, Trainer, get_scheduler

from recipe_runner.data.tables import IGNORED
from recipe_runner.model.adapter import saves_embeddings
from recipe_runner.model.load import load_result
from recipe_runner.recipe.recipe import Recipe
from recipe_runner.recipe.rules.adapter import alters_base
from recipe_runner.runs.folder import result_name
from recipe_runner.smoke.rows import Wanted, squeeze
from recipe_runner.smoke.shrink import Small
from recipe_runner.smoke.watch import Seen, hash_frozen, split_documents

CLOSE, CLOSE_HALF = 1e-3, 3e-2  # of losses and logits, relative: in float32, and where something is in half precision
MIXED = 0.5  # share of what a document would see of another, above which it does; rounding gives some
SHOWN = 3  # names in a sentence
# Keys that the runner reads itself, or that have a check of their own.
OWN_CHECK = (
    *("chat_template_path", "peft_optimizer", "report_to", "bf16", "fp16", "gradient_accumulation_steps"),
    "save_total_limit",
)
BEGINS_AT_BASE = ("lora", "adalora", "bottleneck", "ia3", "vera", "hira", "oft", "boft", "ln_tuning", "road")


@dataclass(frozen=True)
class Done:
    """A run that is over, and what is known of it.

    Attributes:
        recipe: As it is on the shelf, resolved.
        small: As it was run.
        seen: What was seen of it.
        full: What the adapter is put on in the model at its real size: see `FullSize`.
        again: What was seen of the run that went on from a checkpoint; None where it was not resumed.
        first: Tensors of the result, before the run was resumed.
    """

    recipe: Recipe
    small: Small
    seen: Seen
    full: "FullSize"
    again: Seen | None = None
    first: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.seen.model

    @property
    def close(self) -> float:
        """How near two numbers must be that should be the same."""
        halves = self.recipe.quantization or self.recipe.model.dtype in ("bfloat16", "float16")
        config = self.seen.trainer.args
        return CLOSE_HALF if halves or config.bf16 or config.fp16 else CLOSE


@dataclass(frozen=True)
class FullSize:
    """What is adapted or trained in the model at its real size, without weights.

    Attributes:
        adapted: Names of modules with an adapter.
        trained: Names of parameters that are trained, of the base's.
        modules: Names of all modules.
        parameters: How many the base has.
    """

    adapted: frozenset[str]
    trained: frozenset[str]
    modules: frozenset[str]
    parameters: int


Found = Iterator[str]


def check_size(done: Done) -> Found:
    """The model that the facts describe has as many parameters as were published."""
    facts = done.small.stand_in.facts
    if facts and abs(done.full.parameters / facts.parameters - 1) > 0.01:
        yield f"{facts.name} has {done.full.parameters:,} parameters by its facts, {facts.published} were published"


def check_targets(done: Done) -> Found:
    """The adapter sits on the modules that it sits on at the real size, and there on every layer that has them."""
    if not done.recipe.peft:
        return
    here = {_generalize(name) for name in adapted_modules(done.model)}
    real = {_generalize(name) for name in done.full.adapted}
    if here != real:
        names = _name(here - real) or "fewer modules", _name(real - here) or "fewer"
        yield f"the adapter is on {names[0]} here, and on {names[1]} at full size"
    if done.recipe.peft["layers_to_transform"] is not None or done.recipe.peft["layer_replication"]:
        return  # the recipe says which layers
    for kind in sorted(real):
        there = [name for name in done.full.modules if _generalize(name) == kind]
        whole = {name.rpartition(".")[0] for name in done.full.trained}  # unfreeze trains them, without an adapter
        missing = set(there) - set(done.full.adapted) - whole
        if missing:
            yield f"{len(missing)} of {len(there)} modules {kind} have no adapter at full size, {min(missing)} for one"


def adapted_modules(model: Any) -> set[str]:
    """Names of the modules of the base that have an adapter."""
    inside = "base_model.model."
    return {name.removeprefix(inside) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def _generalize(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def check_base(done: Done) -> Found:
    """Training began with the weights of the model: those that are not quantized are compared with its files."""
    if alters_base(done.recipe.peft) or done.recipe.model.adds_tokens:
        return
    files = load_file(done.small.stand_in.folder / "model.safetensors")
    begun = done.seen.frozen
    compared = 0
    tensors = dict(done.model.named_parameters())
    for name, tensor in files.items():
        for found in (
            name,
            f"base_model.{name}",  # of an adapter of virtual tokens, which wraps the model and not its layers
            f"base_model.model.{name}",
            f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight",
        ):
            value = done.seen.trainable.get(found)
            if value is None and found in begun and tensors[found].shape == tensor.shape:
                value = tensors[found].detach()  # frozen: `check_frozen` says that it is as it was
            if value is None or value.shape != tensor.shape:
                continue
            compared += 1
            if not torch.allclose(value.float().cpu(), tensor.to(value.dtype).float(), rtol=0, atol=1e-6):
                yield f"{found} did not begin as the model's {name}"
                return
    if not compared:
        yield "none of the model's weights could be compared with its files"


def check_frozen(done: Done) -> Found:
    """No tensor changes that is not trained."""
    now = hash_frozen(done.model)
    changed = [name for name, digest in done.seen.frozen.items() if now.get(name, digest) != digest]
    if changed:
        yield f"{len(changed)} tensors changed that are not trained: {_name(changed)}"
    if not done.seen.frozen and done.recipe.peft:
        yield "nothing is frozen beside the adapter"


def check_trained(done: Done) -> Found:
    """What the recipe says is trained is what is trained: an adapter, parts of the base, or all of it."""
    names = set(done.seen.trainable)
    own = {name for name in names if _is_of_base(name)}
    if not done.recipe.peft and not done.recipe.unfreeze and done.seen.frozen:
        yield f"{len(done.seen.frozen)} tensors are frozen in full fine-tuning: {_name(done.seen.frozen)}"
    if done.recipe.unfreeze and not done.recipe.peft:
        here, real = {_generalize(name) for name in own}, {_generalize(name) for name in done.full.trained}
        if here != real:
            yield f"of the base {_name(here ^ real)} is trained at one size, and not at the other"
    if done.recipe.peft and not done.recipe.unfreeze and own and done.recipe.peft["method"] not in ("ln_tuning", "osf"):
        extra = [name for name in own if "modules_to_save" not in name and "bias" not in name]
        if extra and done.recipe.peft["bias"] in (None, "none"):
            yield f"the base is trained beside the adapter: {_name(extra)}"
    if not names:
        yield "nothing is trained"


def _is_of_base(name: str) -> bool:
    """Whether a parameter is one of the base's: PEFT names its own by the method."""
    marks = ("lora_", "adapter", "prompt_encoder", "ia3_", "vera_", "hira_", "oft_", "boft_", "hra_", "default")
    return not any(mark in name for mark in marks)


def list_excused(done: Done) -> dict[str, str]:
    """Trainable tensors that may have no gradient in a few steps -> why."""
    excused = {}
    config = done.model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    for name in done.seen.trainable:
        if experts and ("expert" in name or "router" in name or "gate." in name):
            excused[name] = "an expert that no token was routed to"
        elif "embed" in name and "embed_tokens" not in name:
            excused[name] = "positions beyond the rows"
        elif (done.recipe.training["peft_optimizer"] or {}).get("name") == "lorafa" and "lora_A" in name:
            excused[name] = "LoRA-FA does not train it"
        elif name.endswith(("k_proj.bias", "key.bias")):
            excused[name] = "a bias of keys adds the same to every score"
    return excused


def check_gradients(done: Done) -> Found:
    """Every trainable tensor gets a gradient other than zero within the steps."""
    excused = list_excused(done)
    still = [name for name in done.seen.trainable if name not in done.seen.moved and name not in excused]
    if still:
        yield f"{len(still)} of {len(done.seen.trainable)} trainable tensors got no gradient: {_name(still)}"


def check_moved(done: Done) -> Found:
    """Every trainable tensor with a gradient changes."""
    now = dict(done.model.named_parameters())
    if not any(rate for rates in done.seen.rates for rate in rates):
        yield "the learning rate was 0 in every step"
        return
    still = [
        name
        for name, before in done.seen.trainable.items()
        if name in done.seen.moved
        and name in now
        and now[name].shape == before.shape
        and torch.equal(now[name], before)
    ]
    if len(still) > len(done.seen.moved) // 2:  # in bfloat16 a small step may be lost
        yield f"{len(still)} trainable tensors with a gradient did not change: {_name(still)}"


def check_rows(done: Done) -> Found:
    """The trainer has the rows that the recipe says, and none is in both splits."""
    trained, held = done.seen.trainer.train_dataset, done.seen.trainer.eval_dataset
    counted = done.seen.prepared.train.accounting
    read = done.small.rows["train"]
    section = done.small.recipe.dataset
    limits = [source.limit for source in section.train if source.limit]
    weighted = any(source.weight is not None for source in section.train)
    expected = read - max(1, round(read * section.fraction)) if section.fraction else read
    if len(section.train) == 1 and not limits and not weighted and counted.rows_read != expected:
        yield f"{counted.rows_read} rows were read to train on, not {expected}"
    if section.has_eval and held is None:
        yield "the trainer has no evaluation data"
    lost = counted.rows_read - counted.rows_kept
    if lost > counted.rows_read * section.max_dropped:
        yield f"{lost} of {counted.rows_read} rows were dropped: {', '.join(counted.dropped)}"
    if counted.rows_truncated > counted.rows_kept / 2:
        yield f"{counted.rows_truncated} of {counted.rows_kept} rows lost tokens at max_length"
    if section.fraction and "made-up" in done.small.told and held is not None:
        column = "input_ids" if "input_ids" in trained.column_names else "prompt_ids"
        packed = "seq_lengths" in trained.column_names
        if not packed and {tuple(row) for row in trained[column]} & {tuple(row) for row in held[column]}:
            yield "rows that are trained on are held out, too"


def check_mask(done: Done) -> Found:
    """What is learned is the answers, whole, with the token that ends a turn; never padding, never a question."""
    tokenizer = done.seen.prepared.tokenizer
    if not done.seen.batches:
        yield "no batch was seen"
        return
    for batch in done.seen.batches:
        if done.recipe.stage.shape == "tokens":
            yield from _check_tokens(done, batch.inputs, tokenizer)
        elif done.recipe.stage.shape in ("pairs", "unpaired"):
            yield from _check_answers(done, batch.inputs, tokenizer)


def _check_tokens(done: Done, inputs: Mapping[str, Any], tokenizer: Any) -> Found:
    ids, labels = inputs["input_ids"], inputs["labels"]
    learned = labels != IGNORED
    if bool((labels[learned] != ids[learned]).any()):
        yield "labels are not the tokens at their place"
        return
    real = inputs.get("attention_mask")
    if real is not None and real.shape == ids.shape and bool(learned[real == 0].any()):
        yield "padding is learned"
    wanted, ends = done.small.wanted, set(tokenizer.convert_tokens_to_ids(sorted(done.small.stand_in.stops)))
    documents = split_documents(dict(inputs))
    limit = done.recipe.training["max_length"]
    texts = frozenset(text for of in wanted for text in of.learned)
    asked = [text for of in wanted for text in of.asked]
    whole = wanted[0].whole
    cut = done.seen.prepared.train.accounting
    splits = done.recipe.training["packing_strategy"] == "bfd_split" and done.recipe.training["packing"]
    parted = bool(cut.rows_truncated) or splits or done.recipe.training["packing_strategy"] == "wrapped"
    ended = 0
    for tokens, marks in documents:
        runs = _find_runs(tokens, marks)
        if not runs:
            yield f"nothing is learned of a row: {tokenizer.decode(tokens)[:80]!r}"
            return
        ended += any(token in ends for run in runs for token in run)
        if whole:
            if sum(map(len, runs)) < len(tokens) - 2:  # a first token is never predicted
                yield f"{len(tokens) - sum(map(len, runs))} of {len(tokens)} tokens of a row are not learned"
                return
            continue
        for run in runs:
            said = squeeze(tokenizer.decode(run, skip_special_tokens=True))
            if said in texts or (parted and any(said in text for text in texts)):
                continue
            if limit and len(tokens) >= limit and any(text.startswith(said) for text in texts):
                continue
            yield f"what is learned is no answer of the data: {tokenizer.decode(run)[:100]!r}"
            return
    if not ended:
        yield f"no token is learned at which the model stops ({', '.join(sorted(done.small.stand_in.stops))})"
    text = squeeze(tokenizer.decode([t for tokens, _ in documents for t in tokens], skip_special_tokens=True))
    if asked and not any(question in text for question in asked):
        yield "no question of the data is before its answer"
    if done.recipe.dataset.system and squeeze(done.recipe.dataset.system) not in text:
        yield "the system prompt (dataset.system) is in no row"
    bos = tokenizer.bos_token_id
    if bos is not None and any(tokens[:2] == [bos, bos] for tokens, _ in documents):
        yield "rows begin with two tokens that mark a beginning"


def _find_runs(tokens: Sequence[int], labels: Sequence[int]) -> list[list[int]]:
    """Stretches of learned tokens."""
    runs: list[list[int]] = []
    for place, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        if label == IGNORED:
            continue
        if place and labels[place - 1] != IGNORED and runs:
            runs[-1].append(token)
        else:
            runs.append([token])
    return runs


def _check_answers(done: Done, inputs: Mapping[str, Any], tokenizer: Any) -> Found:
    wanted: list[Wanted] = done.small.wanted
    pairs = done.recipe.stage.shape == "pairs"
    ids, masks, real = (inputs[name] for name in ("input_ids", "completion_mask", "attention_mask"))
    ends = set(tokenizer.convert_tokens_to_ids(sorted(done.small.stand_in.stops)))
    chosen = frozenset(text for of in wanted for text in of.learned)
    rejected = frozenset(text for of in wanted for text in of.rejected)
    if bool((masks.bool() & ~real.bool()).any()):
        yield "padding is learned"
    for place, (row, mask) in enumerate(zip(ids, masks, strict=True)):
        run = row[mask.bool()].tolist()
        said, is_chosen = squeeze(tokenizer.decode(run, skip_special_tokens=True)), place < len(ids) // 2 or not pairs
        texts = chosen if is_chosen else rejected
        if said not in texts and not any(text.startswith(said) and said for text in texts):
            kind = "chosen" if is_chosen else "rejected"
            yield f"what is learned as {kind} is no {kind} answer of the data: {tokenizer.decode(run)[:100]!r}"
            return
        if said in texts and not any(token in ends for token in run):
            stops = ", ".join(sorted(done.small.stand_in.stops))
            yield f"an answer is learned without a token at which the model stops ({stops})"
            return


def check_loss(done: Done) -> Found:
    """The first loss is what the definition says, and every loss is a finite number."""
    losses = list(done.seen.losses.values())
    if not losses or not all(math.isfinite(loss) for loss in losses):
        yield f"losses are not finite: {losses}"
        return
    mixture = bool(getattr(done.seen.trainer, "aux_loss_enabled", False))
    begins_at_base = not done.recipe.peft or done.recipe.peft["method"] in BEGINS_AT_BASE
    for batch in done.seen.batches:
        if batch.own_loss is None or done.recipe.peft["method"] == "adalora":  # which adds to the loss
            continue
        if not begins_at_base and _has_dropout(done):
            continue
        allowed = max(done.close, 2e-2 if mixture else 0) * max(abs(batch.own_loss), 1e-3)
        if abs(batch.loss - batch.own_loss) > allowed:
            yield f"the loss of the first step is {batch.loss:.4f}, and {batch.own_loss:.4f} by the definition"
            return
        if batch.mixing is not None and batch.mixing > MIXED:
            yield f"a document of a packed row sees the one before it ({batch.mixing:.0%} of what there is to see)"
            return
    if not done.recipe.stage.first_loss or not begins_at_base:
        return
    kinds = done.recipe.training["loss_type"]
    kind = next(iter(done.recipe.stage.first_loss), "") if kinds is None else kinds
    kind = kind[0] if isinstance(kind, list) and len(kind) == 1 else kind
    known = done.recipe.stage.first_loss.get(kind) if isinstance(kind, str) else None
    first = done.seen.losses.get(1)
    if known is not None and first is not None and abs(first - known) > 0.02:
        yield f"the first loss is {first:.4f}: of a model that still is its reference it is {known:.4f}"


def _has_dropout(done: Done) -> bool:
    return any(isinstance(m, torch.nn.Dropout) and m.p for m in done.model.modules())


def check_options(done: Done) -> Found:
    """Every key of the recipe reached the object that it configures, with that value."""
    config, small = done.seen.trainer.args, done.small.recipe
    for key, value in small.training.said.items():
        if key in OWN_CHECK:
            continue
        found = getattr(config, key, None)
        if not _same(found, value):
            yield f"training.{key} is {value!r}, and the trainer has {found!r}"
    batches = done.recipe.training["gradient_accumulation_steps"]
    if not done.recipe.run.global_batch_size and config.gradient_accumulation_steps != batches:
        found = config.gradient_accumulation_steps
        yield f"training.gradient_accumulation_steps is {batches}, and the trainer has {found}"
    if (config.seed, config.data_seed) != (done.recipe.run.seed, done.recipe.run.seed):
        yield f"run.seed is {done.recipe.run.seed}, and the trainer has {config.seed} and {config.data_seed}"
    yield from _check_peft(done)
    yield from _check_model(done)
    yield from _check_quantization(done)


def _same(found: Any, said: Any) -> bool:
    found = getattr(found, "value", found)
    if isinstance(found, Mapping) and isinstance(said, Mapping):
        return all(_same(found.get(key), value) for key, value in said.items())
    if isinstance(found, list | tuple | set | frozenset) and isinstance(said, list | tuple):
        return sorted(map(str, found)) == sorted(map(str, said))
    if isinstance(found, list | tuple) and len(found) == 1:
        found = found[0]
    if isinstance(said, bool) or isinstance(found, bool):
        return bool(found) == bool(said)
    if isinstance(found, int | float) and isinstance(said, int | float):
        return math.isclose(found, said, rel_tol=1e-9)
    return str(found) == str(said)


def _check_peft(done: Done) -> Found:
    if not done.recipe.peft:
        if isinstance(done.model, PeftModel):
            yield "there is an adapter, and the recipe has none"
        return
    if not isinstance(done.model, PeftModel):
        yield "there is no adapter, and the recipe has one"
        return
    config = done.model.active_peft_config
    method = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    if method != done.recipe.peft["method"]:
        yield f"peft.method is {done.recipe.peft['method']}, and the adapter is {method}"
    for key, value in done.small.recipe.peft.said.items():
        if key in ("method", "target_modules", "modules_to_save", "init_lora_weights", "exclude_modules"):
            continue  # names that PEFT spells out: `check_targets`
        found = getattr(config, key, None)
        if not _same(found, value) and not hasattr(found, "__dataclass_fields__"):
            yield f"peft.{key} is {value!r}, and the adapter has {found!r}"
    if method == "lora":
        rank, alpha = done.recipe.peft["r"], done.recipe.peft["lora_alpha"]
        patterns = done.recipe.peft["rank_pattern"] or done.recipe.peft["alpha_pattern"]
        wanted = alpha / math.sqrt(rank) if done.recipe.peft["use_rslora"] else alpha / rank
        scales = {
            float(of)
            for m in done.model.modules()
            if isinstance(m, BaseTunerLayer)
            for of in getattr(m, "scaling", {}).values()
        }
        if not patterns and any(not math.isclose(scale, wanted, rel_tol=1e-6) for scale in scales):
            yield f"what LoRA adds is scaled by {sorted(scales)}, not by {wanted:g} (lora_alpha, r)"


def _check_model(done: Done) -> Found:
    section = done.small.recipe.model
    attention = section.attn_implementation
    if attention and done.model.config.get_text_config()._attn_implementation != attention:
        yield f"model.attn_implementation is {attention}, and the model has {done.model.config._attn_implementation}"
    wanted = done.seen.prepared.precision.dtype
    if section.dtype and wanted != section.dtype:
        yield f"model.dtype is {section.dtype}, and {wanted} was chosen"
    plain = {
        str(p.dtype).removeprefix("torch.")
        for name, p in done.model.named_parameters()
        if _is_of_base(name) and not p.requires_grad and p.is_floating_point() and "norm" not in name
    }
    if section.dtype and plain and plain != {section.dtype}:
        yield f"model.dtype is {section.dtype}, and the weights are {', '.join(sorted(plain))}"
    checkpointing = done.small.recipe.training["activation_checkpointing"]
    if checkpointing is not None and bool(done.model.is_gradient_checkpointing) != bool(checkpointing):
        yield f"training.activation_checkpointing is {checkpointing}, and the model does otherwise"


def _check_quantization(done: Done) -> Found:
    asked = done.recipe.quantization.said
    layers = [m for m in done.model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]
    if not asked:
        if layers:
            yield "the base is quantized, and the recipe does not say so"
        return
    if not layers:
        yield "no layer of the base is quantized"
        return
    if asked.get("load_in_8bit") and not all(isinstance(layer, Linear8bitLt) for layer in layers):
        yield "the base is not in 8 bits"
    if not asked.get("load_in_4bit"):
        return
    weights: list[Any] = [layer.weight for layer in layers if isinstance(layer, Linear4bit)]
    states = [weight.quant_state for weight in weights]
    if len(states) != len(layers):
        yield "the base is not in 4 bits"
        return
    section = done.recipe.quantization
    kinds, nested = {state.quant_type for state in states}, {bool(state.nested) for state in states}
    computed = {str(layer.compute_dtype).removeprefix("torch.") for layer in layers}
    if kinds != {section["bnb_4bit_quant_type"]}:
        yield f"quantization.bnb_4bit_quant_type is {section['bnb_4bit_quant_type']}, and the weights are {kinds}"
    if nested != {bool(section["bnb_4bit_use_double_quant"])}:
        said = section["bnb_4bit_use_double_quant"]
        yield f"quantization.bnb_4bit_use_double_quant is {said}, and the weights differ"
    if (dtype := asked.get("bnb_4bit_compute_dtype")) and computed != {dtype}:
        yield f"quantization.bnb_4bit_compute_dtype is {dtype}, and layers compute in {', '.join(sorted(computed))}"
    stored = {str(layer.weight.dtype).removeprefix("torch.") for layer in layers}
    if (dtype := asked.get("bnb_4bit_quant_storage")) and stored != {dtype}:
        yield f"quantization.bnb_4bit_quant_storage is {dtype}, and weights are stored as {', '.join(sorted(stored))}"


def check_optimizer(done: Done) -> Found:
    """The optimizer is the one that the recipe names, with its options."""
    trainer = done.seen.trainer
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if (done.recipe.training["peft_optimizer"] or {}).get("name"):
        return  # PEFT's: made by PEFT
    cls, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    wanted = done.recipe.training["optim"]
    if type(optimizer) is not cls:
        yield f"training.optim is {wanted}, and the optimizer is {type(optimizer).__name__}, not {cls.__name__}"
        return
    named = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
    for key in ("betas", "eps"):
        if key in options and key in optimizer.param_groups[0]:
            found = optimizer.param_groups[0][key]
            if not _same(found, options[key]):
                said = [name for name, of in named.items() if of == key]
                yield f"training.{' and '.join(said)}: the optimizer has {key} {found}, not {options[key]}"
    decay = done.recipe.training["weight_decay"]
    decays = {group.get("weight_decay", 0) for group in optimizer.param_groups if group["params"]}
    if decay is not None and not decays <= {decay, 0.0}:
        yield f"training.weight_decay is {decay}, and the optimizer has {sorted(decays)}"
    if decay and decay not in decays:
        yield f"training.weight_decay is {decay}, and no group of parameters has it"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in done.model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        yield f"{len(missing)} trainable tensors are not the optimizer's: {_name(missing)}"


def check_schedule(done: Done) -> Found:
    """The rate of each step is what rate, schedule and warm-up give; gradients are clipped; batches counted."""
    training, config = done.small.recipe.training, done.seen.trainer.args
    rate = training["learning_rate"]
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    warmup, steps = training["warmup_steps"] or 0, training["max_steps"]
    warmup = math.ceil(steps * warmup) if warmup < 1 else int(warmup)
    options = dict(training["lr_scheduler_kwargs"] or {})
    kind = str(getattr(training["lr_scheduler_type"], "value", training["lr_scheduler_type"]))
    schedule: Any = get_scheduler(kind, dummy, warmup, steps, scheduler_specific_kwargs=options)
    ratio = (done.recipe.training["peft_optimizer"] or {}).get("name")
    for step, found in enumerate(done.seen.rates, 1):
        wanted = dummy.param_groups[0]["lr"]
        if not ratio and any(not math.isclose(of, wanted, rel_tol=1e-6, abs_tol=1e-12) for of in found):
            given = f"{rate:g} with {kind} and {warmup} steps of warm-up gives {wanted:.3g}"
            yield f"the learning rate of step {step} is {found[0]:.3g}: {given}"
            break
        dummy.step()
        if kind not in ("reduce_lr_on_plateau", "greedy"):
            schedule.step()
    if len(done.seen.rates) != steps:
        yield f"{len(done.seen.rates)} steps were taken, not {steps}"
    bound = training["max_grad_norm"]
    if bound and any(norm > bound * 1.05 for norm in done.seen.norms):
        yield f"training.max_grad_norm is {bound:g}, and a gradient was {max(done.seen.norms):.3g} long"
    rows, size = len(done.seen.trainer.train_dataset), config.per_device_train_batch_size
    expected = min(config.gradient_accumulation_steps, math.ceil(rows / size))
    if done.seen.counts and max(done.seen.counts.values()) != expected:
        most = max(done.seen.counts.values())
        yield f"a step took {most} batches, not {expected} (training.gradient_accumulation_steps)"


def check_evaluated(done: Done) -> Found:
    """Where the recipe has evaluation data, it was evaluated."""
    if done.recipe.dataset.has_eval and not any(math.isfinite(loss) for loss in done.seen.evaluated):
        yield f"no evaluation gave a finite loss: {done.seen.evaluated}"


def read_tensors(result: Path) -> dict[str, torch.Tensor]:
    """All tensors in a result's files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(result.glob("*.safetensors")):
        found |= load_file(file)
    return found


def check_saved(done: Done) -> Found:
    """The result holds what was trained, tensor by tensor, with the template and the tokens at which it stops."""
    result = done.seen.folder / result_name(bool(done.recipe.peft))
    saved = read_tensors(result)
    if not saved:
        yield f"{result} holds no weights"
        return
    if not alters_base(done.recipe.peft):
        if done.recipe.peft:
            embeddings = saves_embeddings(done.model.active_peft_config)
            trained = get_peft_model_state_dict(done.model, save_embedding_layers=embeddings)
        else:
            trained = dict(done.model.named_parameters())
        lacking = sorted(set(trained) - set(saved))
        if lacking and done.recipe.peft:
            yield f"{len(lacking)} trained tensors are not saved: {_name(lacking)}"
        other = [
            n
            for n in set(trained) & set(saved)
            if not torch.equal(trained[n].detach().cpu().to(saved[n].dtype), saved[n])
        ]
        if other:
            yield f"{len(other)} saved tensors are not what was trained: {_name(other)}"
    tokenizer = AutoTokenizer.from_pretrained(result)
    used = done.seen.prepared.tokenizer
    if tokenizer.chat_template != used.chat_template:
        yield "the chat template that was trained with is not saved"
    if tokenizer.eos_token != used.eos_token:
        yield f"the saved tokenizer ends with {tokenizer.eos_token}, and {used.eos_token} was trained with"
    ends: Any = GenerationConfig.from_pretrained(result).eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    stops: list[Any] = [tokenizer.convert_tokens_to_ids(token) for token in done.small.stand_in.stops]
    if not set(stops) & set(ends):
        yield "the saved generation_config.json does not stop where the model stops"


def check_loaded(done: Done) -> Found:
    """The result, loaded from its folder, gives the logits of the trained model."""
    result = done.seen.folder / result_name(bool(done.recipe.peft))
    options: dict[str, Any] = {"dtype": getattr(torch, done.seen.prepared.precision.dtype)}
    if done.recipe.quantization:
        options["quantization_config"] = done.model.config.quantization_config
    loaded, _ = load_result(result, None, **options)
    ids = done.seen.batches[0].inputs["input_ids"][:1, :32] if done.seen.batches else torch.arange(16).unsqueeze(0)
    model, training = done.model, done.model.training
    model.eval()
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.float().cpu()
        found = loaded.to(ids.device)(input_ids=ids, use_cache=False).logits.float().cpu()
    model.train(training)
    apart = float((wanted - found).abs().max()) / max(float(wanted.abs().max()), 1e-6)
    if apart > done.close:
        yield f"loaded again, its logits differ by {apart:.1%} of the largest"


def check_resumed(done: Done) -> Found:
    """A run that goes on from a checkpoint takes the same last step, and ends with the same weights."""
    if done.again is None:
        yield "the run was not resumed"
        return
    last = max(done.seen.losses)
    before, after = done.seen.losses[last], done.again.losses.get(last)
    if after is None or len(done.again.rates) != 1:
        yield f"the resumed run took {len(done.again.rates)} steps, not one"
        return
    if abs(before - after) > done.close * max(abs(before), 1e-3):
        yield f"the loss of step {last} is {after:.5f} when it is resumed, and {before:.5f} when it is not"
    if done.again.rates[-1] != done.seen.rates[-1]:
        rates = done.again.rates[-1][0], done.seen.rates[-1][0]
        yield f"the learning rate of step {last} is {rates[0]:.3g} when resumed, not {rates[1]:.3g}"
    saved = read_tensors(done.again.folder / result_name(bool(done.recipe.peft)))
    apart = [name for name, tensor in done.first.items() if not _near(saved.get(name), tensor, done.close)]
    if set(saved) != set(done.first) or apart:
        yield f"{len(apart)} tensors differ when the run is resumed: {_name(apart)}"


def _near(found: torch.Tensor | None, wanted: torch.Tensor, allowed: float) -> bool:
    if found is None or found.shape != wanted.shape:
        return False
    distance = (found.float() - wanted.float()).norm()
    return bool(distance <= allowed * max(float(wanted.float().norm()), 1e-6))


def _name(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")


CHECKS: dict[str, Callable[[Done], Found]] = {
    "size": check_size,
    "targets": check_targets,
    "base": check_base,
    "trained": check_trained,
    "options": check_options,
    "rows": check_rows,
    "mask": check_mask,
    "loss": check_loss,
    "gradients": check_gradients,
    "moved": check_moved,
    "frozen": check_frozen,
    "optimizer": check_optimizer,
    "schedule": check_schedule,
    "evaluated": check_evaluated,
    "saved": check_saved,
    "loaded": check_loaded,
    "resumed": check_resumed,
}
