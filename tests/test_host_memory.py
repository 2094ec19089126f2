"""Scratch memory of programs for CPUs is kept from call to call."""

import platform
import subprocess
import sys
from typing import ClassVar

import pytest

from efae_jax import host_memory

# Page faults (of 4 KiB) per call of a program whose scratch memory is 64 MB and more.
PROGRAM = """
import resource
from efae_jax.host_memory import keep_scratch_memory
print(keep_scratch_memory())
import jax, jax.numpy as jnp

@jax.jit
def program(x):
    y = x[:, None] @ x[None]  # 4096 x 4096
    return (y @ x[:, None])[:, 0] / jnp.abs(y).sum()

x = jnp.ones(4096)
for _ in range(50):  # the heap grows a few times
    x = jax.block_until_ready(program(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):  # and perhaps once more
    x = jax.block_until_ready(program(x))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50)
"""


def faults(**environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", **environment},
    )
    assert done.returncode == 0, done.stderr
    kept, count = done.stdout.split()
    return kept == "True", float(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_calls_fetch_no_memory_anew():
    kept, before = faults(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert not kept
    if before < 1000:
        pytest.skip("pages are huge here, or not counted")
    kept, count = faults()
    assert kept
    assert before > 10 * count


def test_what_the_user_says_of_malloc_stays(monkeypatch):
    def forbidden(*_):
        raise AssertionError("malloc was changed")

    monkeypatch.setattr(host_memory.ctypes, "CDLL", forbidden)
    cpu = {"JAX_PLATFORMS": "cpu"}
    assert not host_memory.keep_scratch_memory({"GLIBC_TUNABLES": "glibc.malloc.check=0", **cpu})
    with pytest.raises(AssertionError, match="changed"):
        host_memory.keep_scratch_memory({"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=on", **cpu})


@pytest.mark.parametrize("platforms", ["cuda", "tpu,cpu", "rocm"])
def test_other_devices_work_in_memory_of_their_own(platforms):
    assert not host_memory.keep_scratch_memory({"JAX_PLATFORMS": platforms})


@pytest.mark.parametrize(
    ("spec", "entry", "cpus"),
    [(None, [], True), ("jax_plugins", [], False), ("libtpu", [], False), (None, ["cuda"], False)],
)
def test_what_is_installed_tells_whether_there_can_be_other_devices(monkeypatch, spec, entry, cpus):
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: name == spec or None)
    monkeypatch.setattr(host_memory, "entry_points", lambda group: entry)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: Recorder)
    Recorder.settings.clear()
    assert host_memory.keep_scratch_memory({}) is cpus
    assert len(Recorder.settings) == (3 if cpus else 0)


class Recorder:
    """A C library that writes down what is asked of malloc."""

    settings: ClassVar[list] = []

    @classmethod
    def mallopt(cls, *setting):
        cls.settings.append(setting)
        return 1
