"""Training stages and data formats, one record each. Everything that lists them reads these; nothing is imported here.

A new stage is a record here, an entry in `schema/recipe.schema.json` and, if its rows are new, a module in
`data/shapes/`.
"""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PIPELINE = "pipeline"  # the stage of a recipe that runs other recipes
PRETRAIN, SFT, DPO, KTO, REWARD = "pretrain", "sft", "dpo", "kto", "reward"  # what other tools train, too


@dataclass(frozen=True)
class Rates:
    """Learning rates of one way to train.

    Attributes:
        low: Below this, `validate` warns.
        usual: What a new recipe begins with.
        high: Above this, `validate` warns.
        source: Where the numbers come from.
    """

    low: float
    usual: float
    high: float
    source: str


@dataclass(frozen=True)
class Stage:
    """A training stage.

    Attributes:
        name: As recipes write it.
        trainer: Class that trains, as `module:name`.
        config: Class of its configuration, whose fields are the keys of `training`, as `module:name`.
        shape: What a prepared row is: the name of a module in `data/shapes/`.
        task: PEFT's task type of the adapter.
        adapter_rates: Learning rates of adapters.
        full_rates: Learning rates of full fine-tuning.
        measures: What the trainer logs of held-out data -> its name for people.
        logged: All that it logs of held-out data beside the loss. Source: TRL 1.16, `_metrics` of its trainers.
        reference: Whether the trained model is compared with a reference model.
        first_loss: Loss type -> its loss while the trained model is still its reference. The first is the usual one.
        shown: What is logged while it trains -> its column in the output, beside the loss.
        packs: Whether packed rows are what is meant: its text has no documents that should stay apart.
        scores: Whether the model gives a number for each sequence, by a head of one output, and no text.
        generates: Whether rows are prompts, and what is trained on are the model's own answers to them.
        rewarded: Whether those answers are judged by `rewards`.
        taught: Whether a teacher (`model.teacher`) says what they should have been.
        scored: What TRL 1.16's loss computes of every label beside its log-probability (`add_fused_lm_head`).
        notes: Lines that a new recipe of this stage gets in `training`.
        sees: Whether TRL 1.16's trainer takes rows with images.
        sequences: That the model is given of a row: two of a pair.
    """

    name: str
    trainer: str
    config: str
    shape: str
    task: str
    adapter_rates: Rates
    full_rates: Rates
    measures: Mapping[str, str]
    logged: tuple[str, ...]
    reference: bool = False
    first_loss: Mapping[str, float] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)
    packs: bool = False
    scores: bool = False
    generates: bool = False
    rewarded: bool = False
    taught: bool = False
    scored: tuple[str, ...] = ("entropy",)
    notes: Mapping[str, str] = field(default_factory=dict)
    sees: bool = False
    sequences: int = 1

    @property
    def seeing(self) -> "Stage":
        """The stage of rows with images, which have a shape of their own."""
        return replace(self, shape=f"image_{self.shape}") if self.sees else self


# The ranges are wider than the sources' by a factor of ten or more.
_ADAPTER = Rates(2e-6, 2e-4, 6e-3, "QLoRA, arXiv 2305.14314, takes 1e-4 to 2e-4")
_FULL = Rates(2e-7, 2e-5, 1e-3, "TRL 1.16's default is 2e-5")
_DPO_ADAPTER = Rates(1e-7, 5e-6, 3e-4, "TRL 1.16's default for DPO is 1e-6")
_DPO_FULL = replace(_DPO_ADAPTER, low=1e-8, usual=5e-7, high=5e-5)
_KTO_ADAPTER, _KTO_FULL = (
    replace(rates, source="TRL 1.16's default for KTO is 1e-6") for rates in (_DPO_ADAPTER, _DPO_FULL)
)
_REWARD_ADAPTER, _REWARD_FULL = (
    replace(rates, source="TRL 1.16's default for reward models is 1e-4") for rates in (_ADAPTER, _FULL)
)
_RL_ADAPTER, _RL_FULL = (
    replace(rates, high=high, source="TRL 1.16's default is 1e-6")
    for rates, high in ((_DPO_ADAPTER, 3e-3), (_DPO_FULL, 5e-4))
)
_LANGUAGE = {"eval_loss": "held-out loss", "eval_mean_token_accuracy": "held-out token accuracy"}
_REWARDS = {"eval_rewards/accuracies": "held-out pairs ranked right", "eval_rewards/margins": "held-out reward margin"}
_MARGIN = {"rewards/margins": "margin"}
_GROUPED = "  train_sampling_strategy: group_by_length   # pairs can't be packed: less padding\n"
_BETA = "  beta: 0.1                        # smaller: further from the reference model\n"

_LANGUAGE_LOGGED = ("mean_token_accuracy", "entropy", "num_tokens", "aux_loss")
_KTO_LOGGED: tuple[str, ...] = ("entropy", "num_tokens", "aux_loss", "kl")
_KTO_LOGGED += tuple(f"{name}/{of}" for name in ("rewards", "logps", "logits") for of in ("chosen", "rejected"))
_KTO_LOGGED += ("rewards/margins",)
_DPO_LOGGED = (*(name for name in _KTO_LOGGED if name != "kl"), "rewards/accuracies", "mean_token_accuracy")
_RL_LOGGED: tuple[str, ...] = (
    "num_tokens",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "aux_loss",
)
_RL_LOGGED += tuple(f"completions/{name}_length" for name in ("mean", "min", "max"))
_RL_LOGGED += tuple(f"completions/{name}_terminated_length" for name in ("mean", "min", "max"))
_RL_LOGGED += ("completions/clipped_ratio",)
_DISTILLATION_LOGGED = tuple(name for name in _RL_LOGGED if "reward" not in name and name != "kl")
_REWARD_LOGGED = ("num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy", "margin")

