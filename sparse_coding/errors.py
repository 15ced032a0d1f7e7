"""The one exception for what a user can mend, and its one-line form on the terminal."""

import atexit
import errno
import hashlib
import io
import os
import re
import select
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

MAX_CHARACTERS = 4000
BAD_INPUT = 2
"""The exit status of programs whose arguments or files are wrong, as argparse has it."""
INTERRUPTED = 130
UNREAD = 141
"""Whoever read the output has gone, as after `| head`: what a shell says of SIGPIPE."""
SECONDS_TO_SAY_IT = 5.0
"""That a process leaves to the one that says what ended both; torchrun then ends it."""
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


class LostProcessError(UserError):
    """Another process is gone: said where nobody has said why."""


def report_user_errors_in_one_line() -> None:
    """Print an uncaught `UserError` as `error: ...` without a traceback; exit status 2, as of
    arguments that no parser takes. So does a full disk; Control-C is a line and status 130; output
    that nobody reads any more is status 141 and no line.
    Of several processes (torchrun) only the first is heard, but an error of any of them is said:
    once on every machine, by the process that meets it first."""
    terminal = sys.stderr
    atexit.register(_drop_what_is_unread)  # before Python flushes, and complains
    if int(os.environ.get("RANK", "0")) > 0:
        sys.stdout = _nowhere()
        sys.stderr = held = _Held()
        atexit.register(_say_what_is_held, held, terminal)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr = terminal
        if _is_said(error):
            sys.stderr = _nowhere()
            time.sleep(SECONDS_TO_SAY_IT)
        is_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        if issubclass(kind, UserError) or is_disk:
            error = UserError(str(error))
            print(f"error: {error}", file=sys.stderr)
            sys.exit(BAD_INPUT)
        if issubclass(kind, KeyboardInterrupt):
            print("stopped by SIGINT", file=sys.stderr)
            sys.exit(INTERRUPTED)
        if issubclass(kind, BrokenPipeError) and _drop_what_is_unread():
            sys.exit(UNREAD)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def _drop_what_is_unread() -> bool:
    """Send output that nobody reads any more nowhere; whether that was so."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)  # errors alone: with a reader there is nothing to say
        is_unread = bool(poll.poll(0))
    except (TypeError, OSError, ValueError):  # closed, or no file
        return False
    if is_unread:
        with _nowhere() as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
    return is_unread


def _nowhere() -> TextIO:
    return open(os.devnull, "w")  # until the process ends


class _Held(io.StringIO):
    """The stderr of a process that is not heard. A parser that refuses the arguments writes there
    and exits, which is no exception that a hook sees."""


def discard_what_is_held() -> None:
    """From here on all processes end together, and the first one says of what."""
    if isinstance(sys.stderr, _Held):
        sys.stderr = _nowhere()


def _say_what_is_held(held: _Held, terminal: TextIO) -> None:
    if sys.stderr is held and held.getvalue():
        time.sleep(SECONDS_TO_SAY_IT)
        if not _is_said(held.getvalue()):
            terminal.write(held.getvalue())


def _is_said(error: BaseException | str) -> bool:
    """Whether another process of this machine has said the same, but for the numbers in it; of a
    lost process, anything."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # attempt_0/LOCAL_RANK/error.json
    if not file:
        return False
    folder, is_lost = Path(file).parents[1], isinstance(error, LostProcessError)
    text = "" if is_lost else re.sub(r"\d+", "", f"{type(error)} {error}")
    fingerprint = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    try:
        if is_lost and any(folder.glob("said_*")):
            return True
        (folder / f"said_{fingerprint}").touch(exist_ok=False)
    except OSError as reason:  # torchrun is gone too, or its disk is full
        return isinstance(reason, FileExistsError)
    return False
