"""What the programs of finetune/ are: the verb `finetune` with its recipe chosen, under `accelerate launch` too."""

from __future__ import annotations

import sys


def program(recipe: str) -> None:
    """Run one recipe with the arguments of the command line."""
    from penchant.cli import main

    sys.argv[1:1] = ["finetune", recipe]
    main()
