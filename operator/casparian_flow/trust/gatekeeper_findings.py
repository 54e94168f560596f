"""What the Gatekeeper reports."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One breach of a rule. Findings sort by their place.

    Attributes:
        line, col: from 1, in characters; 0 where the whole file is meant.
        rule_id: such as "G101"; docs/trust.md lists them.
        message: what was found and what to do instead.
    """

    line: int
    col: int
    rule_id: str
    message: str

    def __str__(self) -> str:
        return f"{self.line}:{self.col} {self.rule_id} {self.message}"
