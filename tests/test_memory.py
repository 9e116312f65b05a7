"""Freed memory is kept where the C library can be told to, and nothing breaks where not."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from snnconv import memory

FAULTS = """
import resource, sys, torch
from snnconv import memory
if sys.argv[1:]:
    assert memory.keep_freed()
x = torch.ones(2**24)
for _ in range(10):
    y = x * 2
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    y = x * 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver() < ("glibc", "2.36"), reason="it keeps less, or nothing")
def test_freed_memory_is_not_paged_in_again() -> None:
    without, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, *arguments],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for arguments in ([], ["keep"])
    )
    assert kept < without / 5


@pytest.mark.parametrize("library", [SimpleNamespace(), SimpleNamespace(mallopt=lambda *a: 0)])
def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert not memory.keep_freed()
