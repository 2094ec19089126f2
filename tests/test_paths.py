"""Paths as users write them: `~`, file: URLs, and names of any bytes, for every option."""

import argparse
import os
from pathlib import Path

import pytest

import main as main_program
from efae_jax import __main__ as commands
from efae_jax.errors import UserError
from efae_jax.paths import printable, user_path, workdir_path


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", "/nowhere"),
        ("~/x/y", "/nowhere/x/y"),
        ("x/~/y", "x/~/y"),
        ("./~", "./~"),
        ("file:///a%20b/c", "/a b/c"),
        ("file://localhost/a", "/a"),
        ("file:///caf%E9", "/caf\udce9"),
        ("gs://bucket/~x", "gs://bucket/~x"),
        ("owner/name", "owner/name"),
        ("caf\udce9", "caf\udce9"),
        ("", ""),
    ],
)
def test_paths_as_users_write_them(written, meant):
    assert user_path(written) == meant


def test_paths_that_cannot_be():
    with pytest.raises(UserError, match="there is no user 'no-such-user'"):
        user_path("~no-such-user/x")
    with pytest.raises(UserError, match=r"file://host/x: files of another machine \(host\)"):
        user_path("file://host/x")


def test_a_file_that_is_called_so_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~no-such-user").touch()
    assert user_path("~no-such-user") == "~no-such-user"


def test_names_of_any_bytes_are_one_line():
    assert printable(os.fsdecode(b"caf\xe9\n\t\x1b[1m")) == "caf\\xe9\\n\\t\\x1b[1m"
    assert printable("naïve 猫") == "naïve 猫"


# What a value of an option is: a path is made by one of these.
PATH_TYPES = (commands._path, commands._local, commands._file)
# Options of text that are no paths, or in which a path is only a part: whoever reads them expands.
NO_PATHS = {
    *("model", "images", "data", "source", "workdir"),  # a hub id, SOURCE:PATH, an address
    *("split", "dtype", "format", "name", "frechet", "latent", "resampling", "act", "crop"),
    "protocol",
    *("clip", "text", "image", "padding", "variant", "mesh", "target", "jobs", "config", "key"),
}


def options():
    parser = commands._parser()
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command, sub in subparsers.choices.items():
        for action in sub._actions:
            if action.nargs != 0 and action.type not in (int, float):
                yield pytest.param(action, id=f"{command}-{action.dest}")


@pytest.mark.parametrize("action", list(options()))
def test_every_option_that_is_a_path_is_read_as_one(action):
    if action.type in PATH_TYPES:
        assert str(action.type("~/x")) == "/nowhere/x"
        with pytest.raises(argparse.ArgumentTypeError, match="there is no user"):
            action.type("~no-such-user/x")
        if action.type is not commands._file:
            with pytest.raises(argparse.ArgumentTypeError, match="give a (path|folder) of this"):
                action.type("https://x.y/z")
        else:
            assert action.type("https://x.y/z") == "https://x.y/z"
    else:
        assert action.type is None
        assert action.dest in NO_PATHS | {"data_dir"}


def test_work_directories_and_configs():
    assert str(workdir_path("~/runs")) == "/nowhere/runs"
    assert main_program._expanded("--config=~/c.py:smoke") == "--config=/nowhere/c.py:smoke"
    assert main_program._expanded("--config=configs/efae.py") == "--config=configs/efae.py"
    assert main_program._expanded("--config.data.path=~/x") == "--config.data.path=~/x"
