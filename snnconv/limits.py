"""What a conversion can be asked for: time steps, and bits of the weights."""

MIN_TIMESTEPS, MAX_TIMESTEPS = 1, 4095
MIN_WEIGHT_BITS, MAX_WEIGHT_BITS = 2, 8
