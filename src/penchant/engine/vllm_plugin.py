"""What vLLM's own processes call when they start: they end with the process that started them, killed or not.

vLLM's engine process waits for requests for ever when the process that would send them is killed, and keeps the model
in memory: on a GPU the same job, begun again, would find no room. (Its workers end with it.) A VLLM_PLUGINS that
does not name penchant leaves a spawned engine unwatched.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# The process that is starting an engine says here who it is.
_OWNER = "PENCHANT_VLLM_OWNER"
_EVERY, _PATIENCE = 1.0, 5.0  # seconds between looks, and for an orderly end


@contextmanager
def owned() -> Iterator[None]:
    """The processes of vLLM that are started meanwhile end with this one."""
    _heard_by_forks()
    before = os.environ.get(_OWNER)
    os.environ[_OWNER] = str(os.getpid())
    try:
        yield
    finally:
        if before is None:
            del os.environ[_OWNER]
        else:
            os.environ[_OWNER] = before


@cache
def _heard_by_forks() -> None:
    """A forked process believes that vLLM's plugins were loaded, for they were in the owner."""
    os.register_at_fork(after_in_child=end_with_owner)


def end_with_owner() -> None:
    """Watch the owner where it is the parent; an entry point of vLLM's plugins, which does nothing anywhere else."""
    owner = int(os.environ.get(_OWNER, "0"))
    if owner == os.getppid():
        threading.Thread(target=_watch, args=(owner,), name="PenchantOwnerWatch", daemon=True).start()


def _watch(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)
