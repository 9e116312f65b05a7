"""The numbers a conversion takes: their bounds, and what they are if nothing is said."""

MIN_TIMESTEPS, MAX_TIMESTEPS, DEFAULT_TIMESTEPS = 1, 4095, 7
MIN_WEIGHT_BITS, MAX_WEIGHT_BITS, DEFAULT_WEIGHT_BITS = 2, 8, 8
DEFAULT_PERCENTILE = 99.9
