"""What several devices share: weights, gradients and optimizer states by DDP, FSDP2 and DeepSpeed's ZeRO.

None of this is traced: a device's part is worked out from what one device would hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from recipe_runner.launch.configuration import Launch
from recipe_runner.plan.trace import ADAPTERS, GRADIENTS, OPTIMIZER, OVERHEAD, WEIGHTS, Peak

OPTIMIZING = "optimizer step"  # the phase in which no layer is gathered
REDUCED = 500_000_000  # numbers that ZeRO reduces at a time: deepspeed/runtime/zero/config.py, reduce_bucket_size
MASTER = 4  # bytes of the copy in float32 that DeepSpeed keeps of every weight that is trained


@dataclass(frozen=True)
class Layers:
    """Bytes of the weights that are gathered while they are used.

    Attributes:
        largest: Of the largest layer.
        root: Of what is in no layer: embeddings, head, last norm.
        trained: Of the largest layer, what is trained.
    """

    largest: int
    root: int
    trained: int


@dataclass(frozen=True)
class Kept:
    """What is trained.

    Attributes:
        numbers: How many.
        size: Their bytes on one device.
        mixed: Whether precision is mixed: DeepSpeed then holds all weights in 16 bits.
    """

    numbers: int
    size: int
    mixed: bool

    @property
    def narrowed(self) -> bool:
        """Whether DeepSpeed makes 16 bits of what is trained in 32."""
        return self.mixed and self.size > 3 * self.numbers


def share(peaks: Mapping[str, Peak], launch: Launch, layers: Layers, trained: Kept) -> dict[str, Peak]:
    """The peaks on each of several devices.

    Args:
        peaks: Phase -> the peak on one device.
        launch: How processes are started.
        layers: What is gathered.
        trained: What is trained.
    """
    count, stage = max(launch.processes, 1), launch.zero_stage
    found: dict[str, Peak] = {}
    for phase, peak in peaks.items():
        kinds = dict(peak.kinds)
        if launch.kind == "FSDP":
            _share_fsdp(kinds, launch, layers, count, phase != OPTIMIZING)
        elif launch.is_deepspeed:
            _share_zero(kinds, launch, stage, layers, trained, count, phase != OPTIMIZING)
        elif count > 1:
            kinds[OVERHEAD] += trained.size  # DDP's buckets hold a copy of all gradients
        found[phase] = Peak(sum(kinds.values()), kinds)
    return found


def _share_fsdp(kinds: dict[str, int], launch: Launch, layers: Layers, count: int, used: bool) -> None:
    """FSDP2: every layer is gathered while it is used, and the next one meanwhile; the root stays gathered."""
    whole = kinds[WEIGHTS] + kinds[ADAPTERS]
    for kind in (WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER):
        kinds[kind] = -(-kinds[kind] // count)
    gathered = 2 * layers.largest + layers.root
    if launch.fsdp("reshard_after_forward", True) in (False, "false"):
        gathered = whole
    kinds[OVERHEAD] += (min(gathered, whole) + 2 * layers.trained) * used
    if launch.fsdp("offload_params", False) in (True, "true"):
        kinds[WEIGHTS] = kinds[ADAPTERS] = kinds[GRADIENTS] = kinds[OPTIMIZER] = 0


def _share_zero(
    kinds: dict[str, int], launch: Launch, stage: int, layers: Layers, trained: Kept, count: int, used: bool
) -> None:
    """ZeRO: states are shared from stage 1 on, gradients from 2 on, weights in 3.

    Source: deepspeed/runtime/zero/stage_1_and_2.py 0.19 (single_partition_of_fp32_groups), runtime/engine.py (module
    cast to 16 bits by `_configure_distributed_model`). The optimizer's own states are of the copy in float32.
    """
    section = launch.values.get("deepspeed_config") or {}
    size = trained.size
    if trained.narrowed:
        whole = kinds[ADAPTERS] or kinds[WEIGHTS]  # what is trained is one of the two
        kinds[ADAPTERS if kinds[ADAPTERS] else WEIGHTS] = whole // 2
        kinds[GRADIENTS] //= 2
        size //= 2
    states = kinds[OPTIMIZER]
    if size < 3 * trained.numbers and not trained.narrowed and states >= 3 * trained.numbers:
        states *= 2  # counted as of 16 bits
    kinds[OPTIMIZER] = (states + MASTER * trained.numbers) // count
    kinds[OVERHEAD] += min(2 * REDUCED, size)
    if stage >= 2:
        kinds[GRADIENTS] = -(-kinds[GRADIENTS] // count)
    if stage >= 3:
        gathered = (2 * layers.largest + layers.root) // (2 if trained.narrowed and not kinds[ADAPTERS] else 1)
        kinds[OVERHEAD] += min(gathered, kinds[WEIGHTS] + kinds[ADAPTERS]) * used
        kinds[WEIGHTS], kinds[ADAPTERS] = (-(-kinds[kind] // count) for kind in (WEIGHTS, ADAPTERS))
    if str(section.get("offload_optimizer_device") or "none") != "none":
        kinds[OPTIMIZER] = 0
    if stage >= 3 and str(section.get("offload_param_device") or "none") != "none":
        kinds[WEIGHTS] = kinds[ADAPTERS] = 0
