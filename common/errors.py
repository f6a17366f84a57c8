"""The two ways in which a run ends early, each with one line for the person who started it."""


class InputError(ValueError):
    """A flag, a file or a combination of them is not usable; raised before any work starts (exit code 2)."""

    def __str__(self) -> str:
        """One line, whatever the names of files and of weights in it hold."""
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in super().__str__())


class Diverged(Exception):
    """A figure of an epoch is no finite number; what was good before is kept (exit code 1)."""


def reason(error: Exception) -> str:
    """Another library's error in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
