"""Trains, evaluates and encodes in this process, one of several if the environment says so.

python tests/run_processes.py FOLDER STAGE...

FOLDER/images are the images; what a stage writes goes into FOLDER/STAGE, and figures of the run
into FOLDER/train/eval.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

CUT = {"optim__schedule": "constant", "optim__warmup": 2}


def config():
    from tiny import tiny

    return tiny(**CUT, mesh__data=-1, log__every=1, eval__num_images=0)


def train(folder):
    from efae_jax import train

    train.train(config(), folder / "train")


def validate(folder):
    from efae_jax import validation

    validation.evaluate_workdir(folder / "train", config())


def resume(folder):
    """What is there goes on; the folder is another run's, without its last checkpoint."""
    from efae_jax import train

    train.train(config(), folder / "resume")


def evaluate(folder):
    """With a small stand-in for InceptionV3, which takes a minute to compile."""
    import numpy as np
    from corner_means import CornerMeans

    from efae_jax.errors import UserError
    from efae_jax.evaluation import Settings, evaluate, networks

    def nothing(kind, path):
        raise UserError("not needed here")

    networks.read_lpips = nothing
    networks.FrechetFeatures = CornerMeans
    networks.read_inception = lambda source: {"weight": np.float32(0.1)}
    (folder / "weights.pth").touch()
    evaluate(
        str(folder / "train"),
        folder / "evaluate",
        settings=Settings(batch_size=8, pictures=2, inception=str(folder / "weights.pth")),
        data=str(folder / "images"),
    )


def encode(folder):
    from efae_jax.encode import encode_source
    from efae_jax.extract import Settings

    encode_source(
        str(folder / "train"),
        folder / "encode",
        settings=Settings(format="npz", shards=3),
        data=str(folder / "images"),
    )


STAGES = {f.__name__: f for f in (train, validate, resume, evaluate, encode)}


def main():
    from efae_jax import distributed

    distributed.start(polls=True)
    for stage in sys.argv[2:]:
        STAGES[stage](Path(sys.argv[1]))


if __name__ == "__main__":
    from efae_jax.exits import ended_by, leave

    leave(ended_by(main, "the same command goes on"))
