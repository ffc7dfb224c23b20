"""`recipe-run merge`: an adapter folded into its base, by PEFT's own merge, and compared with the two apart.

Everything is computed in float32 and rounded once, to the dtype that is saved. One model is in memory at a time.
"""

import ctypes
import gc
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from recipe_runner.data.pictures import processor_of
from recipe_runner.files import refuse_existing, write_json, write_text
from recipe_runner.methods import METHODS
from recipe_runner.model.bottleneck import NO_MERGE
from recipe_runner.model.load import can_switch_off, load_result
from recipe_runner.problems.errors import UserError, first_line, user_error
from recipe_runner.results.target import Target, check_tokenizer, explaining, find_changed_base
from recipe_runner.runs.golden import FILE as GOLDEN
from recipe_runner.runs.golden import read_golden

NAME = "merged"  # the folder in the run's, where nobody says another
SHARE = 0.5  # of what was learned: a layer that keeps less is not what was trained
POSITIONS = 8  # at the end of each golden row, whose logits are compared
CLOSE = 1e-4  # what logits may differ by in float32, times the largest of them where that is above 1
MEMORY = "merging takes about three times the base's bytes in bfloat16"
PLAIN = "The weather was fine, and so they went on"  # for results without golden rows


@dataclass(frozen=True)
class Merge:
    """A merge that was made.

    Attributes:
        folder: Of the merged model.
        dtype: Of its weights.
        shares: Layer -> the share of what was learned that its weights keep.
        difference: The largest difference between logits of the merged model and of base and adapter.
        moved: The largest difference between logits of the base and of base and adapter.
        agreeing: The share of positions at which both have the same first choice.
        unquantized: Whether the base was quantized in training, and is not here.
        scores: Whether it is a reward model, whose one logit is its score.
    """

    folder: Path
    dtype: str
    shares: dict[str, float]
    difference: float
    moved: float
    agreeing: float
    unquantized: bool
    scores: bool = False


def merge(target: Target, output: Path | None, dtype: str | None, allow_loss: bool, quantize: str | None) -> Merge:
    """Merges the adapter of a run into its base, in a folder that gets its name when everything is compared.

    Args:
        target: A result.
        output: A new folder; `merged` in the run's folder where None.
        dtype: Of the merged weights; that of the base where None.
        allow_loss: Keep a merge that has lost more than the bound.
        quantize: `nf4` or `int8`: the merged weights are quantized before they are saved.

    Raises:
        UserError: The result can't be merged, the merge is not what was trained, or the folder can't be written.
    """
    disable_progress_bar()
    config = check_mergeable(target)
    folder = output or (target.run or Path(target.result)) / NAME
    refuse_existing(folder, "choose another --output")
    if problem := find_changed_base(target):
        raise user_error(problem.code, problem.message, problem.suggestion)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    _return_memory()
    try:
        with explaining(MEMORY, "merge again: the run is as it was", partial):  # inside: what is free is told as it was
            made = _merge_into(partial, target, config, dtype, allow_loss, quantize)
        partial.chmod(0o755)  # mkdtemp's is the person's alone
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return replace(made, folder=folder)


def check_mergeable(target: Target) -> PeftConfig:
    """The adapter's configuration.

    Raises:
        UserError: The result is no adapter, or one that no weights of the base can hold.
    """
    if not target.is_adapter:
        fix = "it can be served as it is" if target.is_trained else "run the recipe first"
        raise user_error("no-adapter", f"{target.result} is no adapter: there is nothing to merge", fix)
    config = target.peft_config
    name = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    method = METHODS.get(name)
    if method and not method.merges:
        why = f"{method.trains}, and PEFT has no merge for it"
        if method.is_prompt:
            why = f"it trains {method.trains}: no weights of the base could hold them"
        why = NO_MERGE if name == "bottleneck" else why
        raise user_error("not-mergeable", f"{name} can't be merged: {why}", "serve the base with the adapter beside it")
    return config


