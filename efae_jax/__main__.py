"""Commands on trained models.

python -m efae_jax evaluate WORKDIR
python -m efae_jax export WORKDIR OUT --format efae
python -m efae_jax import SOURCE WORKDIR --format efae
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from efae_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake is one line on standard error and exit code 2."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # orbax announces on every restore that it was given no shardings on purpose, and more.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m efae_jax", description="Work on trained models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    c = commands.add_parser("evaluate", help="figures and pictures of a trained model")
    c.add_argument("workdir", type=Path)
    c.add_argument("--step", type=int, help="of the checkpoint; the newest unless given")
    c.set_defaults(run=_evaluate)

    c = commands.add_parser("export", help="write a model's weights for PyTorch")
    c.add_argument("workdir", type=Path)
    c.add_argument("out", type=Path, help="a .safetensors file; a .json is written beside it")
    c.add_argument("--format", default="efae", help="efae: the original EFAE's names")
    c.set_defaults(run=_export)

    c = commands.add_parser("import", help="make a work directory from PyTorch weights")
    c.add_argument("source", type=Path, help="a safetensors or npz file")
    c.add_argument("workdir", type=Path)
    c.add_argument("--format", default="efae", help="efae: the original EFAE's names")
    c.add_argument("--heads", type=int, help="attention heads, where no .json lies beside it")
    c.set_defaults(run=_import)
    return parser


def _evaluate(args: argparse.Namespace) -> None:
    from efae_jax.api import config_of
    from efae_jax.evaluate import evaluate_workdir

    evaluate_workdir(args.workdir, config_of(args.workdir), step=args.step)


def _export(args: argparse.Namespace) -> None:
    import jax

    from efae_jax.api import load
    from efae_jax.convert import get_format

    form = get_format(args.format)
    model = load(args.workdir)
    form.export(jax.device_get(model.params), form.architecture(model.config), args.out)
    print(f"wrote {args.out} and {args.out.with_suffix('.json')}")


def _import(args: argparse.Namespace) -> None:
    from efae_jax.checkpoint import save_model
    from efae_jax.convert import get_format

    form = get_format(args.format)
    if args.workdir.exists():
        raise UserError(f"{args.workdir} is there already; give a new directory")
    architecture, params = form.load(args.source, args.heads)
    config = form.config(architecture)
    save_model(args.workdir, {"autoencoder": params}, json.loads(config.to_json_best_effort()))
    print(f"wrote {args.workdir}; efae_jax.load({str(args.workdir)!r}) gives the model")


if __name__ == "__main__":
    sys.exit(main())
