"""Several processes as one run, by JAX's multi-controller runtime.

Every process runs the same command; the environment says which of how many it is. Nothing but this
module asks the environment: everything else looks at `jax.process_index()`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from efae_jax.errors import RunError, UserError

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DETECT = "EFAE_DISTRIBUTED"
_MESSAGE_BYTES = 2048


def start(*, polls: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this run, if the environment tells of some; once, at first.

    Args:
      polls: whether the work asks `interrupts.Requests.after`, so that all processes stop at one
        place: JAX's preemption service then takes SIGTERM. Else it stops each where it is.
      environment: see below.

    | environment | processes |
    |---|---|
    | `JAX_COORDINATOR_ADDRESS=HOST:PORT`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID` | as they say |
    | a step of several tasks of Slurm | one per task, each with the GPU of its local number |
    | `EFAE_DISTRIBUTED=auto` | as JAX finds the cluster: TPU pods, Kubernetes, MPI |
    | none of these | this one alone |

    Must come before anything that asks JAX for devices.

    Raises:
      UserError: for variables that are missing or no numbers.
      RunError: when the others are not reached.
    """
    arguments = _found(environment)
    if arguments is None:
        return
    jax.config.update("jax_enable_preemption_service", polls)
    try:
        jax.distributed.initialize(**arguments)
    except (ValueError, RuntimeError) as error:
        where = arguments.get("coordinator_address", "the cluster")
        reason = " ".join(str(error).split())
        raise RunError(
            f"the processes of this run did not find each other at {where}: {reason}"
        ) from error


def _found(environment: Mapping[str, str]) -> dict | None:
    """The arguments of `jax.distributed.initialize`; None for a single process."""
    if DETECT in environment and environment[DETECT] not in ("auto", ""):
        raise UserError(f"{DETECT}={environment[DETECT]}: the only value is auto")
    given = [name for name in (COUNT, NUMBER) if name in environment]
    if given:
        missing = [name for name in (ADDRESS, COUNT, NUMBER) if name not in environment]
        if missing:
            raise UserError(
                f"{' and '.join(given)} without {' and '.join(missing)}; several processes take "
                f"{ADDRESS}=HOST:PORT, {COUNT} and {NUMBER}"
            )
        try:
            count, number = int(environment[COUNT]), int(environment[NUMBER])
        except ValueError as error:
            raise UserError(
                f"{COUNT}={environment[COUNT]}, {NUMBER}={environment[NUMBER]} must be numbers"
            ) from error
        if not 0 <= number < count:
            raise UserError(f"{NUMBER}={number} must be from 0 to {COUNT} - 1 = {count - 1}")
        if ":" not in environment[ADDRESS]:
            raise UserError(f"{ADDRESS}={environment[ADDRESS]} must be HOST:PORT")
        return {
            "coordinator_address": environment[ADDRESS],
            "num_processes": count,
            "process_id": number,
            "cluster_detection_method": "deactivate",
        }
    # An interactive shell inside an allocation has the tasks of the job, but is no step of it.
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if environment.get(DETECT) == "auto" or (tasks.isdigit() and int(tasks) > 1):
        return {}
    return None


def first_does(action: Callable[[], None]) -> None:
    """Has process 0 do something that the others wait for; its UserError becomes everyone's.

    Otherwise a work directory that cannot be written would end one process and leave the
    others waiting for it.
    """
    failure: UserError | None = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as error:
            failure = error
        except Exception as error:
            if jax.process_count() == 1:
                raise
            failure = RunError(f"{type(error).__name__}: {' '.join(str(error).split())}")
    if jax.process_count() > 1:
        text = b"" if failure is None else f"{failure.exit_code} {failure}".encode()
        code, _, message = _broadcast(text).decode("utf-8", "replace").partition(" ")
        if code and failure is None:
            failure = (RunError if code == str(RunError.exit_code) else UserError)(message)
    if failure is not None:
        raise failure


def first_decides(value: int) -> int:
    """Process 0's number, on every process."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _broadcast(text: bytes) -> bytes:
    padded = np.zeros(_MESSAGE_BYTES, np.uint8)
    text = text[:_MESSAGE_BYTES]
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).rstrip(b"\0")


def leave(code: int) -> NoReturn:
    """Ends this process.

    One of several leaves at once if something is wrong: the usual end waits for the others,
    which wait for this one.
    """
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    if several and code != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
