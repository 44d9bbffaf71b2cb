"""The memory that this process has in use, from its status file (Linux only)."""

from __future__ import annotations

from pathlib import Path


def resident_bytes(entry: str = "VmRSS") -> int:
    """Return the resident memory of this process in bytes (Linux only).

    entry: "VmRSS" for the memory in use now, "VmHWM" for the largest so far.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{entry}:"))


def resident_peak() -> int:
    """Return the largest resident memory of this process so far, in bytes (Linux only)."""
    return resident_bytes("VmHWM")
