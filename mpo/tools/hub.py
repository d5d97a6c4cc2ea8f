"""Download a model or a data set from the Hugging Face hub: python -m mpo.tools.hub model ORG/NAME[@REVISION]

It goes into models/ORG/NAME or data/ORG/NAME. Only the files that this project reads are downloaded: no pickled weights
and no program code. A branch or tag is resolved to its commit first; hub.json in the folder names it, and the manifest
of the stage that reads the folder repeats it. A folder that is complete is never downloaded again, so that a run keeps
the commit that it began with. A download that was broken off goes on where it stopped.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError, RunError
from mpo.runtime.files import read_json, write_json
from mpo.runtime.manifest import HUB

USAGE = "usage: mpo download model|dataset ORG/NAME[@REVISION]"
ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@([\w.-]+))?")
# make/flags.mk has the same two patterns.
PATH = re.compile(r"(data|models|runs)/.*|.*\.(jsonl|json|csv|parquet|gz)")  # of that form, but meant as a path
PARTIAL = ".cache/huggingface"  # what huggingface_hub keeps in a folder that it downloads into
FOLDERS = {"model": "models", "dataset": "data"}
FILES = {  # what is downloaded, in the folders of a repository that `IGNORED` leaves
    "model": [
        "model*.safetensors",
        "model.safetensors.index.json",
        "*config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab*",
        "merges.txt",
    ],
    "dataset": ["*.jsonl", "*.jsonl.gz", "*.json", "*.json.gz", "*.csv", "*.csv.gz", "*.parquet"],
}
NETWORK = {"httpx", "httpx2", "requests"}  # packages whose errors huggingface_hub lets through, by its version
IGNORED = {"model": ["*/*"], "dataset": [".*"]}


def client() -> Any:
    """The package huggingface_hub. Raises InputError where it is missing."""
    try:
        import huggingface_hub
    except ImportError:
        install = f"{sys.executable} -m pip install huggingface_hub"
        raise InputError(f"downloading from the hub needs the package huggingface_hub: {install}") from None
    return huggingface_hub


def folder_of(kind: str, name: str) -> Path:
    """Where a repository goes: models/ORG/NAME, or with a revision models/ORG/NAME@REVISION."""
    return Path(FOLDERS[kind]) / name


def advice(kind: str, name: str) -> str:
    """How to download what a flag names, for the message that there is no such folder; "" where no hub can have it."""
    command = f"{sys.executable} -m mpo.tools.hub {kind} {name}"
    return f"; to download it from the hub: {command}" if ID.fullmatch(name) and not PATH.fullmatch(name) else ""


def download(kind: str, name: str) -> Path:
    """Download a repository, unless it is there, and return its folder.

    Args:
        kind: "model" or "dataset".
        name: ORG/NAME or ORG/NAME@REVISION, where the revision is a commit, branch or tag.

    Raises:
        InputError: the name is not of this form, or the hub has no such repository or revision, or asks for a login.
        RunError: the hub cannot be reached.
    """
    if not (match := ID.fullmatch(name)) or ".." in name.split("/"):
        raise InputError(f"{name}: not of the form ORG/NAME or ORG/NAME@REVISION")
    folder, (repository, revision) = folder_of(kind, name), match.groups()
    if (folder / HUB).is_file():
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / PARTIAL).is_dir():
        raise InputError(
            f"{folder}: holds files that were not downloaded here, which a download could replace; move it"
        )
    hub = client()
    from huggingface_hub import errors

    try:
        commit = hub.HfApi().repo_info(repository, repo_type=kind, revision=revision).sha
        hub.snapshot_download(
            repository,
            repo_type=kind,
            revision=commit,
            local_dir=folder,
            allow_patterns=FILES[kind],
            ignore_patterns=IGNORED[kind],
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError) as e:
        reason = str(e).strip().splitlines()[-1]
        raise InputError(
            f"{name}: no such folder, and the hub does not give a {kind} of this name ({reason:.200}); a private or "
            "gated one needs a login: HF_TOKEN=... in the environment"
        ) from None
    except Exception as e:
        if not isinstance(e, (errors.HfHubHTTPError, OSError)) and type(e).__module__.split(".")[0] not in NETWORK:
            raise
        raise RunError(f"{name}: could not be downloaded ({type(e).__name__}: {e!s:.200}); try again later") from None
    write_json(folder / HUB, {"kind": kind, "id": repository, "revision": revision or "main", "commit": commit})
    return folder


def main(argv: list[str]) -> None:
    """Download one repository and print its folder."""
    if argv in (["-h"], ["--help"]):
        print(USAGE)
        return
    if len(argv) != 2 or argv[0] not in FOLDERS:
        raise InputError(USAGE)
    print(f"{download(*argv)}: complete, commit {read_json(folder_of(*argv) / HUB)['commit']}")


if __name__ == "__main__":
    run_plain(main)
