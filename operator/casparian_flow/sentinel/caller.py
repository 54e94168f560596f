"""Who asks over the control socket."""

import pwd
from dataclasses import dataclass

from casparian_flow.sentinel.admission import Principal


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asked, as far as the transport can tell."""

    transport: str
    uid: int | None = None
    pid: int | None = None
    principal: Principal | None = None
    """For whom its key stands, over a socket with CURVE."""

    @property
    def user(self) -> str | None:
        """The name of the user that the kernel vouches for; None if nobody does."""
        return None if self.uid is None else user_name(self.uid)

    def __str__(self) -> str:
        if self.principal is not None:
            return str(self.principal)
        return self.transport if self.uid is None else f"uid {self.uid} (pid {self.pid})"


def user_name(uid: int) -> str:
    """The name of a user of this machine; `uid N` for one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
