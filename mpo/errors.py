"""How a program ends before its end: each of these is one line on the terminal, and an exit status."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave us is wrong: says what, where (file and line) and how to mend it. Exit status 2."""


class RunError(Exception):
    """The run cannot go on, though its input could be read: a full disk, a loss that is not finite. Exit status 1."""


class Interrupted(Exception):
    """A signal asked the program to end, and it has left everything in order. Exit status 128 + the signal."""

    def __init__(self, signal: int, where: str = ""):
        super().__init__(f"interrupted{where}; the same command goes on from there")
        self.status = 128 + signal
