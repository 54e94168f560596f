"""What the harness says when it cannot go on."""


class HarnessError(Exception):
    """A step failed; `hint` says what to install, look at or do next."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}\n{hint}")
        self.message = message
        self.hint = hint
