"""How a process on a CPU keeps the memory of tensors that come and go."""

from __future__ import annotations

import ctypes

# Numbers of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**30
NEVER = 2**31 - 1


def keep_freed() -> bool:
    """Let this process reuse what tensors free, of up to 1 GiB each; return whether it will.

    glibc gives large blocks back at once, and every tensor of the next step is paged in anew,
    which takes several times what computing it does. Nothing happens with other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, NEVER))
