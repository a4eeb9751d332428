"""What the kernel says of this process's memory.

`ru_maxrss` is inherited from the parent across exec, so the peak is read from /proc/self/status.
"""

from __future__ import annotations

from pathlib import Path


def status(key: str) -> int:
    """One line of /proc/self/status, in bytes: VmRSS is resident now, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def reset_peak() -> bool:
    """Set the peak back to what is resident now; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
