"""Checks of the weights: what is adapted, what is trained, what training began with, and what moved."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig

from recipe_runner.model.adapter import find_seeing
from recipe_runner.recipe.rules.adapter import alters_base
from recipe_runner.runs.folder import result_name
from recipe_runner.smoke.checks.done import (
    Done,
    Found,
    adapted_modules,
    count_experts,
    is_near,
    is_of_base,
    list_names,
    read_tensors,
)
from recipe_runner.smoke.watch import hash_frozen

# Of a configuration, what says how it is run, and not what the model is.
NOT_THE_MODELS = (
    *("use_cache", "dtype", "torch_dtype", "_name_or_path", "name_or_path", "transformers_version", "architectures"),
    *("pad_token_id", "eos_token_id", "bos_token_id", "quantization_config", "output_router_logits"),
    "pretraining_tp",  # PEFT 0.21 sets it to 1
)
# Methods of which every tensor is trained.
WHOLE = ("lora", "adalora", "bottleneck", "ia3", "prompt_tuning", "prefix_tuning", "p_tuning")


def check_size(done: Done) -> Found:
    """The model that the facts describe has as many parameters as were published."""
    facts, fix = done.small.stand_in.facts, "correct config or parameters in recipes/models.json"
    if facts and abs(done.full.parameters / facts.parameters - 1) > 0.01:
        found = f"{facts.name} has {done.full.parameters:,} parameters by its facts, {facts.published} were published"
        yield f"{found}: {fix}"


def check_targets(done: Done) -> Found:
    """The adapter sits on the modules that it sits on at the real size, and there on every layer that has them."""
    if not done.recipe.peft:
        return
    adapted = adapted_modules(done.model)
    here = {_generalize(name) for name in adapted}
    real = {_generalize(name) for name in done.full.adapted}
    if here != real:
        names = list_names(here - real) or "fewer modules", list_names(real - here) or "fewer"
        yield f"the adapter is on {names[0]} here, and on {names[1]} at full size"
    if any(done.recipe.peft[key] for key in ("layer_replication", "exclude_modules")):
        return  # the recipe says which layers
    if done.recipe.peft["layers_to_transform"] is not None:
        return
    for kind in sorted(real):
        there = [name for name in done.full.modules if _generalize(name) == kind]
        whole = {name.rpartition(".")[0] for name in done.full.trained}  # unfreeze trains them, without an adapter
        missing = set(there) - set(done.full.adapted) - whole
        if missing:
            yield f"{len(missing)} of {len(there)} modules {kind} have no adapter at full size, {min(missing)} for one"
    yield from _check_named(done, adapted)


def _check_named(done: Done, adapted: set[str]) -> Found:
    """What the recipe names is what is adapted, name by name."""
    peft = done.recipe.peft
    named = peft["target_modules"]
    if isinstance(named, list) and named:
        for name in named:
            if not any(_ends_with(of, name) for of in adapted):
                yield f"peft.target_modules names {name}, and no such module has an adapter"
        other = [of for of in adapted if not any(_ends_with(of, name) for name in named)]
        if other:
            yield f"{len(other)} modules have an adapter that peft.target_modules does not name: {list_names(other)}"
    out = done.model.get_output_embeddings()
    spared = peft["exclude_modules"] or peft["layers_to_transform"] is not None or done.recipe.unfreeze
    if peft["method"] == "bottleneck" and not named and not spared:
        yield from _check_placement(done, adapted)
    if named == "all-linear" and not spared:
        inside = "base_model.model."
        plain = [
            name.removeprefix(inside)
            for name, module in done.model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not out and is_of_base(name)
            if "modules_to_save" not in name and "original_module" not in name
        ]
        seeing = [f"{name.removeprefix(inside)}." for name in find_seeing(done.model)]  # an adapter stays out of it
        plain = [name for name in plain if not name.startswith(tuple(seeing))]
        left = [name for name in plain if not name.endswith("base_layer")]
        if left:
            told = f"{len(left)} linear layers have no adapter: {list_names(left)}"
            yield f"peft.target_modules is all-linear, and {told}"
    for name in peft["modules_to_save"] or ():
        if not any(f"{name}." in of and "modules_to_save" in of for of in done.seen.trainable):
            yield f"peft.modules_to_save names {name}, and it is not trained"


def _check_placement(done: Done, adapted: set[str]) -> Found:
    """Bottleneck adapters stand where `placement` says: in each layer after attention, after the network, or both."""
    placement = done.recipe.peft["placement"]
    layers = {number for name in adapted if (number := _layer(name)) is not None}
    for number in range(done.model.config.get_text_config().num_hidden_layers):
        inside = [name for name in adapted if _layer(name) == number]
        found = sorted("attention" if "attn" in name or "attention" in name else "feed_forward" for name in inside)
        if found != (["attention", "feed_forward"] if placement == "both" else [placement]):
            told = " and ".join(found) or "nothing"
            yield f"peft.placement is {placement}, and layer {number} of {len(layers)} has adapters after {told}"
            return


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _generalize(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def check_base(done: Done) -> Found:
    """Training began with the weights of the model: those that are not quantized are compared with its files.

    A later stage of a pipeline began with the adapter, or the model, of the stage before.
    """
    if alters_base(done.recipe.peft) or done.recipe.model.adds_tokens:
        return
    folder = done.small.stand_in.folder
    if done.before and done.recipe.peft:
        yield from _check_handed_over(done, done.before)
    elif done.before:
        folder = done.before
    files = read_tensors(folder)
    if done.recipe.dataset.images:  # files have other names than memory
        base: Any = done.model.get_base_model() if isinstance(done.model, PeftModel) else done.model
        files = dict(type(base).from_pretrained(folder).state_dict())
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
    yield from _check_config(done, done.small.stand_in.folder if done.recipe.peft else folder)
    begins = done.recipe.peft["method"] == "prompt_tuning" and done.recipe.peft["prompt_tuning_init"] == "TEXT"
    if begins and not done.before:
        yield from _check_prompt(done)


def _check_config(done: Done, folder: Path) -> Found:
    """The model's configuration is that of its folder, in training and, where it is saved, in the result."""
    kept = AutoConfig.from_pretrained(folder, **{"num_labels": 1} if done.recipe.stage.scores else {}).to_dict()
    other_layers = ("num_hidden_layers", "layer_types") if done.recipe.peft["layer_replication"] else ()
    configs = {"the model's configuration": done.model.config.to_dict()}
    if not done.recipe.peft:
        configs["the saved config.json"] = AutoConfig.from_pretrained(done.seen.folder / result_name(False)).to_dict()
    for what, now in configs.items():
        keys = (kept.keys() | now.keys()) - {*NOT_THE_MODELS, *other_layers}
        if other := sorted(key for key in keys if _plain(now.get(key)) != _plain(kept.get(key))):
            yield f"{what} has another {list_names(other)}: {now.get(other[0])!r}, not {kept.get(other[0])!r}"


