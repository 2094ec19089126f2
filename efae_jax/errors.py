"""The exceptions that a command prints as a single line, without a traceback."""


class UserError(Exception):
    """A mistake in the input: says what is wrong, where, and what is allowed.

    Commands print it as one line on standard error and exit with `exit_code`.
    """

    exit_code = 2


class RunError(UserError):
    """A run that cannot go on (a loss that is not finite, unreadable data)."""

    exit_code = 1


class Stopped(BaseException):
    """SIGTERM ended the work, as a scheduler's does; the same command goes on from there.

    No `Exception`, as KeyboardInterrupt: what catches errors must not catch it. The exit code is
    sysexits' EX_TEMPFAIL, by which a scheduler may know that the job should be queued again.
    """

    exit_code = 75
