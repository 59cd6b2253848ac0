"""How often to save: often enough to lose little in a failure, rarely enough not to wait for saves all the time.

Source: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974) 530;
J. T. Daly, "A higher order estimate of the optimum checkpoint interval", FGCS 22 (2006) 303, equation 37.
"""

import math


def young_interval_s(save_s: float, failure_every_s: float) -> float:
    """Seconds of work between two saves, to first order: good while a save is short beside the time between failures.

    Args:
        save_s: Seconds that a save keeps the ranks from training.
        failure_every_s: Mean time between failures of the whole job, preemptions included.
    """
    return math.sqrt(2 * save_s * failure_every_s)


def daly_interval_s(save_s: float, failure_every_s: float) -> float:
    """Seconds of work between two saves with the terms of higher order; the arguments are those of Young's."""
    if save_s >= 2 * failure_every_s:
        return failure_every_s
    x = math.sqrt(save_s / (2 * failure_every_s))
    return young_interval_s(save_s, failure_every_s) * (1 + x / 3 + x**2 / 9) - save_s