def _plain(value: Any) -> Any:
    """A part of a configuration without what is not the model's."""
    return {key: of for key, of in value.items() if key not in NOT_THE_MODELS} if isinstance(value, dict) else value


def _check_prompt(done: Done) -> Found:
    """A prompt that begins with a text begins with the embeddings of its tokens."""
    tokenizer, text = done.seen.prepared.tokenizer, done.recipe.peft["prompt_tuning_init_text"]
    rows = done.model.get_input_embeddings().weight.detach()[tokenizer(text)["input_ids"]].float()
    for name, begun in done.seen.trainable.items():
        apart = torch.cdist(begun.float(), rows).min(dim=1).values
        if bool((apart > 1e-3).any()):
            yield f"{name} did not begin with the words of peft.prompt_tuning_init_text"


def _check_ranks(done: Done) -> Found:
    """AdaLoRA has taken ranks away: singular values that it drops are zero."""
    peft = done.recipe.peft
    values = [p for name, p in done.model.named_parameters() if "lora_E" in name]
    if peft["init_r"] > peft["target_r"] and not any(bool((p == 0).any()) for p in values):
        yield f"no rank was taken away, from init_r {peft['init_r']} to target_r {peft['target_r']}"


def _check_handed_over(done: Done, adapter: Path) -> Found:
    """The adapter of a stage began as that of the stage before ended."""
    begun = get_peft_model_state_dict(done.model, {**done.model.state_dict(), **done.seen.trainable})
    saved = read_tensors(adapter)
    apart = [name for name, value in saved.items() if not is_near(begun.get(name), value, 1e-6)]
    if apart or not saved:
        yield f"the adapter did not begin as that of the stage before ended: {list_names(apart) or 'it is empty'}"


