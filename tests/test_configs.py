"""Every variant builds, and every field of a config is read by something."""

import jax
import pytest

from configs import aura_equivae, efae, eq_vae
from efae_jax import data, train, validation
from efae_jax.optim import make_schedule

ALL = [(module, variant) for module in (efae, aura_equivae, eq_vae) for variant in module.VARIANTS]
NAMES = [f"{module.__name__.split('.')[-1]}:{variant}" for module, variant in ALL]
every_variant = pytest.mark.parametrize(("module", "variant"), ALL, ids=NAMES)


@every_variant
def test_every_variant_fits(module, variant):
    """Traces the training and evaluation steps at the variant's real sizes; compiles nothing."""
    train.Run(module.get_config(variant), jax.devices()[:1])


def test_an_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match="quickstart, mnist, cifar10, folder256, rotation, smoke"):
        efae.get_config("imagenet")
    with pytest.raises(ValueError, match="f8c16, later, small, smoke"):
        aura_equivae.get_config("imagenet")


@every_variant
def test_a_locked_config_refuses_new_fields(module, variant):
    with pytest.raises((AttributeError, KeyError)):
        module.get_config(variant).train.batchsize = 3


class Spy:
    """A config that notes which of its fields are read."""

    def __init__(self, config, seen, path=""):
        self.__dict__.update(_config=config, _seen=seen, _path=path)

    def __getattr__(self, name):
        value = getattr(self._config, name)
        path = f"{self._path}{name}"
        if hasattr(value, "to_json_best_effort"):
            return Spy(value, self._seen, path + ".")
        self._seen.add(path)
        return value

    def __getitem__(self, name):
        return getattr(self, name)


def leaves(config, path=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name


def read_by_a_run(config, seen):
    spy = Spy(config, seen)
    run = train.Run(spy, jax.devices()[:1])
    for split in ("train", "test"):
        source = data.make_source(spy.data, split)
    next(train.train_batches(spy, source, 0))
    next(validation.held_out_batches(source, spy, 4))
    validation.Evaluator(run.method.autoencoder, spy, run.mesh)
    make_schedule(spy.optim, 3)


def of_efae(seen):
    for kind in ("dit", "unet"):
        config = efae.get_config("smoke")
        config.model.velocity.kind = kind
        read_by_a_run(config, seen)
    return config


def of_aura_equivae(seen):
    config = aura_equivae.get_config("smoke")
    read_by_a_run(config, seen)
    return config


@pytest.mark.parametrize("read", [of_efae, of_aura_equivae])
def test_every_field_is_read(read):
    seen = set()
    config = read(seen)
    # Sources that need files on disk read these.
    for field in ("path", "data_dir", "train_split", "test_split", "test_fraction"):
        seen.add(f"data.{field}")
    # The loop and the commands read these.
    loop = {"log.every", "checkpoint.every", "checkpoint.keep", "eval.every", "eval.pictures"}
    loop |= {"init_from"}
    text = "".join(p.read_text() for p in (train.Path(train.__file__).parent).glob("*.py"))
    for field in loop:
        assert f"config.{field}" in text
    # Read when a run starts with pretrained networks; written by an import, for the record.
    record = {"loss.perceptual_weights", "model.source", "model.stored"}
    assert set(leaves(config)) - seen - loop - record == set()
