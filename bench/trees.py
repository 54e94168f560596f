"""Folders full of files for Scout."""

import time
from pathlib import Path

RACY_WAIT_S = 3.0
"""Files younger than Scout's slack are read again by the next scan; wait until none is."""
IGNORED = ("*.tmp", ".git/", "**/cache/", "*.bak", "!important.bak")


def make(root: Path, files: int, folders: int) -> None:
    """Make `files` small files in `folders` folders two deep, and some that rules leave out."""
    for number in range(folders):
        place = root / f"area{number // 100:03}" / f"folder{number:05}"
        place.mkdir(parents=True)
        for index in range(number, files, folders):
            (place / f"file{index:07}.txt").write_text(f"{index}\n")
        if number % 10 == 0:
            (place / "left over.tmp").touch()


def age() -> None:
    """Wait until no file's timestamps are fresh any more."""
    time.sleep(RACY_WAIT_S)
