"""How a command ends: one line for what went wrong, and an exit code that says what to do.

| code | |
|---|---|
| 0 | done |
| 1 | the work cannot go on: a loss that is not finite, unreadable data, a full disk |
| 2 | a mistake in the command |
| 75 | stopped by SIGTERM with everything saved; the same command goes on |
| 130 | stopped by Ctrl-C |
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Callable

from absl import logging

from efae_jax.errors import RunError, Stopped, UserError
from efae_jax.paths import printable

# What the runtime says when a connection to another process breaks.
_LOST = ("Gloo", "gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "onnection", "heartbeat", "NCCL")

# This module imports no JAX, so that a mistake in a command answers at once.


def ended_by(work: Callable[[], object], stopped: str) -> int:
    """Does the work; returns the exit code, after a line on standard error unless it is 0.

    Args:
      work: what the command does. SIGTERM raises `Stopped` in it.
      stopped: what a stop leaves, in words.
    """
    # Orbax logs with a traceback what it then raises, and warns of metadata that it can do without.
    logging.set_verbosity(logging.FATAL)
    before = signal.getsignal(signal.SIGTERM)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        raise_on_sigterm()
    try:
        work()
    except UserError as error:
        return _say(f"error: {error}", error.exit_code)
    except Stopped as error:
        code = _say(f"stopped by SIGTERM; {stopped}", error.exit_code)
        if error.agreed:
            _leave_together()
        return code
    except KeyboardInterrupt:
        return _say(f"stopped; {stopped}", 130)
    except OSError as error:
        if error.strerror is None:
            return _unexpected()
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"error: {where}{error.strerror}", RunError.exit_code)
    except RuntimeError as error:
        reason = _of_jax(error)
        if reason is None:
            return _unexpected()
        return _say(f"error: {reason}; {stopped}", RunError.exit_code)
    except Exception:
        return _unexpected()
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
    return 0


def leave(code: int) -> None:
    """Ends the process with an exit code."""
    if "jax" in sys.modules:
        from efae_jax import distributed

        distributed.leave(code)
    sys.exit(code)


def raise_on_sigterm() -> None:
    """Has SIGTERM raise `Stopped` from here on; JAX's preemption service takes it away."""
    signal.signal(signal.SIGTERM, _raise_stopped)


def _raise_stopped(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut off the end
    raise Stopped


def _unexpected() -> int:
    """Of several processes, a mistake of ours in one: the others wait for it, so that it leaves."""
    if not _which():
        raise sys.exception()  # type: ignore[misc]
    traceback.print_exc()
    return RunError.exit_code


def _leave_together() -> None:
    """Ends the runtime of several processes that all are here."""
    if _which():
        import jax

        jax.distributed.shutdown()


def _say(line: str, code: int) -> int:
    print(f"{_which()}{printable(line)}", file=sys.stderr, flush=True)
    return code


def _which() -> str:
    """Of several processes, which one speaks."""
    if "jax" in sys.modules:
        import jax

        if jax.distributed.is_initialized() and jax.process_count() > 1:
            return f"process {jax.process_index()} of {jax.process_count()}: "
    return ""


def _of_jax(error: RuntimeError) -> str | None:
    """What the runtime's error means to a user; None if it is of another kind."""
    import jax

    if not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    reason = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in reason:
        return (
            f"the device has too little memory ({reason[:200]}); lower the batch size, or in "
            "training set config.train.accumulate or config.train.remat"
        )
    if _which() and any(word in reason for word in _LOST):
        return f"another process of this run is gone ({reason[:200]})"
    return None
