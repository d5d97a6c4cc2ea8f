"""How a program starts, with its flags, and how it ends: every early end is one line and an exit status."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from mpo.runtime import device, distributed, output, signals, trackers
from mpo.runtime.errors import Ending, InputError, RunError, UpToDate
from mpo.runtime.flags import parse


def run(
    main: Callable[[Any], None],
    config_class: type,
    check: Callable[[Any], None] | None = None,
    plan: Callable[[Any], None] | None = None,
) -> None:
    """Run a stage script on its flags.

    Args:
        main: the stage.
        config_class: the dataclass whose fields are its flags (mpo/config.py).
        check: raises InputError for flags that contradict each other; called before `main`, and reads no file.
        plan: prints the memory that the stage would take; called instead of `main` for --plan true.
    """

    def go(argv: list[str]) -> None:
        config: Any = configure(config_class, argv, check)
        if getattr(config, "plan", False):
            if plan is None:
                raise InputError("--plan: this stage has no memory plan (docs/extending.md)")
            plan(config)
        else:
            main(config)

    run_plain(go)


def configure(config_class: type, argv: list[str], check: Callable[[Any], None] | None) -> Any:
    """The config that the flags make, checked. Raises InputError; see `run`."""
    config: Any = parse(config_class, argv)
    if check:
        check(config)
    trackers.check(getattr(config, "log", "none"))
    return config


def run_plain(main: Callable[[list[str]], None]) -> None:
    """Run a program on its arguments; every early end is one line and an exit status (errors.py)."""
    signals.install()
    output.accept_every_character()
    try:
        try:
            main(sys.argv[1:])
        except UpToDate as e:
            print(e)
        except SystemExit:  # after --help, or with an exit status of its own
            output.flush()
            raise
        output.flush()
        distributed.leave()
    except BrokenPipeError:  # whoever read our output has seen enough, as in `... | head`
        _end("", 128 + signal.SIGPIPE)
    except Ending as e:
        _end({InputError: "error: ", RunError: "stopped: "}.get(type(e), "") + str(e), e.status)
    except OSError as e:
        _end(f"stopped: {e.filename or 'standard output or a file'}: {e.strerror or e}", 1)
    except RuntimeError as e:
        if line := _refusal_of_torch(e):
            _end(f"stopped: {line}", 1)
        if not distributed.lost_a_peer(e):
            raise
        if signals.LAUNCHED in os.environ:  # launch.py says which process died, as soon as it notices
            signals.ignore()
            time.sleep(2)
            os._exit(signals.SILENT)
        _end("stopped: another process of this job has ended; the same command goes on from the last save, if any", 1)


def _refusal_of_torch(error: RuntimeError) -> str:
    """One line for the errors of torch that say something about the machine rather than the code; else ""."""
    first = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in first:
        asked = re.search(r"[Tt]ried to allocate (\d[\d.]* \w+)", str(error))
        what = f" for {asked[1]} more" if asked else ""
        return (
            f"{device.current()} has too little memory{what}; lower --microbatch, or look at docs/memory.md for other "
            "ways to save memory. The same command goes on from the last save, if any"
        )
    compiler = sys.modules.get("torch._dynamo.exc")
    if compiler and isinstance(error, compiler.TorchDynamoException):
        return f"--compile true: torch.compile failed ({type(error).__name__}: {first[:300]}); leave --compile out"
    return ""


def one_argument(argv: list[str], usage: str) -> str:
    """The only argument of a command. Prints the usage for --help; raises InputError for anything else."""
    if argv in (["-h"], ["--help"]):
        print(f"usage: {usage}")
        sys.exit(0)
    if len(argv) != 1 or argv[0].startswith("-"):
        raise InputError(f"usage: {usage}")
    return argv[0]


def _end(line: str, status: int) -> NoReturn:
    """Print the last line of this program, if any, in only one of several processes, and exit."""
    signals.ignore()
    with suppress(OSError):
        if line and distributed.has_the_last_word():
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr, flush=True)
    output.drop_unread()
    if distributed.world_size() > 1:
        os._exit(status)  # the other processes cannot be waited for
    sys.exit(status)
