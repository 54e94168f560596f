"""Make a virtual environment and install one pinned tool into it, with a bare Python alone.

    python3 tools/bootstrap.py .venv uv==0.13.9

Some systems ship Python without `ensurepip`; there pip is fetched from the package index, as the
one file that it is, to install the tool.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

INDEX = "https://pypi.org/pypi/pip/json"


def main(folder: str, requirement: str) -> int:
    has_pip = importlib.util.find_spec("ensurepip") is not None
    venv.EnvBuilder(with_pip=has_pip, clear=False, symlinks=os.name != "nt").create(folder)
    python = Path(folder) / "bin" / "python"
    install = ["install", "--quiet", "--disable-pip-version-check", requirement]
    if has_pip:
        return subprocess.call([str(python), "-m", "pip", *install])
    with tempfile.TemporaryDirectory() as scratch:
        return subprocess.call([str(python), f"{fetch_pip(Path(scratch))}/pip", *install])


def fetch_pip(scratch: Path) -> Path:
    """Download pip's wheel, which Python can run as it is."""
    with urllib.request.urlopen(INDEX, timeout=60) as answer:
        files = json.load(answer)["urls"]
    wheel = next(f for f in files if f["packagetype"] == "bdist_wheel")
    target = scratch / str(wheel["filename"])
    with urllib.request.urlopen(wheel["url"], timeout=60) as answer:
        target.write_bytes(answer.read())
    return target


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: bootstrap.py FOLDER REQUIREMENT")
    sys.exit(main(sys.argv[1], sys.argv[2]))