def _return_memory() -> None:
    """Has the C library give the memory of each tensor back when it is freed; glibc would keep most of it.

    Measured on SmolLM2-135M: at most 2.9 times the weights' bytes, without it 6.1 times.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is larger than a MiB is mapped by itself


def _merge_into(
    folder: Path, target: Target, config: PeftConfig, dtype: str | None, allow_loss: bool, quantize: str | None
) -> Merge:
    """Merges into a folder, and compares what is in it with base and adapter apart."""
    section = target.recipe.model if target.recipe else None
    model, tokenizer = load_result(target.result, section, plain_base=True, dtype="float32")
    check_tokenizer(target, tokenizer)
    base_config: Any = AutoConfig.from_pretrained(target.base, revision=config.revision)
    saved = getattr(torch, dtype) if dtype else _dtype_of(base_config)
    rows = _read_rows(target, tokenizer)
    wanted = _find_logits(model, rows)
    plain: list[torch.Tensor] = []
    if can_switch_off(config):
        with model.disable_adapter():
            plain = _find_logits(model, rows)
    largest = max(1.0, *(float(logits.abs().max()) for logits in wanted))
    shares = dict(_merge_layers(model, saved))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of many lines: what it warns of is compared here
        generation, merged = getattr(model, "generation_config", None), model.merge_and_unload()
    if not (found := _largest_difference(_find_logits(merged, rows), wanted)) <= CLOSE * largest:
        raise _computes_otherwise(found, CLOSE * largest, base_config, shares)
    lost = {name: share for name, share in shares.items() if not share >= SHARE}  # nan, too
    if lost and not allow_loss:
        raise _too_much_lost(lost, len(shares), saved)
    merged.to(saved)
    merged.config.dtype = saved
    if generation is not None:  # a reward model has none
        merged.generation_config = generation
    merged.save_pretrained(str(folder))
    (processor_of(tokenizer) or tokenizer).save_pretrained(str(folder))
    del model, merged
    gc.collect()
    again, _ = load_result(folder, dtype="float32")
    after = _find_logits(again, rows)
    difference, moved = (_largest_difference(logits, wanted) for logits in (after, plain))
    allowed = CLOSE * largest if saved == torch.float32 else max((1 - SHARE) * moved, CLOSE * largest)
    if not difference <= allowed and not allow_loss:
        raise _computes_otherwise(difference, allowed, base_config, {})
    name = str(saved).removeprefix("torch.")
    if quantize:
        del again
        gc.collect()
        _quantize(folder, quantize, name)
        again, _ = load_result(folder, dtype=name)
        after = _find_logits(again, rows)
        difference, name = _largest_difference(after, wanted), quantize
    del again
    gc.collect()
    same = [one.argmax(-1) == two.argmax(-1) for one, two in zip(after, wanted, strict=True)]
    agreeing = float(torch.cat(same).float().mean())
    unquantized = bool(target.recipe and target.recipe.quantization)
    made = Merge(folder, name, shares, difference, moved, agreeing, unquantized, target.scores)
    _write_record(folder, target, made)
    return made


def _computes_otherwise(found: float, allowed: float, config: Any, shares: Mapping[str, float]) -> UserError:
    message = (
        f"logits of the merged model differ by {found:.3g} from those of base and adapter (allowed: {allowed:.3g})"
    )
    tied = getattr(config, "tie_word_embeddings", False) and any(re.search(r"embed|head", name) for name in shares)
    message += "; the base's embeddings are tied, and the adapter changes one of the two" * bool(tied)
    return user_error("merge-differs", message, "serve the base with the adapter beside it")


def _dtype_of(config: Any) -> torch.dtype:
    """The dtype in which a base was published."""
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _read_rows(target: Target, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of the golden rows with their answers; of a plain sentence where there are none."""
    rows = [[*row.prompt_ids, *(row.answer_ids or [])] for row in read_golden(target.run)] if target.run else []
    if any(token >= len(tokenizer) for row in rows for token in row):
        message = f"{target.run}/{GOLDEN} is damaged: it holds tokens that the tokenizer does not have"
        raise user_error("golden-damaged", message, "restore it, or train again")
    return rows or [list(tokenizer(PLAIN)["input_ids"])]


def _largest_difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference between logits; 0 where there are none to compare."""
    if not found:
        return 0.0
    return max(float((one - two).abs().max()) for one, two in zip(found, wanted, strict=True))


def _find_logits(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits `(positions, vocabulary)` at the end of each row; of a reward model, its score `(1, 1)`."""
    found = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits
        found.append(logits.reshape(-1, logits.shape[-1])[-POSITIONS:].float().clone())
    return found


