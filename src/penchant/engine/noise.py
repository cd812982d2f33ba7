"""Keeping the model libraries' own bars and notices off a user's screen."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """For programs with an output of their own; importing penchant changes nothing for anybody."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # bitsandbytes, which peft imports wherever it is installed, misses a kernel package that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
