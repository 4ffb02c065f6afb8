"""A plan as text, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from minigpt4.planning.plan import GIB, ROOM, THIS_CPU, Plan


def as_text(plan: Plan) -> str:
    """Return a plan as the verb `plan` prints it."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    yield f"{'part':<28}{'trainable':>15}{'frozen':>18}"
    for part, (trainable, frozen) in plan.parameters.items():
        yield f"  {part:<26}{trainable:>15,}{frozen:>18,}"
    total = [sum(column) for column in zip(*plan.parameters.values(), strict=True)]
    yield f"  {'total':<26}{total[0]:>15,}{total[1]:>18,}"
    yield ""
    yield f"{'memory of one device':<28}{'GiB':>15}"
    for part, size in plan.memory.items():
        yield f"  {part:<26}{size / GIB:>15.2f}"
    yield f"  {'libraries':<26}{plan.libraries / GIB:>15.2f}"
    yield f"  {'peak':<26}{plan.peak_bytes / GIB:>15.2f}"
    yield ""
    yield f"steps: {plan.steps:,}; samples: {plan.samples:,}{_epochs(plan)}; {plan.rows}"
    yield f"operations: {plan.flops_per_step / 1e12:,.2f} TFLOP per step, {plan.flops_per_step * plan.steps:.2e} in all"
    yield ""
    of_cpu = any(device.name == THIS_CPU for device in plan.devices)
    yield f"time at {plan.utilisation:.0%} of the peak, if data arrives as fast (change with --utilisation):"
    for device in plan.devices:
        number = "" if device.name == THIS_CPU else f"{plan.ranks} x "
        memory = "" if device.memory_gib is None else f", {device.memory_gib:g} GiB"
        peak = f"{device.peak_flops / 1e12:,.3g} TFLOP/s{' measured' if device.name == THIS_CPU else ''}{memory}"
        hours = "" if device.hours is None else _duration(device.hours)
        step = f"{device.seconds_per_step:.3g} s a step"
        yield f"  {number + device.name:<26}{hours:>15}{step:>18}  {_fit(device.fits)} ({peak})"
    if of_cpu and len(plan.devices) > 1:
        yield "  (for the other devices, the memory of libraries is that of this process)"
    yield ""
    whole = "" if plan.cache_bytes is None else f"{plan.cache_bytes / 1e9:,.2f} GB for the training data, "
    yield f"feature cache in bfloat16: {whole}{plan.cache_bytes_per_image:,} bytes an image"
    yield f"checkpoints that are kept: {plan.checkpoint_bytes / 1e9:.2f} GB"
    if plan.changes:
        yield ""
        yield "it does not fit everywhere; what one device needs after one change (--options ...):"
        for change in plan.changes:
            small = [d for d in plan.devices if d.fits is False and d.memory_gib]
            now = [d.name for d in small if d.memory_gib and change.memory_gib <= ROOM * d.memory_gib]
            yield f"  {change.memory_gib:>8.2f} GiB  {change.option}{'  -> fits ' + ', '.join(now) if now else ''}"
    for problem in plan.problems:
        yield f"problem: {problem}"


def _epochs(plan: Plan) -> str:
    return "" if plan.epochs is None else f" ({plan.epochs:.2g} passes over the data)"


def _fit(fits: bool | None) -> str:
    return {True: "fits", False: "DOES NOT FIT", None: ""}[fits]


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.1f} min" if hours < 2 else f"{hours:.1f} h"
