"""The machine: its memory, and how much of it this process has used. Works on Windows, which has no `resource`."""

import sys

import psutil  # type: ignore[import-untyped]


def memory_bytes() -> int:
    """Bytes of memory of this machine."""
    return int(psutil.virtual_memory().total)


def peak_memory_bytes() -> int:
    """Most memory that this process has used since its start, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        found = psutil.Process().memory_info()
        return int(getattr(found, "peak_wset", found.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
