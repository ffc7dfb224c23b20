"""Bottleneck adapters, which PEFT 0.21 does not have: a small network after a block of every layer.

Each is `x + up(activation(down(x)))`. Houlsby et al. 2019 (arXiv 1902.00751) put one after attention and one after the
feed-forward block of each layer; Pfeiffer et al. 2020 (arXiv 2005.00247) found the second to be enough.

Importing this module makes the method known to PEFT, so that `PeftModel.from_pretrained` loads such an adapter.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

BOTTLENECK = "BOTTLENECK"  # as PEFT's types are written
REDUCTION = 16  # Pfeiffer's: a bottleneck of a 16th of the hidden size
BLOCKS = re.compile(r"mlp$|moe|attention|feed_?forward|ffn|experts|block$", re.IGNORECASE)  # names of classes
SPREAD = 0.01  # of the weights at the beginning. Source: arXiv 1902.00751, section 3.6

_LLAMA = (r"mlp\.down_proj", r"self_attn\.o_proj")
_MIXTURE = (r"mlp", r"self_attn\.o_proj")
# Architecture -> what writes the output of the feed-forward block, and of attention.
TARGETS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"), _LLAMA
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _MIXTURE),
    "gpt2": (r"mlp\.c_proj", r"attn\.c_proj"),
    "opt": (r"layers\.\d+\.fc2", r"self_attn\.out_proj"),
    "bert": (r"layer\.\d+\.output\.dense", r"attention\.output\.dense"),
    "t5": (r"DenseReluDense\.wo", r"(SelfAttention|EncDecAttention)\.o"),
}


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of bottleneck adapters; its fields are the keys of `peft` in a recipe.

    Raises:
        ValueError: Both sizes are given.
    """

    bottleneck_size: int | None = field(
        default=None, metadata={"help": "Dimension of the bottleneck. Left out: by reduction_factor."}
    )
    reduction_factor: int | None = field(
        default=None,
        metadata={"help": "Hidden size over the size of the bottleneck, 16 unless bottleneck_size or this is given."},
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = field(
        default="relu", metadata={"help": "Activation in the bottleneck."}
    )
    placement: Literal["feed_forward", "both"] = field(
        default="feed_forward",
        metadata={
            "help": "After the feed-forward block (Pfeiffer), or after attention and feed-forward (both, Houlsby)."
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the bottleneck while training."})
    init_weights: bool = field(
        default=True, metadata={"help": "Begin with adapters that change nothing. Turned off only for tests."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of modules after which adapters are put, or a regular expression of whole names; for"
            " architectures whose blocks are not known by placement."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of modules that get no adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers that get adapters; all by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, if it is not found by itself."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved as a whole beside the adapters."}
    )

    def __post_init__(self) -> None:
        """Checks the sizes, and makes lists of names sets, as PEFT has them."""
        super().__post_init__()
        self.peft_type: Any = BOTTLENECK
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError("bottleneck_size and reduction_factor say the same: give one of them")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)

    def size_for(self, hidden: int) -> int:
        """Dimension of the bottleneck in a layer of a hidden size."""
        return self.bottleneck_size or max(hidden // (self.reduction_factor or REDUCTION), 1)


class BottleneckLayer(torch.nn.Module, BaseTunerLayer):  # type: ignore[misc]  # PEFT's own pattern
    """A module of the base with adapters on its output `(batch, sequence, hidden)`, or on the first of a tuple."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout",)

    def __init__(self, base_layer: torch.nn.Module, adapter_name: str, config: BottleneckConfig, hidden: int) -> None:
        super().__init__()
        self.base_layer, self.hidden = base_layer, hidden
        self.bottleneck_down, self.bottleneck_up = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        self.bottleneck_dropout = torch.nn.ModuleDict()
        self.activations: dict[str, Any] = {}
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, **kwargs: Any) -> None:
        """Makes the adapter of a name. At first it changes nothing: its second projection is 0."""
        size = config.size_for(self.hidden)
        down, up = torch.nn.Linear(self.hidden, size), torch.nn.Linear(size, self.hidden)
        torch.nn.init.trunc_normal_(down.weight, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD)
        torch.nn.init.zeros_(down.bias)
        torch.nn.init.zeros_(up.bias)
        if config.init_weights:
            torch.nn.init.zeros_(up.weight)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.bottleneck_dropout[adapter_name] = torch.nn.Dropout(config.dropout)
        self.activations[adapter_name] = ACT2FN[config.non_linearity]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the base's module, changed by the active adapters."""
        found = self.base_layer(*args, **kwargs)
        output, *rest = found if isinstance(found, tuple) else (found,)
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                narrow = self.activations[name](down(output.to(down.weight.dtype)))
                output = output + up(self.bottleneck_dropout[name](narrow)).to(output.dtype)
        return (output, *rest) if isinstance(found, tuple) else output

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Is refused.

        Raises:
            ValueError: Always.
        """
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Is refused, as there is nothing to unmerge."""
        self.merge()


NO_MERGE = "a bottleneck adapter has an activation inside: no change of the base's weights does the same"


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters. PEFT's `BaseTuner` does the rest: saving, loading, switching."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = TARGETS  # type: ignore[assignment]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            kind = model_config.get("model_type")
            if kind not in TARGETS:
                raise ValueError("Please specify `target_modules` in `peft_config`")
            blocks = TARGETS[kind] if peft_config.placement == "both" else TARGETS[kind][:1]
            peft_config.target_modules = rf"(.*\.)?({'|'.join(blocks)})"
        return peft_config

    def _create_and_replace(  # type: ignore[override]
        self, config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, torch.nn.Linear | Conv1D) and not BLOCKS.search(type(target).__name__):
            kinds = "linear layers, or blocks of attention or feed-forward"
            raise ValueError(f"{current_key} is a {type(target).__name__}: an adapter can be put after {kinds}")
        hidden = getattr(target, "out_features", getattr(target, "nf", None))  # of Linear, of GPT-2's Conv1D
        hidden = hidden or self.model.config.get_text_config().hidden_size
        layer = BottleneckLayer(target, adapter_name, config, hidden)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # another adapter is not trainable by itself
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)


def register_bottleneck() -> None:
    """Makes the method known to PEFT.

    PEFT 0.21's own `register_peft_method` refuses names that its closed enum `PeftType` does not have; keys of its
    mappings may be plain strings. `test_bottleneck_is_known_to_peft` tells when this changes.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[BOTTLENECK] = BottleneckConfig  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[BOTTLENECK] = BottleneckModel  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[BOTTLENECK] = BottleneckModel.prefix  # type: ignore[index]


register_bottleneck()
