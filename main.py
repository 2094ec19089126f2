"""Trains the config that is given, resuming what the work directory holds, then evaluates.

python main.py --config=configs/efae.py:quickstart --workdir=runs/quickstart
python main.py --config=configs/efae.py:mnist --workdir=runs/mnist --config.train.batch_size=256
python main.py --config=... --workdir=... --mode=eval
"""

from __future__ import annotations

import sys

from absl import app, flags
from ml_collections import config_flags

from efae_jax.errors import UserError, config_mistake
from efae_jax.exits import ended_by, leave, raise_on_sigterm
from efae_jax.host_memory import keep_scratch_memory
from efae_jax.paths import user_path

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, and :variant.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "train: then evaluate; eval: only.")


def parse(argv: list[str]) -> None:
    """Parses the flags; any mistake in them is one line."""
    app.define_help_flags()
    argv = [_expanded(word) for word in argv]
    try:
        rest = flags.FLAGS(argv)
        if CONFIG.value is not None:
            CONFIG.value.to_dict()  # a file that is not there is noticed at the first access
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(config_mistake(error)) from error
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are --config, --workdir, --mode")
    for flag in (CONFIG, WORKDIR):
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing; see README.md for the commands")


def _expanded(word: str) -> str:
    """`--config=~/mine.py:variant` with the home folder, which shells leave as it is there."""
    start, equals, path = word.partition("=")
    if start in ("--config", "-config") and equals:
        return start + equals + user_path(path)
    return word


def main() -> None:
    """Trains if asked to, and evaluates."""
    # JAX is imported after the flags are known to be right: a mistake answers at once.
    from efae_jax import distributed, train
    from efae_jax.run import judge

    distributed.start(polls=MODE.value == "train")
    if MODE.value == "train":
        train.train(CONFIG.value, WORKDIR.value)
        raise_on_sigterm()
    judge(CONFIG.value).evaluate_workdir(WORKDIR.value, CONFIG.value)


def run() -> None:
    """Runs, and ends with an exit code of `efae_jax.exits`."""
    stopped = "the same command goes on from the last checkpoint, if there is one"
    leave(ended_by(lambda: (parse(sys.argv), main()), stopped))


if __name__ == "__main__":
    keep_scratch_memory()
    run()
