"""Scratch memory of programs for CPUs is kept from call to call."""

import subprocess
import sys
from pathlib import Path

import pytest

from efae_jax import host_memory

# Where the kernel gives huge pages to everybody, there are few faults either way.
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
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
for _ in range(5):
    x = jax.block_until_ready(program(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    x = jax.block_until_ready(program(x))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
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


def test_calls_fetch_no_memory_anew():
    kept, count = faults()
    if not kept:
        pytest.skip("another C library than glibc")
    assert count < 200
    kept, before = faults(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert not kept
    assert before > 10 * count or "[always]" in HUGE_PAGES.read_text()


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
