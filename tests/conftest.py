"""Eight simulated devices, and compiled programs kept from one run of the tests to the next."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Before JAX is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@contextlib.contextmanager
def first_device():
    """`train.train` takes all devices; here it gets the first, unless it is told which."""
    import jax

    from efae_jax import run

    def first(data, fsdp, devices=None):
        return whole(data, fsdp, devices or jax.devices()[:1])

    whole = run.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", first)
        yield


@pytest.fixture
def only_one_device():
    """`first_device` for a test."""
    with first_device():
        yield


@pytest.fixture
def runs(monkeypatch):
    """A list of the `Run` of every step that is taken."""
    from efae_jax.run import Run

    found, original = [], Run.step

    def recorded(self, *arguments):
        found.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(Run, "step", recorded)
    return found
