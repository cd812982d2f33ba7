"""What vLLM's own processes call when they start: they end with the process that started them, killed or not.

vLLM's engine process waits for requests for ever when the process that would send them is killed, and keeps the model
in memory: on a GPU the same job, begun again, would find no room. (Its workers end with it.)
"""

from __future__ import annotations

import os
import signal
import threading
import time

# The process that starts an engine says here who it is.
OWNER = "PENCHANT_VLLM_OWNER"
_EVERY, _PATIENCE = 1.0, 5.0  # seconds between looks, and for an orderly end


def end_with_owner() -> None:
    """Watch the parent where it is the owner; an entry point of vLLM's plugins, which does nothing anywhere else."""
    owner = os.environ.get(OWNER, "")
    if owner == str(os.getppid()):
        threading.Thread(target=_watch, args=(int(owner),), name="PenchantOwnerWatch", daemon=True).start()


def _watch(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(_EVERY)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)
