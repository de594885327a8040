"""Another program that is timed in turns with this one: a process that answers lines with numbers.

It is a process of its own because its packages are those of another environment.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence


class Peer:
    """A Python program that reads lines and prints, for each of them, a line of `ANSWER` and a number.

    Args:
        python: interpreter of the environment that has the program's packages.
        program: its source.
        arguments: its arguments.
        needs: what to look for where it ends instead of answering.
    """

    #: What an answer starts with; a program prints other lines too.
    ANSWER = "ANSWER"

    def __init__(self, python: str, program: str, arguments: Sequence[str], needs: str) -> None:
        self._needs = f"does {python} have {needs}?"
        self._process = subprocess.Popen(
            [python, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, line: str = "") -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended, and so have its answers.
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        for answer in self._process.stdout:
            if answer.startswith(self.ANSWER):
                return float(answer.split()[1])
        raise SystemExit(f"the peer ended: {self._needs}")

    def close(self) -> None:
        self._process.communicate()
