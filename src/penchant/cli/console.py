"""What the verbs share: progress on stderr, answers on stdout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Stages = Callable[[str, int | None], Callable[[int], None]]

# Titles come from outside: never read their brackets as markup or their colons as emoji.
err = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


@contextmanager
def progress() -> Iterator[Stages]:
    """Yield a ``stages`` function: bars on a terminal, one line a stage elsewhere."""
    if not err.is_terminal:
        begun = time.perf_counter()

        def line(name: str, size: int | None) -> Callable[[int], None]:
            err.print(f"[{time.perf_counter() - begun:6.1f} s] {name}" + (f" ({size:,})" if size else ""))
            return lambda n: None

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err) as bars:

        def bar(name: str, size: int | None) -> Callable[[int], None]:
            task = bars.add_task(name, total=size)
            return lambda n: bars.advance(task, n)

        yield bar
