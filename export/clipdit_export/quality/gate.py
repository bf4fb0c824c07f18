"""The gate: a variant that is not good enough, or no faster than the one above it, is not what a bundle opens by default."""

from collections.abc import Mapping
from dataclasses import dataclass

from clipdit_export.manifest import Quality, Speed


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far from fp32 a variant may be."""

    st_lpips: float = 0.02
    """Mean ST-LPIPS of final images to those of fp32, same sources and seeds."""
    drift: float = 0.1
    """Relative error of a step's output on the calls of the fp32 trajectory, the worst time."""
    to_target: float = 0.01
    """How much farther from the ground truth than fp32's, in ST-LPIPS; only where there are targets."""
    speedup: float = 1.05
    """Over the fastest variant that is more exact."""


def why_not_good(quality: Quality, reference: Quality, budget: Budget) -> str | None:
    """What is over the budget, in words; None for a variant that may be shipped."""
    if not quality.finite:
        return "makes numbers that are not finite"
    if quality.worst_drift > budget.drift:
        return f"a step is {quality.worst_drift:.3f} from fp32 (relative); the budget is {budget.drift:g}"
    if quality.st_lpips is not None and quality.st_lpips > budget.st_lpips:
        return f"its images are {quality.st_lpips:.4f} from fp32's (ST-LPIPS); the budget is {budget.st_lpips:g}"
    if quality.st_lpips_to_target is not None and reference.st_lpips_to_target is not None:
        farther = quality.st_lpips_to_target - reference.st_lpips_to_target
        if farther > budget.to_target:
            return f"{farther:.4f} farther from the targets than fp32 (ST-LPIPS); the budget is {budget.to_target:g}"
    return None


def choose(
    quality: Mapping[str, Quality], speed: Mapping[str, Speed], targets: Mapping[str, str], reference: str, budget: Budget
) -> tuple[list[str], dict[str, str]]:
    """The variants that are worth opening, the fastest first and `reference` last; and for each other why it is not.

    A variant must be good enough, and faster by `budget.speedup` than `reference` and than the fastest of its own target of less
    drift: nobody gives up exactness for nothing. Those of other targets are no rivals: the machine that opens the bundle may
    lack their runtime."""
    good, reasons = [reference], {}
    for name in sorted(quality, key=lambda name: quality[name].worst_drift):
        if name == reference:
            continue
        reason = why_not_good(quality[name], quality[reference], budget)
        if reason is None:
            rivals = [other for other in good if other == reference or targets[other] == targets[name]]
            rival = min(rivals, key=lambda other: speed[other].per_image_ms)
            gain = speed[rival].per_image_ms / speed[name].per_image_ms
            if gain < budget.speedup:
                reason = f"{gain:.2f} times the speed of {rival}; wanted {budget.speedup:g}"
        if reason is None:
            good.append(name)
        else:
            reasons[name] = reason
    ladder = sorted((name for name in good if name != reference), key=lambda name: speed[name].per_image_ms)
    return [*ladder, reference], reasons
