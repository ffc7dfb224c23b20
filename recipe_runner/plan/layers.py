"""Layers of a kind do the same: a step is run with three of each kind, and repeated for all others."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from recipe_runner.plan.build import Built
from recipe_runner.plan.step import BACKWARD
from recipe_runner.plan.trace import Mark, Memory

FEW = 6  # layers: so many are all run
INSIDE = ("is_sliding", "sliding_window", "attention_type", "use_rope")  # by which layers of the same modules differ
TOGETHER = ("ADALORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")  # look at all layers at once


@dataclass(frozen=True)
class Repeated:
    """Layers of which a part is run.

    Attributes:
        base: The model that they are in.
        layers: All of them.
        run: The numbers of those that are run: the first, three of each kind, and the last.
        stands: Of each layer, the place in `run` of the one that stands for it: itself, where it is run.
    """

    base: Any
    layers: torch.nn.ModuleList
    run: Sequence[int]
    stands: Sequence[int]

    @cached_property
    def copies(self) -> Mapping[int, int]:
        """Place in `run` -> how many layers that are not run do what this one does; the next one does the same."""
        return {place: count - 1 for place, count in Counter(self.stands).items() if count > 1}


def find_layers(base: Any) -> torch.nn.ModuleList | None:
    """The layers of the language model; None where they are no list."""
    number = base.config.get_text_config().num_hidden_layers
    lists = [m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == number]
    return lists[0] if lists else None


def find_repeated(built: Built) -> Repeated | None:
    """The layers of a model by their kinds; None where all have to be run.

    Of a kind are layers with the same modules, weights and data types, of which the same is trained.
    """
    layers = find_layers(built.base)
    peft = getattr(built.model, "active_peft_config", None)
    if layers is None or (peft and getattr(peft.peft_type, "value", None) in TOGETHER):
        return None
    types = getattr(built.base.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    kinds: dict[str, list[int]] = {}
    trained = False  # anything before: then gradients go through
    for number, layer in enumerate(layers):
        if 0 < number < len(layers) - 1:
            kinds.setdefault(f"{types[number]} {trained} {_describe(layer)}", []).append(number)
        trained = trained or any(parameter.requires_grad for parameter in layer.parameters())
    run = [0, *(number for numbers in kinds.values() for number in numbers[:3]), len(layers) - 1]
    stands = [0] * len(layers)
    for numbers in kinds.values():
        middle = run.index(numbers[min(1, len(numbers) - 1)])  # the first is the last to need what its kind shares
        for number in numbers:
            stands[number] = run.index(number) if number in run else middle
    stands[-1] = len(run) - 1
    return Repeated(built.base, layers, run, stands) if len(layers) > max(FEW, len(run)) else None


def _describe(layer: torch.nn.Module) -> list[Any]:
    parts: list[Any] = [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()]
    for name, module in layer.named_modules():
        parts.append((name, type(module), [getattr(module, key, None) for key in INSIDE]))
    return parts


@contextlib.contextmanager
def shortened(repeated: Repeated, memory: Memory) -> Iterator[None]:
    """While it lasts, the model has few of its layers, and the memory is told where each begins."""
    config, modules = repeated.base.config.get_text_config(), repeated.layers._modules
    whole = dict(modules)
    changed: dict[str, Any] = {"num_hidden_layers": len(repeated.run)}
    if types := getattr(config, "layer_types", None):
        changed["layer_types"] = [types[number] for number in repeated.run]
    before = {key: getattr(config, key) for key in changed}
    memory.copies = repeated.copies
    hooks: list[Any] = []

    def watch(place: int, layer: Any) -> None:
        def begin(module: Any, args: Any, kwargs: Any) -> None:
            if memory.phase == BACKWARD:  # activations are computed again
                return
            memory.begin_layer(place)
            given = args[0] if args else kwargs["hidden_states"]
            if place and given.requires_grad:
                given.register_hook(lambda grad: memory.begin_layer(place - 1, backward=True))

        hooks.append(layer.register_forward_pre_hook(begin, with_kwargs=True))

    def end(*args: Any) -> None:
        if memory.phase != BACKWARD:
            memory.begin_layer(None)

    few = [repeated.layers[number] for number in repeated.run]
    for place, layer in enumerate(few):
        watch(place, layer)
    hooks.append(few[-1].register_forward_hook(end))
    modules.clear()
    modules.update({str(place): layer for place, layer in enumerate(few)})
    for key, value in changed.items():
        setattr(config, key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)
        modules.clear()
        modules.update(whole)
        for hook in hooks:
            hook.remove()


def repeat(memory: Memory, repeated: Repeated) -> bool:
    """Puts what the layers would have done that were not run into the memory's events, in the order of the layers.

    Returns:
        Whether two layers of a kind did the same each time; if not, nothing is changed.
    """
    marks, events = memory.marks, memory.events
    passes = _find_passes(marks, len(repeated.run))
    if passes is None:
        return False
    made: list[Any] = []
    done = flops = operations = 0
    for places in passes:
        begins = {marks[number].layer: (marks[number], marks[number + 1]) for number in places}
        did = {place: events[begin.position : end.position] for place, (begin, end) in begins.items()}
        for place in repeated.copies:
            if place in did and did[place] != did.get(place + 1):
                return False
        made += events[done : marks[places[0]].position]
        order = range(len(repeated.layers))
        for number in reversed(order) if marks[places[0]].backward else order:
            place = repeated.stands[number]
            made += did.get(place, [])
            if place in did and number not in repeated.run:
                begin, end = begins[place]
                flops += end.flops - begin.flops
                operations += end.operations - begin.operations
        done = marks[places[-1] + 1].position
    made += events[done:]
    memory.events = [(phase, kind, size * (1 + left), left) for phase, kind, size, left in made]
    memory.flops += flops
    memory.operations += operations
    return True


def _find_passes(marks: Sequence[Mark], number: int) -> list[list[int]] | None:
    """Of each pass through the layers, the places of the marks of its layers; None where layers are left out.

    Forward from the first to the last; backward from the last but one on, whose mark is the end of the last one's.
    """
    passes: list[list[int]] = []
    open_pass = False
    for place, mark in enumerate(marks):
        if mark.layer is None:
            open_pass = False
            continue
        if not open_pass or marks[place - 1].backward != mark.backward:
            passes.append([])
        passes[-1].append(place)
        open_pass = True
    up, down = list(range(number)), list(range(number - 2, -1, -1))
    for places in passes:
        layers = [marks[place].layer for place in places]
        if layers != (down[: len(layers)] if marks[places[0]].backward else up):
            return None
        if places[-1] + 1 == len(marks):
            return None
    return passes or None