def check_frozen(done: Done) -> Found:
    """No tensor changes that is not trained."""
    now = hash_frozen(done.model)
    changed = [name for name, digest in done.seen.frozen.items() if now.get(name, digest) != digest]
    if changed:
        yield f"{len(changed)} tensors changed that are not trained: {list_names(changed)}"
    if not done.seen.frozen and done.recipe.peft:
        yield "nothing is frozen beside the adapter"


def check_trained(done: Done) -> Found:
    """What the recipe says is trained is what is trained: an adapter, parts of the base, or all of it."""
    names = set(done.seen.trainable)
    own = {name for name in names if is_of_base(name)}
    if not done.recipe.peft and not done.recipe.unfreeze and done.seen.frozen:
        yield f"{len(done.seen.frozen)} tensors are frozen in full fine-tuning: {list_names(done.seen.frozen)}"
    if done.recipe.unfreeze and not done.recipe.peft:
        here, real = {_generalize(name) for name in own}, {_generalize(name) for name in done.full.trained}
        if here != real:
            yield f"of the base {list_names(here ^ real)} is trained at one size, and not at the other"
    if done.recipe.peft and not done.recipe.unfreeze and own and done.recipe.peft["method"] not in ("ln_tuning", "osf"):
        extra = [name for name in own if "modules_to_save" not in name and "bias" not in name]
        if extra and done.recipe.peft["bias"] in (None, "none"):
            yield f"the base is trained beside the adapter: {list_names(extra)}"
    if not names:
        yield "nothing is trained"
    method = done.recipe.peft["method"] if done.recipe.peft else ""
    other = (done.recipe.training["peft_optimizer"] or {}).get("name") == "lorafa"  # which freezes a half
    if method in WHOLE and not other:
        still = [n for n in done.seen.frozen if not is_of_base(n) and ".ref" not in n and "ranknum" not in n]
        if still:
            yield f"{len(still)} tensors of the adapter are not trained: {list_names(still)}"
    yield from _check_unfrozen(done)


def _check_unfrozen(done: Done) -> Found:
    """The layers and norms that `unfreeze` names are trained, all of each, and no other layers."""
    asked = done.recipe.unfreeze or ()
    sliced = [found[1] for pattern in asked if (found := re.fullmatch(r"layers\[(.+)\]", pattern))]
    if not sliced and "norms" not in asked:
        return
    count = done.model.config.get_text_config().num_hidden_layers
    wanted = {number for text in sliced for number in _slice(text, count)}
    names = {name for name in done.seen.trainable if not done.recipe.peft or "modules_to_save" in name}
    frozen = {name for name in done.seen.frozen if "original_module" not in name and is_of_base(name)}
    for name in frozen:
        if _layer(name) in wanted or ("norms" in asked and "norm" in name.rpartition(".")[0]):
            yield f"unfreeze names what {name} is in, and it is not trained"
            return
    if set(asked) <= {*(f"layers[{text}]" for text in sliced), "norms", "embeddings", "lm_head"}:
        other = [name for name in names if "norm" not in name and _layer(name) not in {*wanted, None}]
        if other:
            yield f"{len(other)} tensors are trained that unfreeze does not name: {list_names(other)}"


def _slice(text: str, count: int) -> list[int]:
    """Numbers of layers, as Python counts them."""
    first, colon, last = text.partition(":")
    everything = list(range(count))
    if not colon:
        return [everything[int(first)]]
    return everything[int(first) if first else None : int(last) if last else None]


def _layer(name: str) -> int | None:
    found = re.search(r"(?:layers|blocks|h)\.(\d+)\.", name)
    return int(found[1]) if found else None


def list_excused(done: Done) -> dict[str, str]:
    """Trainable tensors that may have no gradient in a few steps -> why."""
    excused = {}
    experts = count_experts(done.model)
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
    """Every trainable tensor gets a gradient other than zero within the steps, of the rows of the step alone."""
    if done.seen.left:
        yield f"step {done.seen.left[0]} began with a gradient that was there already"
    excused = list_excused(done)
    still = [name for name in done.seen.trainable if name not in done.seen.moved and name not in excused]
    if still:
        yield f"{len(still)} of {len(done.seen.trainable)} trainable tensors got no gradient: {list_names(still)}"


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
    if done.recipe.peft and done.recipe.peft["method"] == "adalora":
        yield from _check_ranks(done)
    if len(still) > len(done.seen.moved) // 2:  # in bfloat16 a small step may be lost
        yield f"{len(still)} trainable tensors with a gradient did not change: {list_names(still)}"
