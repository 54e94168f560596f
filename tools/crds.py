"""Write `crds/` from the models of our kinds, and docs/crds.md's tables; `--check` only compares.

python tools/crds.py [--check]
"""

import sys
from pathlib import Path

import yaml

from casparian_flow.kube.crds import DEFINITIONS, definition_body

FOLDER = Path(__file__).parent.parent / "crds"
HEADER = "# Generated from operator/casparian_flow/kube/models.py by tools/crds.py.\n"


def files() -> dict[Path, str]:
    """Every generated file with what it should hold."""
    return {
        FOLDER / definition.file_name: HEADER
        + yaml.safe_dump(
            definition_body(definition), sort_keys=False, allow_unicode=True, width=100
        )
        for definition in DEFINITIONS
    }


def main(check: bool) -> int:
    wanted = files()
    there = {path: path.read_text("utf-8") for path in FOLDER.glob("*.yaml")}
    stale = sorted(p.name for p in wanted.keys() | there.keys() if wanted.get(p) != there.get(p))
    if not stale:
        return 0
    if check:
        print(f"out of step with the models: {', '.join(stale)}; run 'make docs'")
        return 1
    FOLDER.mkdir(exist_ok=True)
    for path, text in wanted.items():
        path.write_text(text, "utf-8")
    for path in there.keys() - wanted.keys():
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
