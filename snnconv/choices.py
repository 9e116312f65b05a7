"""What a conversion can be asked for: names, bounds of numbers, and what it takes if not asked."""

CALIBRATIONS = ("reconstruct", "mse", "percentile", "max", "bn")
NEURONS = ("signed", "unsigned")
INITIAL_MEMBRANES = ("half", "zero")
COMPENSATIONS = ("none", "gain", "bias")
MIN_TIMESTEPS, MAX_TIMESTEPS, DEFAULT_TIMESTEPS = 1, 4095, 7
MIN_WEIGHT_BITS, MAX_WEIGHT_BITS, DEFAULT_WEIGHT_BITS = 2, 8, 8
DEFAULT_PERCENTILE = 99.9


def default_schedule(compensation: str) -> str:
    """Return the schedule of a network that is not asked for one.

    What a compensation makes up for is missing at the end of T steps, and nowhere else.
    """
    return "drain" if compensation == "none" else "paper"
