"""Small words of the messages people read."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where that is due.

    >>> counted(1, "job"), counted(1200, "new version")
    ('1 job', '1,200 new versions')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
