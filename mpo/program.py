"""How a program starts, with its flags, and how it ends: whatever ends it early is one line and an exit status."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mpo import interrupts, parallel, plan
from mpo.config import EvalConfig, SplitConfig, Training, parse
from mpo.errors import Ending, InputError, RunError


def run(main: Callable[[Any], None], cls: type) -> None:
    """Run a stage script on its flags; with --plan true only say what memory that would take."""

    def go(argv: list[str]) -> None:
        config: Any = parse(cls, argv)
        if isinstance(config, Training | SplitConfig | EvalConfig) and config.plan:
            plan.show(config)
        else:
            main(config)

    run_plain(go)


def run_plain(main: Callable[[list[str]], None]) -> None:
    """Run a program on its arguments; whatever ends it early is one line and an exit status (errors.py)."""
    interrupts.install()
    try:
        main(sys.argv[1:])
        parallel.end()
    except Ending as e:
        _end({InputError: "error: ", RunError: "stopped: "}.get(type(e), "") + str(e), e.status)
    except OSError as e:
        _end(f"stopped: {e.filename or 'a file'}: {e.strerror or e}", 1)
    except RuntimeError as e:
        if not parallel.lost_another(e):
            raise
        if "MPO_LAUNCHED" in os.environ:  # launch.py says who died, when it has noticed
            interrupts.ignore()
            time.sleep(2)
            os._exit(1)
        _end("stopped: another process of this job has ended; the same command goes on from the last save", 1)


def _end(line: str, status: int) -> NoReturn:
    """The last words of this program; of several processes only one says why they ended."""
    interrupts.ignore()
    if parallel.may_speak_last():
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if parallel.count() > 1:
        os._exit(status)  # the others cannot be waited for
    sys.exit(status)
