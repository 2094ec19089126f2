"""SIGTERM and Ctrl-C while training or evaluating: what is under way is finished and saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from efae_jax.errors import Stopped
from efae_jax.logs import say


class Requests:
    """Whether somebody asked the run to stop after the step that is under way."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def note(self, number: int, _: FrameType | None) -> None:
        """A signal's handler: the first is remembered; a second Ctrl-C is at once."""
        if number == signal.SIGINT:
            if self.signal == signal.SIGINT:
                raise KeyboardInterrupt
            say("stopping when what is under way is saved; Ctrl-C again: at once, without")
        self.signal = number

    def after(self, step: int) -> bool:
        """Whether to save and stop after this step; the same on every process.

        Of several processes, one may be told first: JAX's preemption service then agrees with
        the others on a step that none of them has passed. It must hear of every step.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def reason(self) -> BaseException:
        """What to raise once everything is saved."""
        return KeyboardInterrupt() if self.signal == signal.SIGINT else Stopped(agreed=True)


@contextlib.contextmanager
def deferred() -> Iterator[Requests]:
    """Within, SIGTERM and Ctrl-C wait until the work asks `Requests.after`.

    Of several processes, each has its SIGTERM caught by JAX's preemption service, and Ctrl-C is
    what it always is. Threads other than the first have no signals.
    """
    requests = Requests()
    several = jax.process_count() > 1
    if several or threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {n: signal.signal(n, requests.note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
