"""Keeping the model libraries' own bars and notices off a user's screen."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """For programs with an output of their own; importing penchant changes nothing for anybody."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
