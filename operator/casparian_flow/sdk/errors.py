"""How a plugin says whether trying again can help.

Any other exception is retried a few times with growing delays, then becomes a dead letter.
"""


class PluginError(Exception):
    """Base of the two below."""

    transient: bool | None = None


class TransientError(PluginError):
    """It may work later: the job is retried, with growing delays."""

    transient = True


class PermanentError(PluginError):
    """It can never work on these bytes: the job becomes a dead letter at once."""

    transient = False
