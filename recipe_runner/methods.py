"""Ways of tuning a part of a model, one record each. Everything that lists them reads these; nothing is imported here.

All but `bottleneck` are PEFT's, which has none like it.

PEFT's own registry is `peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING`: each of its methods is in `METHODS` or in `REFUSED`.
"""

from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Method:
    """A method of PEFT, or of ours.

    Attributes:
        name: As recipes write it in `peft.method`: PEFT's own name, in small letters.
        config: Class of its configuration, whose fields are the keys of `peft`, as `module:name`.
        paper: Where it comes from.
        trains: What it trains, in a few words.
        quantized: Whether the base may be quantized. Source: PEFT 0.21 has layers for it (tuners/*/bnb.py), or the
            method wraps no linear layer.
        merges: Whether it can be merged into the base, which then has no extra latency.
        latency: What it costs when it is not merged.
        kind: What it is put on: `linear` layers, `prompt` (virtual tokens before the text), or `other`.
        highest_rate: The highest learning rate that is usual for it; 0 where that is LoRA's.
        tried: Whether it was tested for three steps only.
    """

    name: str
    config: str
    paper: str
    trains: str
    quantized: bool = False
    merges: bool = True
    latency: str = "none once merged"
    kind: str = "linear"
    highest_rate: float = 0
    tried: bool = False

    @property
    def is_prompt(self) -> bool:
        """Whether it trains virtual tokens before the text, and no layer of the model."""
        return self.kind == "prompt"


_prompt = partial(Method, quantized=True, merges=False, latency="the virtual tokens in every pass", kind="prompt")

