"""What an optimizer keeps for each weight that is trained, and what it needs while it takes a step."""

from dataclasses import dataclass

import torch

from recipe_runner.plan.trace import GRAIN

SMALL, BLOCK = 4096, 256  # numbers: bitsandbytes 0.50, optim/optimizer.py, min_8bit_size and blocksize
PAGED_FROM = 100_000  # numbers: the same, get_state_buffer


@dataclass(frozen=True)
class Kind:
    """An optimizer.

    Attributes:
        states: Numbers that it keeps for each weight.
        bits: Of each: 0 for as many as the weight has.
        paged: Whether they may leave the GPU.
        factored: Whether they are a row and a column for each matrix.
        scratch: Copies of all trained weights that a step makes, as PyTorch's `foreach` does.
        largest: Bytes for each number of the largest weight that a step takes, where weights come one by one.
        whole: Whether embeddings keep 32 bits, as transformers has bitsandbytes do.
        known: Whether this was read in its code; else the numbers are AdamW's.
    """

    states: int
    bits: int = 0
    paged: bool = False
    factored: bool = False
    scratch: int = 0
    largest: int = 0
    whole: bool = True
    known: bool = True


_ADAM, _EIGHT, _FOUR = Kind(2), Kind(2, 8), Kind(2, 4)
# transformers' names. Sources: torch/optim/adam.py 2.13 (_multi_tensor_adam makes exp_avg_sq_sqrt for all weights at
# once), bitsandbytes/optim 0.50, transformers/optimization.py 5.23 (Adafactor: copies of the weight, its gradient and
# two updates in float32), torchao 0.13 for adamw_torch_8bit and _4bit.
KINDS: dict[str, Kind] = {
    "adamw_torch": Kind(2, scratch=1, largest=4),
    "adamw_torch_fused": _ADAM,
    "adamw_torch_8bit": Kind(2, 8, largest=16, whole=False),
    "adamw_torch_4bit": Kind(2, 4, largest=16, whole=False),
    "adamw_bnb_8bit": _EIGHT,
    "adamw_8bit": _EIGHT,
    "paged_adamw_8bit": Kind(2, 8, paged=True),
    "paged_adamw_32bit": Kind(2, 32, paged=True),
    "ademamix": Kind(3, 32),
    "ademamix_8bit": Kind(3, 8),
    "paged_ademamix_32bit": Kind(3, 32, paged=True),
    "paged_ademamix_8bit": Kind(3, 8, paged=True),
    "lion_32bit": Kind(1, 32),
    "lion_8bit": Kind(1, 8),
    "paged_lion_32bit": Kind(1, 32, paged=True),
    "paged_lion_8bit": Kind(1, 8, paged=True),
    "rmsprop": Kind(1, scratch=1, largest=4),
    "rmsprop_bnb": Kind(1, 32),
    "rmsprop_bnb_32bit": Kind(1, 32),
    "rmsprop_bnb_8bit": Kind(1, 8),
    "adagrad": Kind(1, scratch=1, largest=4),
    "sgd": Kind(0),
    "adafactor": Kind(1, 32, factored=True, largest=16),
}
UNKNOWN = Kind(2, scratch=1, largest=4, known=False)


@dataclass(frozen=True)
class Needs:
    """Bytes that an optimizer takes.

    Attributes:
        states: On the device, from the first step on.
        paged: That may leave the device.
        scratch: More, while a step is taken.
    """

    states: int
    paged: int
    scratch: int


def find_kind(name: str) -> Kind:
    """The optimizer of a name of transformers'; AdamW where it was not looked at."""
    return KINDS.get(name, UNKNOWN)


def measure(name: str, model: torch.nn.Module, gpu: bool) -> Needs:
    """What an optimizer takes for the weights of a model that are trained.

    Args:
        name: transformers' name.
        model: bitsandbytes keeps 32 bits for its embeddings (transformers/trainer.py).
        gpu: Whether the device is one: on a CPU PyTorch's optimizers take one weight after the other.
    """
    kind = find_kind(name)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    full = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    states = paged = 0
    for weight in weights:
        count = weight.numel()
        if kind.factored and weight.dim() >= 2:
            size = _round(4 * count // weight.shape[-1]) + _round(4 * count // weight.shape[-2])
        elif kind.bits in (4, 8) and count >= SMALL and not (kind.whole and id(weight) in full):
            size = kind.states * (_round(count * kind.bits // 8) + _round(4 * -(-count // BLOCK)))
        else:
            each = 4 if kind.bits else weight.element_size()
            size = kind.states * _round(count * each)
        if kind.paged and count >= PAGED_FROM:
            paged += size
        else:
            states += size
    scratch = kind.scratch * sum(_round(weight.numel() * weight.element_size()) for weight in weights) if gpu else 0
    if kind.largest and not scratch:
        scratch = max((weight.numel() for weight in weights), default=0) * kind.largest
    return Needs(states, paged, scratch)


def _round(size: int) -> int:
    return -(-size // GRAIN) * GRAIN
