"""docs/trust.md is in step with the code, and its verification by hand works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from signing_kit import KEY, signed_bundle

from casparian_flow.trust.policy import Code

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "trust.md").read_text()
TRUST = REPOSITORY / "operator" / "casparian_flow" / "trust"


def unbundled(folder: Path, data: bytes) -> str:
    """Run the page's script over a bundle; it leaves signed.bin and signature.bin behind."""
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (folder / "sales.casparian").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, "sales.casparian"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_bundle_can_be_verified_by_hand_as_the_page_says(tmp_path: Path) -> None:
    data = signed_bundle("x = 'abc'\n", "sales")
    assert "hash matches: True" in unbundled(tmp_path, data)
    signed, signature = ((tmp_path / f"{n}.bin").read_bytes() for n in ("signed", "signature"))
    KEY.public_key().verify(signature, signed)
    with pytest.raises(InvalidSignature):
        KEY.public_key().verify(signature, signed + b" ")
    assert "hash matches: False" in unbundled(tmp_path, data.replace(b"'abc'", b"'abd'"))


def test_the_page_explains_every_code_and_every_rule() -> None:
    assert set(re.findall(r"`([a-z_]+)`", PAGE)) >= set(Code)
    sources = "".join(path.read_text() for path in TRUST.glob("gatekeeper*.py"))
    used = set(re.findall(r'"(G\d{3})"', sources))
    listed = set(re.findall(r"^\| (G\d{3}.*?) \|", PAGE, re.M))
    explained: set[str] = set()
    for row in listed:
        numbers = [int(n) for n in re.findall(r"G(\d{3})", row)]
        between = range(numbers[0], numbers[-1] + 1) if "–" in row else numbers
        explained.update(f"G{n:03}" for n in between)
    assert used == explained