_SFT = Stage(
    "sft",
    "trl:SFTTrainer",
    "trl:SFTConfig",
    "tokens",
    "CAUSAL_LM",
    _ADAPTER,
    _FULL,
    _LANGUAGE,
    _LANGUAGE_LOGGED,
    scored=("entropy", "is_top1"),
)

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        replace(_SFT, name="pretrain", packs=True),
        replace(_SFT, sees=True),
        Stage(
            "dpo",
            "trl:DPOTrainer",
            "trl:DPOConfig",
            "pairs",
            "CAUSAL_LM",
            _DPO_ADAPTER,
            _DPO_FULL,
            {"eval_loss": "held-out loss"} | _REWARDS,
            _DPO_LOGGED,
            reference=True,
            first_loss={"sigmoid": math.log(2), "sigmoid_norm": math.log(2), "hinge": 1.0},
            shown=_MARGIN,
            scored=("entropy", "mean_logits", "is_top1"),
            notes={"first": _BETA, "batches": _GROUPED},
            sees=True,
            sequences=2,
        ),
        Stage(
            "kto",
            "trl:KTOTrainer",
            "trl:KTOConfig",
            "unpaired",
            "CAUSAL_LM",
            _KTO_ADAPTER,
            _KTO_FULL,
            {"eval_loss": "held-out loss", "eval_rewards/margins": _REWARDS["eval_rewards/margins"]},
            _KTO_LOGGED,
            reference=True,
            first_loss={"kto": 0.5},
            shown=_MARGIN,
            scored=("entropy", "mean_logits"),
            notes={"first": _BETA},
        ),
        Stage(
            "reward",
            "trl:RewardTrainer",
            "trl:RewardConfig",
            "scored_pairs",
            "SEQ_CLS",
            _REWARD_ADAPTER,
            _REWARD_FULL,
            {
                "eval_loss": "held-out loss",
                "eval_accuracy": "held-out pairs ranked right",
                "eval_margin": "held-out margin",
            },
            _REWARD_LOGGED,
            shown={"margin": "margin"},
            scores=True,
            notes={"batches": _GROUPED},
            sequences=2,
        ),
        *(
            Stage(
                name,
                f"trl:{name.upper()}Trainer",
                f"trl:{name.upper()}Config",
                "rows",
                "CAUSAL_LM",
                _RL_ADAPTER,
                _RL_FULL,
                {"eval_reward": "held-out reward"},
                _RL_LOGGED,
                reference=True,
                shown={"reward": "reward"},
                generates=True,
                rewarded=True,
            )
            for name in ("rloo", "grpo")
        ),
        Stage(
            "distillation",
            "trl:DistillationTrainer",
            "trl:DistillationConfig",
            "rows",
            "CAUSAL_LM",
            _RL_ADAPTER,
            _RL_FULL,
            {"eval_loss": "held-out divergence from the teacher"},
            _DISTILLATION_LOGGED,
            generates=True,
            taught=True,
        ),
    )
}


@dataclass(frozen=True)
class Format:
    """A layout of rows as people have them.

    Attributes:
        about: What a row is, in a few words.
        required: Roles of columns that every source must have.
        optional: Roles of columns that a source may have.
        context: Roles of columns that are used where they are there: what the model sees before the row's own turns.
        note: A line that a new recipe gets below its source.
    """

    about: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    note: str = ""

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles."""
        return (*self.required, *self.optional, *self.context)


FORMATS: dict[str, Format] = {
    "instruction": Format(
        "rows of an instruction, an optional input and an answer",
        ("instruction", "output"),
        ("input",),
        ("system", "history", "images"),
        "  train_on: completion             # the loss is on the answer only\n",
    ),
    "chat": Format(
        "rows of turns: {role, content}, or ShareGPT's {from, value}",
        ("messages",),
        context=("system", "tools", "images"),
        note="  train_on: assistant              # the loss is on every assistant turn\n",
    ),
    "text": Format("raw text; an end-of-sequence token after each document", ("text",)),
    "segments": Format(
        "texts of segments {text, label}, written by no template",
        ("segments",),
        note="  train_on: labelled               # the loss is on the segments whose label is true\n",
    ),
    "preference": Format(
        "pairs of a chosen and a rejected answer to a prompt",
        ("chosen", "rejected"),
        ("prompt",),
        ("input", "system", "history", "tools", "images"),
    ),
    "unpaired_preference": Format(
        "rows of a prompt, an answer, and whether it is a good one",
        ("completion", "label"),
        ("prompt",),
        context=("input", "system", "history", "tools"),
    ),
    "prompt": Format("prompts, which the model answers itself", ("prompt",), context=("input", "system", "history")),
}


def load_class(name: str) -> Any:
    """Imports a class that a stage names as `module:name`."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
