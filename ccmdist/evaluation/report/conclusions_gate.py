"""Sentences on the gate: what its verdict says of a set, and what it does not say."""

from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.report.formatting import joined, p_value, told_once


def gate_sentences(comparison: Comparison) -> list[str]:
    """One for the judged sets of which the same is to be told."""
    settings = comparison.config.memorisation
    told = [(one.name, _told(one, settings.alpha)) for one in comparison.sets if one.gate is not None and settings]
    return [f"{'Each of ' if names[1:] else ''}{joined(names)} {text}" for names, text in told_once(told)]


def _told(one: SetReport, alpha: float) -> str:
    assert one.gate is not None, "it was judged"
    if not one.gate.passed:
        return f"is withheld by the gate, and ccmdist release refuses it: {'; '.join(one.gate.reasons)}."
    assert one.gate.figures is not None, "what was not searched does not pass"
    figures = one.gate.figures
    # Not "no more than held-out frames": a test that did not find it has not shown that.
    return (
        f"passed the gate: none of its {figures.synthetic.num_images} images was found to be a copy of one "
        f"of {figures.num_training_images} training frames, and {figures.share.num_near_images} of them come nearer to "
        f"one than held-out frames do, no more than chance explains (p {p_value(figures.share.p)}, level {alpha:g})."
    )


def gate_limits(comparison: Comparison) -> list[str]:
    """What passing, or no gate at all, does not mean."""
    if all(one.gate is None for one in comparison.sets):
        return ["Nothing here tests whether images copy training frames, so no set of this report can be released."]
    return [
        "Passing the gate means that no whole frame was found to be copied. It does not rule out copies of small "
        "parts, says nothing on attacks that it does not make, and does not replace the consent of the people shown."
    ]
