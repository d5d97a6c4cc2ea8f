"""Check the flags of several stages before the first one runs: python -m mpo.tools.check < FILE

Each line of the input is a command as it will be run later, such as `train_dpo.py --data ... --loss ipo`. Every script
reads and checks its flags and stops there. The first mistake ends the program with the line that the stage itself
would print.
"""

from __future__ import annotations

import runpy
import shlex
import sys

from mpo.runtime import entry


def main(argv: list[str]) -> None:
    """Check the commands on standard input. Raises InputError (through the scripts) for the first mistake."""
    entry.check_only = True
    name = sys.argv[0]
    for line in sys.stdin:
        sys.argv = shlex.split(line)
        if sys.argv:
            runpy.run_path(sys.argv[0], run_name="__main__")
    sys.argv = [name]


if __name__ == "__main__":
    entry.run_plain(main)