def _merge_layers(model: Any, saved: torch.dtype) -> Iterator[tuple[str, float]]:
    """Merges layer by layer, and says what share of each layer's change is left in the dtype that is saved.

    The share is <rounded - base, merged - base> / |merged - base|^2 over all weights of a layer: how far rounding went
    in the direction that was learned. bfloat16 has 8 bits: it drops a change below half of a weight's last one.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "merge"):
            base = module.get_base_layer()
            before = {key: tensor.detach().clone() for key, tensor in base.named_parameters(recurse=False)}
            try:
                module.merge(safe_merge=True)
            except (ValueError, NotImplementedError, RuntimeError) as error:
                raise user_error("not-mergeable", f"{_short(name)}: {first_line(error)}") from error
            after = dict(module.get_base_layer().named_parameters(recurse=False))
            # PEFT 0.21's OSF would merge a second time when it is taken out.
            module.merge = lambda *_, **__: None  # type: ignore[method-assign]
        elif isinstance(module, AuxiliaryTrainingWrapper) and hasattr(module, "modules_to_save"):
            before = dict(module.original_module.named_parameters())
            after = dict(module.modules_to_save[module.active_adapters[0]].named_parameters())
        else:
            continue
        if (share := _kept(before, after, saved)) is not None:
            yield _short(name), share


def _kept(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], saved: torch.dtype) -> float | None:
    """The share of a change that is left; None where nothing was changed."""
    left = changed = 0.0
    for key, tensor in after.items():
        if key in before and before[key].shape == tensor.shape:
            delta = (tensor.detach() - before[key]).double()
            applied = (tensor.detach().to(saved).to(tensor.dtype) - before[key]).double()
            left += float((applied * delta).sum())
            changed += float(delta.square().sum())
    return left / changed if changed else None


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _too_much_lost(lost: dict[str, float], layers: int, saved: torch.dtype) -> UserError:
    worst = sorted(lost, key=lambda name: lost[name])
    shown = ", ".join(f"{name} ({max(lost[name], 0):.0%})" for name in worst[:3]) + ", ..." * (len(worst) > 3)
    message = (
        f"{len(lost)} of {layers} layers keep less than {SHARE:.0%} of what they learned in"
        f" {str(saved).removeprefix('torch.')}: {shown}"
    )
    fix = "--dtype float32 keeps all of it, and so does serving the adapter beside the base; --allow-loss merges anyway"
    return user_error("merge-loses", message, fix)


def _write_record(folder: Path, target: Target, made: Merge) -> None:
    """Writes what was compared, and the golden rows, beside the weights."""
    record = {
        "dtype": made.dtype,
        "largest_logit_difference": made.difference,
        "adapter_moves_logits_by": made.moved,
        "same_first_choice": made.agreeing,
        "kept_of_what_was_learned": {name: round(share, 4) for name, share in made.shares.items()},
    }
    write_json(folder / "merge.json", record)
    if target.run and (target.run / GOLDEN).is_file():
        write_text(folder / GOLDEN, (target.run / GOLDEN).read_text(encoding="utf-8"))


def _quantize(folder: Path, kind: str, dtype: str) -> None:
    """Quantizes a merged model in its folder, by bitsandbytes, as transformers saves it."""
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["bnb_4bit_compute_dtype"] = dtype
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, quantization_config=BitsAndBytesConfig(**options)
    )
    small = folder.with_name(f"{folder.name}.small")
    try:
        model.save_pretrained(str(small))
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        for file in small.iterdir():
            shutil.move(str(file), str(folder / file.name))
    finally:
        shutil.rmtree(small, ignore_errors=True)


def describe_merge(made: Merge) -> dict[str, str]:
    """A merge, one fact a line."""
    shares = sorted(made.shares.values())
    return {
        "merged": f"{made.folder} ({made.dtype})",
        "base": "was quantized in training, and is not here" * made.unquantized,
        "kept": f"{shares[0]:.1%} of what was learned in the layer that lost most, {shares[len(shares) // 2]:.1%} in"
        f" the middle one of {len(shares)}"
        if shares
        else "",
        "scores" if made.scores else "logits": f"differ by {made.difference:.2g} at most from base and adapter"
        + f", which moved them by {made.moved:.3g}" * bool(made.moved)
        + f"; same first choice at {made.agreeing:.1%} of positions" * (not made.scores),
    }
