"""A config so small that its programs compile in seconds; shared by the tests that train."""

from configs.efae import get_config


def tiny(**overrides):
    """`smoke` made smaller still; `tiny(train__steps=3)` sets config.train.steps."""
    config = get_config("smoke")
    with config.unlocked():
        config.data.size = (8, 8)
        config.data.num_train = 96
        config.data.num_test = 21
        config.data.num_threads = 1
        config.model.encoder.widths = (8,)
        config.model.velocity.width = 16
        config.train.batch_size = 8
        config.train.steps = 6
        config.log.every = 2
        config.checkpoint.every = 3
        config.eval.batch_size = 8
        config.eval.pictures = 2
        config.mesh.data = 1
        for name, value in overrides.items():
            field = config
            *parents, last = name.split("__")
            for parent in parents:
                field = field[parent]
            if last not in field:
                raise KeyError(name)
            field[last] = value
    return config
