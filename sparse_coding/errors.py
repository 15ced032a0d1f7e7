"""The one exception for what a user can mend, and its one-line form on the terminal."""

import errno
import os
import re
import sys
from types import TracebackType

MAX_CHARACTERS = 4000
BAD_INPUT = 2
"""The exit status of programs whose arguments or files are wrong, as argparse has it."""
INTERRUPTED = 130
DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
}  # fmt: skip
"""A disk that is full, broken or not ours: never a mistake of a program."""


# A password in an address, what follows a header's Bearer, and keys by the look of them.
_SECRETS = re.compile(
    r"(?<=://)[^\s/@]+(?=@)|(?<=Bearer )[^\s'\"]+|\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}"
)


def without_secrets(text: str) -> str:
    """The text with *** for what would let its reader log in somewhere."""
    return _SECRETS.sub("***", text)


class UserError(ValueError):
    """Bad input: says what was given, what is allowed and what to do, in one line.

    What it quotes may come from a stranger's file: line breaks become spaces, what a terminal
    would act upon is spelt out, what is too long is cut, and secrets are left out.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message[:MAX_CHARACTERS].split())
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        super().__init__(without_secrets(line))


def report_user_errors_in_one_line() -> None:
    """Print an uncaught `UserError` as `error: ...` without a traceback; exit status 2, as of
    arguments that no parser takes. So does a full disk; Control-C is a line and status 130.
    Of several processes (torchrun) only the first is heard."""
    if int(os.environ.get("RANK", "0")) > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        is_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        if issubclass(kind, UserError) or is_disk:
            error = UserError(str(error))
            print(f"error: {error}", file=sys.stderr)
            sys.exit(BAD_INPUT)
        if issubclass(kind, KeyboardInterrupt):
            print("stopped by SIGINT", file=sys.stderr)
            sys.exit(INTERRUPTED)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
