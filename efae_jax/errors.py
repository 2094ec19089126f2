"""The exceptions that a command prints as a single line, without a traceback."""

import ast


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

    Args:
      agreed: whether every process of the run stops at this same place.
    """

    exit_code = 75

    def __init__(self, agreed: bool = False):
        super().__init__()
        self.agreed = agreed


def config_mistake(error: Exception) -> str:
    """One line of what reading a config raised: a field, a value, or a file that is not there.

    Without what a nested traceback or a KeyError's quotes add.
    """
    text = str(error.args[0]) if error.args else str(error)
    if "Traceback" in text:  # a config file that raised: its last line is the message
        text = text.strip().splitlines()[-1].removeprefix("ValueError: ")
    if isinstance(error, AttributeError | KeyError):
        if text.startswith(("'", '"')):  # a KeyError's text, quoted once more
            text = ast.literal_eval(text)
        return f"the config has no field {' '.join(text.split())}"
    return " ".join(text.split())
