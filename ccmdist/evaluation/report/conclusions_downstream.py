"""Plain sentences on the downstream tasks: what synthetic images did for a network, and how sure that is."""

from ccmdist.evaluation.comparison import Comparison
from ccmdist.evaluation.downstream.summary import ArmResult, TaskSummary
from ccmdist.evaluation.report.plots_downstream import LABELS


def downstream_sentences(comparison: Comparison) -> list[str]:
    """One sentence for each task: which arms differ from real images alone."""
    if comparison.downstream is None:
        return []
    return [_sentence(task, comparison.config.alpha) for task in comparison.downstream.tasks if len(task.arms) > 1]


def _sentence(task: TaskSummary, alpha: float) -> str:
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "no difference can be told": []}
    for arm in task.arms:
        if arm.difference:
            verdicts[_verdict(arm, alpha)].append(_told(arm))
    told = "; ".join(f"{verdict}: {', '.join(arms)}" for verdict, arms in verdicts.items() if arms)
    tested = f"{task.num_images} test images of {task.num_subjects} subjects"
    return (
        f"{task.task.capitalize()}, {LABELS[task.primary]} against training on real images alone, on {tested} with a "
        f"{task.network} network, at level {alpha:g} after Holm's correction: {told}."
    )


def _verdict(arm: ArmResult, alpha: float) -> str:
    assert arm.difference is not None, "the arm is compared"
    if arm.difference.p_holm >= alpha:
        return "no difference can be told"
    return "better" if arm.difference.value > 0 else "worse"


def _told(arm: ArmResult) -> str:
    assert arm.difference is not None, "the arm is compared"
    low, high = arm.difference.interval
    return f"{arm.arm} ({arm.difference.value:+.3f}, {low:+.3f} to {high:+.3f})".replace("-", "\u2212")
