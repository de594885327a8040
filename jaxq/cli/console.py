"""Where output goes: figures and JSON to stdout, progress and complaints to stderr."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from jaxq.report.records import duration

LINE_SECONDS = 5.0
"""Without a terminal, progress is a plain line at most this often."""


_interrupted = False


def remember_interrupts() -> None:
    """Makes an interrupt count even where Python loses it.

    A KeyboardInterrupt raised inside a finalizer or a callback from C is printed or dropped, and the work goes on.
    """

    def handler(signum: int, frame: Any) -> None:
        global _interrupted
        _interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)


def out() -> Console:
    """The console of results; not wider than text reads well, and never cut when piped."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def print_json(data: Any) -> None:
    """Print JSON and nothing else on stdout; nan becomes null."""
    sys.stdout.write(json.dumps(_finite(data), indent=2, ensure_ascii=False) + "\n")


def complain(message: str) -> None:
    """Print one line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]jaxq:[/bold red] {escape(message)}")


def remark(message: str) -> None:
    """Print a line on stderr that is no error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False, style="dim")


class Remarks(logging.Handler):
    """Remarks what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        remark(record.getMessage())


def table(title: str, columns: list[tuple[str, str]], rows: list[list[str]]) -> Table:
    """Return a rich table; columns are (name, "left" or "right")."""
    made = Table(title=escape(title), title_justify="left")
    for name, side in columns:
        made.add_column(name, justify="right" if side == "right" else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


class Meter:
    """Shows how far a run is, as a bar on a terminal or as lines elsewhere."""

    def __init__(self, progress: Progress | None, name: str):
        self._progress = progress
        self._task = progress.add_task(name, total=1.0, detail="") if progress else None
        self._name = name
        self._last = -math.inf

    def update(self, share: float, detail: str, eta: float = math.nan) -> None:
        """Show that `share` (0 to 1) is done; eta in seconds, nan if unknown. Ends an interrupted run."""
        if _interrupted:
            raise KeyboardInterrupt
        # Before this much is done, compilation is most of the time and an estimate would be wild.
        rest = f", {duration(eta)} left" if math.isfinite(eta) and 0.05 <= share < 1 else ""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=share, detail=escape(detail + rest))
        elif share >= 1 or time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            remark(f"{self._name}: {100 * share:.0f}%  {detail}{rest}")


@contextmanager
def meter(name: str) -> Iterator[Meter]:
    """Yield a Meter on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Meter(None, name)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Meter(progress, name)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Show on a terminal that something of unknown length goes on."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(escape(what)):
        yield


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
