"""What a launcher of several processes, such as `torchrun`, tells each of them."""

from __future__ import annotations

import os


def processes() -> int:
    """Return how many processes do this job together, 1 without a launcher."""
    given = os.environ.get("WORLD_SIZE", "")
    return int(given) if given.isdecimal() else 1


def is_leader() -> bool:
    """Return whether this is the process that prints and writes."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"
