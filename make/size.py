"""Print how many parameters a model has, and the class of its size: python make/size.py FOLDER

The class is a word in make/tasks.mk: toy (less than 30 million), small (less than 0.7 billion), medium (less than 5
billion) or large. Only the headers of the weight files are read. A folder that cannot be read prints nothing; the first
stage says what is wrong with it.
"""

import json
import math
import sys
from pathlib import Path

LONGEST = 100_000_000  # bytes of a header, by the rules of safetensors; a file that is something else may claim more
CLASSES = {"toy": 30e6, "small": 0.7e9, "medium": 5e9, "large": math.inf}


def parameters(folder: Path) -> int:
    """The number of parameters in a folder's safetensors files."""
    total = 0
    for path in folder.glob("model*.safetensors"):  # some folders have the same weights again, under other names
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, LONGEST)))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total


def main(folder: str) -> None:
    """Print both, or nothing."""
    try:
        count = parameters(Path(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    if count:
        name = next(name for name, below in CLASSES.items() if count < below)
        print(name, f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M")


if __name__ == "__main__":
    main(sys.argv[1])
