"""Bring what the Helm chart shares with the project into it; `--check` only compares.

    python tools/chart.py [--check]

A chart can read only files of its own. `helm/crds.yaml` is the same CRDs as one plain file, for
clusters where an administrator installs them.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
KUBE = ROOT / "operator" / "casparian_flow" / "kube"
FILES = ROOT / "helm" / "casparian" / "files"
PLAIN = ROOT / "helm" / "crds.yaml"
SHARED = {"crds": ROOT / "crds", "admission": KUBE / "admission", "roles": KUBE / "roles"}
"""Folder in the chart → where its files come from."""


def files() -> dict[Path, str]:
    """Every file with what it should hold."""
    wanted = {
        FILES / folder / path.name: path.read_text("utf-8")
        for folder, origin in SHARED.items()
        for path in sorted(origin.glob("*.yaml"))
    }
    definitions = [text for path, text in wanted.items() if path.parent.name == "crds"]
    return {**wanted, PLAIN: "---\n".join(definitions)}


def main(check: bool) -> int:
    wanted = files()
    there = {path for folder in SHARED for path in (FILES / folder).glob("*.yaml")}
    stale = sorted(
        str(path.relative_to(ROOT))
        for path in wanted.keys() | there
        if not path.exists() or path.read_text("utf-8") != wanted.get(path)
    )
    if check and stale:
        print(f"out of step: {', '.join(stale)}; run 'make docs'")
        return 1
    for path in there - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
