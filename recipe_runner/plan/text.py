"""A plan for people, in 80 columns."""

from collections.abc import Iterator

from recipe_runner.plan.device import GIB
from recipe_runner.plan.estimate import Plan
from recipe_runner.problems.words import write_facts

GROUPS = 6  # of what is trained, that are named
BAR = 24  # characters of the longest bar


def write_plan(plan: Plan) -> str:
    """The figures, what they are made of, and how sure they are."""
    of = f" ({plan.device.memory / GIB:.1f} GiB)" if plan.device.memory else ""
    each = f", each of {plan.processes} devices" if plan.processes > 1 else ""
    parts = [f"{plan.name} on {plan.device.name}{of}{each}", write_facts(dict(_describe_run(plan)))]
    kinds = {kind: size for kind, size in plan.peak.kinds.items() if size}
    most = max(kinds.values())
    for kind, size in kinds.items():
        parts.append(f"    {kind:<12}{write_gib(size):>10}  {'#' * max(1, round(BAR * size / most))}")
    parts.append(write_facts(dict(_describe_fit(plan))))
    parts += [write_facts({"change": text}) for text in _describe_changes(plan)]
    parts += [write_facts({"assumed": assumed.text}) for assumed in plan.assumptions]
    return "\n".join(parts)


def _describe_run(plan: Plan) -> Iterator[tuple[str, str]]:
    counted, batch = plan.traced.model.parameters, plan.setting.train
    share = counted["trainable"] / counted["total"]
    groups = [(key, value) for key, value in counted.items() if key not in ("total", "trainable")]
    parts = ", ".join(f"{key} {value:,}" for key, value in sorted(groups, key=lambda item: -item[1])[:GROUPS])
    parts += f" and {len(groups) - GROUPS} more" if len(groups) > GROUPS else ""
    more = f": {parts}" if len(groups) > 1 else ""
    yield "parameters", f"{counted['total']:,}; {counted['trainable']:,} trained ({share:.2%}){more}"
    rows = f"{batch.rows} sequence{'s' * (batch.rows != 1)} of {batch.length:,} tokens"
    held = plan.setting.held_out
    more = f"; evaluated {held.rows} of {held.length:,}" if held else ""
    yield "at a time", rows + ", packed" * batch.flat + more
    dtype = str(plan.setting.dtype).removeprefix("torch.")
    mixed = str(plan.setting.mixed).removeprefix("torch.") if plan.setting.mixed else ""
    yield "precision", f"{dtype} weights, {f'mixed with {mixed}' if mixed else 'no mixed precision'}"
    span = f"{write_gib(plan.low)} to {write_gib(plan.high)}"
    yield "memory", f"{write_gib(plan.peak.total)}, in the {plan.phase}; {span}"
    yield "how sure", str(plan.learned or plan.accuracy)


def _describe_fit(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.traced.model.needs.paged:
        yield "paged", f"{write_gib(plan.traced.model.needs.paged)} of optimizer states, which may leave the device"
    if plan.device.memory:
        fits = plan.peak.total <= plan.device.memory
        sure = "" if plan.high <= plan.device.memory else "; not at the end of the range"
        sure = sure if fits else ""
        told = f"{write_gib(plan.peak.total)} of {write_gib(plan.device.memory)}"
        yield "fits", f"{'yes' if fits else 'no'}: {told}{sure}"
        if plan.largest:
            yield "batch", f"a training step fits up to per_device_train_batch_size: {plan.largest:,}"
        elif plan.largest == 0:
            yield "batch", "not even a batch of one fits"
    if plan.fits:
        yield "fits on", ", ".join(name for name, fit in plan.fits.items() if fit) or "none of the catalogue"
    yield from _describe_time(plan)
    yield "disk", _describe_disk(plan)


def _describe_changes(plan: Plan) -> Iterator[str]:
    for change in plan.changes:
        slower = f", {change.slower:+.0%} operations a token" if abs(change.slower) >= 0.005 else ""
        yield f"{change.what}: -{write_gib(change.saved)}{slower}{'; then it fits' if change.fits else ''}"
    if plan.device.memory and plan.peak.total > plan.device.memory and not any(c.fits for c in plan.changes):
        sharded = "several devices that share the weights (--accelerate-config with FSDP or ZeRO-3)"
        yield f"none of these is enough, nor all together: take a larger device, a smaller model, or {sharded}"


def _describe_time(plan: Plan) -> Iterator[tuple[str, str]]:
    time = plan.time
    steps = "" if time.steps is None else f"{time.steps:,} steps"
    tokens = "" if time.tokens is None else f" of {time.tokens:,} tokens in all"
    if time.low is None or time.high is None:
        yield "time", (steps + tokens or "the number of steps is known when the data is prepared")
        return
    a_step = f"{_short(time.low)} to {_short(time.high)} s a step"
    if time.steps:
        whole = f"{write_seconds(time.low * time.steps)} to {write_seconds(time.high * time.steps)}"
        yield "time", f"{whole}: {steps}{tokens}, {a_step}"
    else:
        yield "time", f"{a_step}; the number of steps is known when the data is prepared"


def _short(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"


def _describe_disk(plan: Plan) -> str:
    disk = plan.disk
    kept = "each checkpoint" if disk.kept is None else f"{disk.kept} checkpoint{'s' * (disk.kept != 1)} of"
    if disk.kept:
        kept = f"{disk.kept} checkpoint{'s' * (disk.kept != 1)}, and one more for a while, of"
    told = f"{kept} {write_gib(disk.checkpoint)}, " * (disk.kept != 0) + f"result {write_gib(disk.result)}"
    told += f": {write_gib(disk.total)} in all"
    told += f", merged {write_gib(disk.merged)}" if disk.merged else ""
    return f"{told}; {write_gib(disk.free)} are free" + ("" if disk.total <= disk.free else ": TOO LITTLE")


def write_gib(size: float) -> str:
    """Bytes as people read them."""
    if size < 0.1 * GIB:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:,.0f} GiB"


def write_seconds(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