_KNOWN = (
    Method(
        "lora",
        "peft:LoraConfig",
        "Hu et al. 2021, arXiv 2106.09685",
        "two low-rank matrices beside each linear layer",
        quantized=True,
    ),
    Method(
        "adalora",
        "peft:AdaLoraConfig",
        "Zhang et al. 2023, arXiv 2303.10512",
        "low-rank matrices whose ranks are moved to where they matter",
        quantized=True,
    ),
    Method(
        "ia3",
        "peft:IA3Config",
        "Liu et al. 2022, arXiv 2205.05638",
        "a vector that scales keys, values and feed-forward activations",
        quantized=True,
        highest_rate=0.05,
    ),
    _prompt(
        "prefix_tuning",
        "peft:PrefixTuningConfig",
        "Li and Liang 2021, arXiv 2101.00190",
        "keys and values of virtual tokens in every layer",
        highest_rate=1,
    ),
    _prompt(
        "prompt_tuning",
        "peft:PromptTuningConfig",
        "Lester et al. 2021, arXiv 2104.08691",
        "embeddings of virtual tokens before the text",
        highest_rate=1,
    ),
    _prompt(
        "p_tuning",
        "peft:PromptEncoderConfig",
        "Liu et al. 2021, arXiv 2103.10385",
        "a small network that makes the embeddings of virtual tokens",
        highest_rate=1,
    ),
    Method(
        "ln_tuning",
        "peft:LNTuningConfig",
        "Zhao et al. 2023, arXiv 2312.11420",
        "the weights of the norms",
        quantized=True,
        kind="other",
    ),
    Method(
        "trainable_tokens",
        "peft:TrainableTokensConfig",
        "PEFT 0.21",
        "the embeddings of chosen tokens",
        quantized=True,
        kind="other",
        highest_rate=0.05,
    ),
    Method(
        "bottleneck",
        "recipe_runner.model.bottleneck:BottleneckConfig",
        "Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247",
        "a small network after a block of every layer",
        quantized=True,
        merges=False,
        latency="two small products a layer",
        kind="other",
    ),
    Method(
        "oft", "peft:OFTConfig", "Qiu et al. 2023, arXiv 2306.07280", "rotations of each layer's weights, in blocks"
    ),
    Method(
        "boft",
        "peft:BOFTConfig",
        "Liu et al. 2023, arXiv 2311.06243",
        "rotations of each layer's weights, as a product of sparse ones",
    ),
    Method(
        "vera",
        "peft:VeraConfig",
        "Kopiczko et al. 2023, arXiv 2310.11454",
        "vectors that scale random matrices which all layers share",
        highest_rate=0.1,
    ),
    Method(
        "hira",
        "peft:HiraConfig",
        "Huang et al. 2025, openreview.net/forum?id=TwJrTz9cRS",
        "a low-rank matrix that multiplies each weight",
        quantized=True,
    ),
    Method(
        "hra", "peft:HRAConfig", "Yuan et al. 2024, arXiv 2405.17484", "a chain of reflections of each layer's weights"
    ),
    Method(
        "loha",
        "peft:LoHaConfig",
        "Hyeon-Woo et al. 2021, arXiv 2108.06098",
        "two low-rank pairs, multiplied element by element",
    ),
    Method("lokr", "peft:LoKrConfig", "Yeh et al. 2023, arXiv 2309.14859", "a Kronecker product of small matrices"),
    Method(
        "randlora",
        "peft:RandLoraConfig",
        "Albert et al. 2025, arXiv 2502.00987",
        "scales of random low-rank matrices that add up to full rank",
        quantized=True,
    ),
    Method(
        "road",
        "peft:RoadConfig",
        "Liao and Monz 2024, arXiv 2409.00119",
        "rotations of pairs of each layer's outputs",
        quantized=True,
    ),
    Method(
        "fourierft",
        "peft:FourierFTConfig",
        "Gao et al. 2024, arXiv 2405.03003",
        "some frequencies of each weight's change",
        highest_rate=0.5,
    ),
    Method(
        "shira",
        "peft:ShiraConfig",
        "Bhardwaj et al. 2024, arXiv 2406.13175",
        "1 to 2 percent of each layer's own weights",
    ),
    Method(
        "miss",
        "peft:MissConfig",
        "Kang and Yin 2024, arXiv 2409.15371",
        "one matrix whose parts are shared over each weight",
    ),
    Method(
        "delora",
        "peft:DeloraConfig",
        "Bini et al. 2025, arXiv 2503.18225",
        "low-rank matrices, angle and strength apart",
    ),
    Method(
        "beft",
        "peft:BeftConfig",
        "arXiv 2509.15974",
        "a bias for each chosen projection",
        merges=False,
        latency="an addition a layer",
        tried=True,
    ),
    Method("c3a", "peft:C3AConfig", "arXiv 2407.19342", "circular convolutions, in blocks", tried=True),
    _prompt("cartridge", "peft:CartridgeConfig", "PEFT 0.21", "a cache of keys and values before the text", tried=True),
    Method("deft", "peft:DeftConfig", "PEFT 0.21", "a projection out of each weight and what replaces it", tried=True),
    Method("glora", "peft:GloraConfig", "PEFT 0.21", "scales and shifts of weights and biases", tried=True),
    Method("gralora", "peft:GraloraConfig", "PEFT 0.21", "low-rank pairs for each block of a weight", tried=True),
    Method(
        "lily",
        "peft:LilyConfig",
        "arXiv 2407.09946",
        "low-rank matrices that layers share through a router",
        merges=False,
        latency="two small products a layer",
        tried=True,
    ),
    Method("osf", "peft:OSFConfig", "PEFT 0.21", "the small singular directions of each weight", tried=True),
    Method("peanut", "peft:PeanutConfig", "arXiv 2410.01870", "a small network of each weight", tried=True),
    Method(
        "psoft", "peft:PsoftConfig", "openreview.net/forum?id=FSHrinMArK", "a rotation in the main subspace", tried=True
    ),
    Method(
        "pvera",
        "peft:PveraConfig",
        "arXiv 2512.07703",
        "vectors as of VeRA, drawn from a distribution",
        quantized=True,
        tried=True,
    ),
    Method(
        "shadow",
        "peft:ShadowConfig",
        "PEFT 0.21",
        "a small network beside the model",
        merges=False,
        latency="the small network in every pass",
        kind="other",
        tried=True,
    ),
    Method(
        "supertuning", "peft:SupertuningConfig", "arXiv 2607.09287", "the largest entries of each weight", tried=True
    ),
    Method("tinylora", "peft:TinyLoraConfig", "arXiv 2602.04118", "a tiny vector that all layers share", tried=True),
    Method(
        "unilora", "peft:UniLoraConfig", "arXiv 2506.00799", "one vector from which all matrices are made", tried=True
    ),
    Method("vblora", "peft:VBLoRAConfig", "arXiv 2405.15179", "a bank of vectors that all layers share", tried=True),
    Method("waveft", "peft:WaveFTConfig", "PEFT 0.21", "some wavelets of each weight's change", tried=True),
)

METHODS = {method.name: method for method in _KNOWN}

WAYS = ("qlora", "lora", "full")  # of tuning, that `recipe-run new` offers

# Methods of PEFT that no recipe can use, and why.
REFUSED = {
    "xlora": "it routes between adapters that are trained already: train those, each by a recipe",
    "poly": "it routes between tasks, and needs the number of a task in every row",
    "multitask_prompt_tuning": "it needs the number of a task in every row; prompt_tuning trains one task",
    "cpt": "it needs a type for every token of the row and makes its loss of the logits, which TRL 1.16 does not build",
    "adaption_prompt": "PEFT 0.21 puts its own forward pass around the one that TRL 1.16 computes the loss with",
    "frod": "PEFT 0.21 makes it of all weights together: nothing could be checked before they are loaded",
    "adamss": "it needs scikit-learn, and a call after every step; adalora moves its parameters, too",
}
