"""The ways in which a program ends early. Each is one line on the terminal and an exit status."""

from __future__ import annotations

LONGEST = 2000  # characters of a message


class Ending(Exception):
    """One line: control characters from a file or flag are escaped, and a very long message is shortened."""

    status = 1

    def __init__(self, message: str):
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 2 :]}")


class InputError(Ending):
    """Something the user gave us is wrong. Says what, where (file and line) and how to mend it. Exit status 2."""

    status = 2


class RunError(Ending):
    """The run cannot go on, although its input was read: a full disk, a loss that is not finite. Exit status 1."""


class UpToDate(Ending):
    """There is nothing to do: a stage is finished already. Exit status 0."""

    status = 0


class Interrupted(Ending):
    """A signal asked the program to stop, and everything is in order. Exit status 128 + the signal's number."""

    def __init__(self, signal: int, where: str = ""):
        """`where`: what was reached, and what the same command does next; "" if that is not known here."""
        super().__init__(f"interrupted{where}")
        self.status = 128 + signal
