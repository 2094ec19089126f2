"""What a training run says of its data, and keeps: what it uses, and what it leaves out."""

from __future__ import annotations

import json
from collections.abc import Mapping

import jax
from etils import epath

from efae_jax.data.left_out import account, account_lines
from efae_jax.data.splits import Source
from efae_jax.logs import say

FILE = "data.json"


class DataRecord:
    """Of a run's two sources: {"train": account, "test": account}, of `data.left_out.account`.

    Args:
      workdir: gets the file.
      train, test: the sources.
      evaluated: how many images of `test` evaluations of the run look at.
    """

    def __init__(self, workdir: epath.Path, train: Source, test: Source, evaluated: int):
        self._path, self._train = workdir / FILE, train
        self._found = {"train": account(train, {}), "test": account(test, {}, evaluated)}

    def begin(self) -> None:
        """Says how many images there are, with a line per kind of what is left out; writes that."""
        train, test = self._found["train"], self._found["test"]
        # Either has a first line for itself. What lies beside both is said of both.
        kinds = dict.fromkeys([*account_lines(train)[1:], *account_lines(test)[1:]])
        say(
            f"data: {train['images']:,} images to train on, {test['images']:,} held out"
            + ("; left out, or of note:" if kinds else "")
        )
        for line in kinds:
            say(line)
        self._write()

    def finish(self, unreadable: Mapping[str, str]) -> None:
        """Says and writes what could not be read on the way as well.

        Args:
          unreadable: name of a training image -> why; of this process, since it was started.
        """
        if not unreadable:
            return
        known = account_lines(self._found["train"])
        self._found["train"] = account(self._train, unreadable)
        say("data: left out in training:")
        for line in account_lines(self._found["train"])[1:]:
            if line not in known:
                say(line)
        self._write()

    def _write(self) -> None:
        if jax.process_index() == 0:
            temporary = self._path.with_name(FILE + ".tmp")
            temporary.write_text(json.dumps(self._found, indent=2) + "\n")
            temporary.replace(self._path)
