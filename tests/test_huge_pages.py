"""The advice on huge pages comes where it helps, and nowhere else."""

import os

import pytest

from efae_jax import huge_pages


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine as the test describes it."""

    def make(kernel="always [madvise] never\n", libc="glibc 2.36", tunables=None, backend="cpu"):
        file = tmp_path / "enabled"
        if kernel is not None:
            file.write_text(kernel)
        monkeypatch.setattr(huge_pages, "_KERNEL", file)
        monkeypatch.setattr(os, "confstr", lambda name: libc)
        monkeypatch.setattr(huge_pages.jax, "default_backend", lambda: backend)
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        if tunables is not None:
            monkeypatch.setenv("GLIBC_TUNABLES", tunables)

    return make


@pytest.mark.parametrize("tunables", [None, "glibc.malloc.trim_threshold=128"])
def test_it_is_given_where_the_kernel_waits_to_be_asked(machine, tunables):
    machine(tunables=tunables)
    assert huge_pages.SETTING in huge_pages.advice()


@pytest.mark.parametrize(
    "other",
    [
        {"kernel": "[always] madvise never\n"},
        {"kernel": "always madvise [never]\n"},
        {"kernel": None},
        {"libc": "glibc 2.34"},
        {"libc": "musl 1.2"},
        {"libc": None},
        {"tunables": "glibc.malloc.hugetlb=1"},
        {"tunables": "glibc.malloc.check=0:glibc.malloc.hugetlb=2"},
        {"backend": "gpu"},
    ],
)
def test_it_is_not_given_elsewhere(machine, other):
    machine(**other)
    assert huge_pages.advice() is None
