"""Checks of the result: evaluated, saved, loaded again, resumed."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict
from transformers import AutoTokenizer, GenerationConfig

from recipe_runner.files import read_object
from recipe_runner.model.adapter import saves_embeddings
from recipe_runner.model.load import load_result
from recipe_runner.recipe.rules.adapter import alters_base
from recipe_runner.runs.folder import result_name
from recipe_runner.smoke.checks.done import Done, Found, is_near, is_same, list_names, read_tensors

# Of a generation configuration: tokens, which are looked at one by one, and who wrote it.
NOT_OF_ANSWERS = {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "_from_model_config"}


def check_evaluated(done: Done) -> Found:
    """Where the recipe has evaluation data, it was evaluated, and the loss is what the definition gives."""
    if done.recipe.dataset.has_eval and not any(math.isfinite(loss) for loss in done.seen.evaluated):
        yield f"no evaluation gave a finite loss: {done.seen.evaluated}"
    if done.seen.dropping:
        yield "held-out rows are evaluated in training mode, with dropout"
    for found, own in zip(done.seen.evaluated, done.seen.own_evaluated, strict=False):
        if own is not None and abs(found - own) > done.close_loss * max(abs(own), 1e-3):
            yield f"the loss of an evaluation is {found:.4f}, and {own:.4f} by the definition"
            return


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
            yield f"{len(lacking)} trained tensors are not saved: {list_names(lacking)}"
        other = [
            n
            for n in set(trained) & set(saved)
            if trained[n].dtype != saved[n].dtype or not torch.equal(trained[n].detach().cpu(), saved[n])
        ]
        if other:
            yield f"{len(other)} saved tensors are not what was trained: {list_names(other)}"
    if done.recipe.peft:
        yield from _check_saved_adapter(done, result)
    tokenizer = AutoTokenizer.from_pretrained(result)
    yield from _check_saved_tokenizer(done, tokenizer)
    if (config := read_object(result / "config.json")) and config.get("use_cache") is False:
        yield "the saved config.json turns the cache off: each token of an answer would take as long as all before it"
    yield from _check_saved_generation(done, result, tokenizer)


def _check_saved_adapter(done: Done, result: Path) -> Found:
    """The adapter's configuration is the one that was trained with, and names the recipe's base."""
    config, trained_with = PeftConfig.from_pretrained(str(result)).to_dict(), done.model.active_peft_config.to_dict()
    if config["base_model_name_or_path"] != done.small.recipe.model.name_or_path:
        yield f"the saved adapter names {config['base_model_name_or_path']} as its base"
    converted = alters_base(done.recipe.peft)  # to an adapter of the plain base, of other ranks
    for key in sorted(trained_with.keys() - {"inference_mode"}) if not converted else ():
        if not is_same(config.get(key), trained_with[key]):
            yield f"the saved adapter_config.json has the {key} {config.get(key)}, trained was {trained_with[key]}"


def _check_saved_tokenizer(done: Done, tokenizer: Any) -> Found:
    """The tokenizer has the template and the tokens of training, and is else the model's own."""
    used = done.seen.prepared.tokenizer
    if tokenizer.chat_template != used.chat_template:
        yield "the chat template that was trained with is not saved"
    for key in ("eos_token", "bos_token", "pad_token"):
        kept, wanted = getattr(tokenizer, key), getattr(used, key)
        if kept != wanted:
            yield f"the saved tokenizer has the {key} {kept}, and the one in training {wanted}"
    own = AutoTokenizer.from_pretrained(done.small.stand_in.folder)
    for key in ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces"):
        if getattr(tokenizer, key) != getattr(own, key):
            yield f"the saved tokenizer has the {key} {getattr(tokenizer, key)}, and the model's {getattr(own, key)}"
    parts = [json.loads(of.backend_tokenizer.to_str()) for of in (own, tokenizer)]
    for key, value in parts[0].items():
        if key != "added_tokens" and value != parts[1].get(key):
            yield f"the saved tokenizer.json has another {key} than the model's"
    if len(tokenizer) != len(used):
        yield f"the saved tokenizer has {len(tokenizer):,} tokens, and the one in training {len(used):,}"


def _check_saved_generation(done: Done, result: Path, tokenizer: Any) -> Found:
    """The result answers by the model's own settings, and stops where the model stops; a reward model answers not."""
    if done.recipe.stage.scores:
        return
    generation: Any = GenerationConfig.from_pretrained(result)
    wanted, found = (of.to_dict() for of in (GenerationConfig.from_pretrained(done.small.stand_in.folder), generation))
    for key in sorted((wanted.keys() | found.keys()) - NOT_OF_ANSWERS):
        if found.get(key) != wanted.get(key):
            yield f"the saved generation_config.json has the {key} {found.get(key)}, and the model's {wanted.get(key)}"
    ends = generation.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    stops: list[Any] = [tokenizer.convert_tokens_to_ids(token) for token in done.small.stand_in.stops]
    if lost := sorted(str(tokenizer.convert_ids_to_tokens(token)) for token in set(stops) - set(ends)):
        yield f"the saved generation_config.json does not stop at {', '.join(lost)}, where the model stops"


def check_loaded(done: Done) -> Found:
    """The result, loaded from its folder, gives the logits of the trained model."""
    result = done.seen.folder / result_name(bool(done.recipe.peft))
    options: dict[str, Any] = {"dtype": getattr(torch, done.seen.prepared.precision.dtype)}
    if done.recipe.quantization:
        options["quantization_config"] = done.model.config.quantization_config
    loaded, _ = load_result(result, None, **options)
    seen = done.seen.batches[0].inputs if done.seen.batches else {}
    ids = seen.get("input_ids", seen.get("completion_ids", torch.arange(16).unsqueeze(0)))[:1, :32]
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
    allowed = 0.0 if done.seen.trainer.args.device.type == "cpu" else done.close  # a GPU may add in another order
    if abs(before - after) > allowed * abs(before):
        yield f"the loss of step {last} is {after:.5f} when it is resumed, and {before:.5f} when it is not"
    if done.again.rates[-1] != done.seen.rates[-1]:
        rates = done.again.rates[-1][0], done.seen.rates[-1][0]
        yield f"the learning rate of step {last} is {rates[0]:.3g} when resumed, not {rates[1]:.3g}"
    saved = read_tensors(done.again.folder / result_name(bool(done.recipe.peft)))
    apart = [name for name, tensor in done.first.items() if not is_near(saved.get(name), tensor, allowed)]
    apart += [name for name, tensor in done.first.items() if name in saved and saved[name].dtype != tensor.dtype]
    if set(saved) != set(done.first) or apart:
        yield f"{len(apart)} tensors differ when the run is resumed: {list_names(apart)}"
