"""The one exception for what a user can mend, and its one-line form on the terminal."""

import sys
from types import TracebackType


class UserError(ValueError):
    """Bad input: says what was given, what is allowed and what to do, in one line."""


def report_user_errors_in_one_line() -> None:
    """Print an uncaught `UserError` as `error: ...` without a traceback (exit status 1)."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
