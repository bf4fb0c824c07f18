"""The heap of a process that answers for weeks."""

import ctypes
import os

HEAPS = 2
"""One for the event loop, and one for the threads beside it."""

_M_ARENA_MAX = -8  # malloc.h


def limit_heaps() -> None:
    """Few heaps for all threads together, from now on. glibc gives each thread one of its own, up to eight a core, and each keeps
    gaps of the images that went through it: some 25 MB in all with thirteen threads, two services side by side.

    MALLOC_ARENA_MAX, where it is set, has said how many; other C libraries have nothing of the kind."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, HEAPS)
