"""How a process on a CPU keeps the memory of tensors that come and go."""

from __future__ import annotations

import ctypes

# Numbers of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Older versions of glibc take no more than 32 MiB.
LARGEST_KEPT = (2**30, 2**25)
NEVER = 2**31 - 1


def keep_freed() -> bool:
    """Let this process reuse what tensors free, of 32 MiB at least; return whether it will.

    glibc gives large blocks back at once, and every tensor of the next step is paged in anew,
    which takes several times what computing it does. Nothing happens with other C libraries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT)
    return kept and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
