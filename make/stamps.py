"""Print the size and the times of each file of some files and folders: python make/stamps.py PATH ...

The output changes when a file is replaced, even by one with an older time, since a file system sets the time of the
last change of a file's entry (ctime) itself. A path that does not exist prints nothing.
"""

import os
import sys
from pathlib import Path

for path in map(Path, sys.argv[1:]):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        state = os.stat(file)
        print(os.fsencode(file.relative_to(path)), state.st_size, state.st_mtime_ns, state.st_ctime_ns)
