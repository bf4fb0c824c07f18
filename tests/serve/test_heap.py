"""Threads of the service share their heaps."""

import subprocess
import sys

import pytest

COUNT = """
import ctypes, re, threading
from clipdit_serve.heap import limit_heaps
{limit}
meet = threading.Barrier(8)
def use():
    blocks = [bytes(5000) for _ in range(50)]
    meet.wait()  # all at the same time: a thread that has ended leaves its heap to the next
threads = [threading.Thread(target=use) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc = ctypes.CDLL(None)
libc.open_memstream.restype = ctypes.c_void_p
text, size = ctypes.c_char_p(), ctypes.c_size_t()
stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
assert libc.malloc_info(0, stream) == 0
libc.fclose(stream)
print(len(re.findall(b"<heap ", text.value)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_info is glibc's")
def test_eight_threads_have_two_heaps_and_not_one_each(monkeypatch):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    assert _heaps(limit="") > 2
    assert _heaps(limit="limit_heaps()") == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_info is glibc's")
def test_whoever_sets_the_number_has_it(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")
    assert _heaps(limit="limit_heaps()") == 3


def _heaps(*, limit: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT.format(limit=limit)], capture_output=True, text=True, check=True)
    return int(done.stdout)
