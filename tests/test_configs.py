"""Every variant builds, and every field of a config is read by something."""

from pathlib import Path

import jax
import pytest
from pair_files import planted, write_pairs

from configs import aura_equivae, disentangle, efae, eq_vae
from efae_jax import data, train, validation
from efae_jax.methods import complete_config
from efae_jax.optim import make_schedule
from efae_jax.run import Run, judge

MODULES = (efae, aura_equivae, eq_vae, disentangle)
ALL = [(module, variant) for module in MODULES for variant in module.VARIANTS]
SIZES = {"taesd4": (32, 32, 4), "kl16": (32, 32, 16), "glyphs": (8, 8, 32), "smoke": (8, 8, 4)}
NAMES = [f"{module.__name__.split('.')[-1]}:{variant}" for module, variant in ALL]
every_variant = pytest.mark.parametrize(("module", "variant"), ALL, ids=NAMES)


@every_variant
def test_every_variant_fits(module, variant):
    """Traces the training and evaluation steps at the variant's real sizes; compiles nothing."""
    config = module.get_config(variant)
    if module is disentangle:  # whose sizes are those of the data
        with config.unlocked():
            config.data.update(latent=SIZES[variant], text=512, image=512)
            config.model.semantic = config.model.semantic or 2
    Run(config, jax.devices()[:1])


def test_an_unknown_variant_lists_the_known():
    with pytest.raises(ValueError, match="quickstart, mnist, cifar10, folder256, rotation, smoke"):
        efae.get_config("imagenet")
    with pytest.raises(ValueError, match="f8c16, f8c16_first, later, small, smoke"):
        aura_equivae.get_config("imagenet")
    with pytest.raises(ValueError, match="taesd4, kl16, glyphs, smoke"):
        disentangle.get_config("imagenet")


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
    run = Run(spy, jax.devices()[:1])
    for split in ("train", "test"):
        source = data.make_source(spy.data, split)
    next(train.train_batches(spy, source, 0))
    if not hasattr(run.method, "disentangler"):
        next(validation.held_out_batches(source, spy, 4))
    judge(spy).Evaluator(run.method.product, spy, run.mesh)
    make_schedule(spy.optim, 3)


def of_efae(seen, _):
    for kind in ("dit", "unet"):
        config = efae.get_config("smoke")
        config.model.velocity.kind = kind
        read_by_a_run(config, seen)
    return config


def of_aura_equivae(seen, _):
    config = aura_equivae.get_config("smoke")
    config.loss.recipe, config.crop.rate = "custom", 0.5  # no published recipe has all fields
    read_by_a_run(config, seen)
    return config


def of_disentangle(seen, folder):
    _, *parts = planted(60)
    config = disentangle.get_config("smoke")
    config.data.path = str(write_pairs(folder, *parts))
    config = complete_config(config)
    read_by_a_run(config, seen)
    return config


@pytest.mark.parametrize("read", [of_efae, of_aura_equivae, of_disentangle])
def test_every_field_is_read(read, tmp_path):
    seen = set()
    config = read(seen, tmp_path)
    # Sources that need files on disk read these.
    for field in ("path", "data_dir", "train_split", "test_split", "test_fraction"):
        seen.add(f"data.{field}")
    # The loop and the commands read these.
    loop = {"log.every", "checkpoint.every", "checkpoint.keep", "eval.every", "eval.pictures"}
    loop |= {"init_from"}
    text = "".join(p.read_text() for p in Path(train.__file__).parent.glob("*.py"))
    for field in loop:
        assert f"config.{field}" in text
    # Read when a run starts with pretrained networks; written for the record, and compared.
    record = {"loss.perceptual_weights", "model.source", "model.stored", "data.identity"}
    assert set(leaves(config)) - seen - loop - record == set()
