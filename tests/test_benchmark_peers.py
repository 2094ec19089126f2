"""The peers compute what this package computes: the same outputs with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from efae_jax.benchmark.jobs import Options, _kl_training_config, make_setting  # noqa: E402
from efae_jax.benchmark.peers import dit, runtime  # noqa: E402
from efae_jax.benchmark.sizes import SMALL, DiTSizes  # noqa: E402
from efae_jax.benchmark.training import dit_batch, dit_net, random_batch  # noqa: E402


def randomised(params, key, size=0.05):
    """No zeros or ones left: those of a fresh network hide what is behind them."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    leaves = [v + size * jax.random.normal(k, v.shape) for v, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


@pytest.mark.parametrize(
    "sizes",
    [SMALL.dit, DiTSizes(16, 4, 32, 2, 2, 3, 8), DiTSizes(16, 8, 32, 1, 4, 3, 4)],
    ids=["a cell each", "latent coarser", "latent finer"],
)
def test_dit(sizes):
    net, batch = dit_net(sizes, jnp.float32), dit_batch(sizes, 2)
    params = randomised(jax.jit(net.init)(jax.random.key(0)), jax.random.key(1), 0.3)
    peer = dit.DiT(sizes).to(runtime.device())
    runtime.copy_parameters(peer, params)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(p.numel() for p in peer.parameters()) == count
    t = np.float32([0.2, 0.9])
    ours = jax.jit(net.__call__)(params, batch["x"], t, batch["z"])
    with torch.no_grad():
        theirs = peer(
            runtime.images(batch["x"]),
            torch.from_numpy(t).to(runtime.device()),
            runtime.images(batch["z"]),
        )
    theirs = theirs.permute(0, 2, 3, 1).cpu().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_parameters_that_do_not_fit_are_named():
    net = dit_net(SMALL.dit, jnp.float32)
    params = jax.jit(net.init)(jax.random.key(0))
    with pytest.raises(ValueError, match="head"):
        runtime.copy_parameters(
            dit.DiT(SMALL.dit), {k: v for k, v in params.items() if k != "head"}
        )


def test_kl_training_step():
    """Both losses of a step, its weight of the GAN, and what the step makes of the weights."""
    pytest.importorskip("diffusers")
    from efae_jax.benchmark.peers.kl_training import Trainer
    from efae_jax.methods.eq_vae import EQVAE
    from efae_jax.optim import make_optimizer
    from efae_jax.state import init_state, make_train_step

    config = _kl_training_config(make_setting(Options(small=True, dtype="float32")), "none")
    with config.unlocked():
        config.data.size = (24, 24)
    method = EQVAE(config)
    optimizers = {
        "autoencoder": make_optimizer(config.optim, 10),
        "discriminator": make_optimizer(config.optim_discriminator, 10),
    }
    state = jax.jit(lambda k: init_state(method, optimizers, k))(jax.random.key(0))
    state["params"] = randomised(state["params"], jax.random.key(1))
    batch = random_batch(config)
    plan = method.plan(0)
    step = make_train_step(method, optimizers, seed=0, ema_decay=0.9, accumulate=1)
    after, metrics = jax.jit(step, static_argnums=3)(state, batch, {}, plan)

    trainer = Trainer(config, state["params"]["autoencoder"], "float32", compiled=False)
    runtime.copy_parameters(trainer.discriminator, state["params"]["discriminator"])
    count = sum(leaf.size for leaf in jax.tree.leaves(state["params"]["autoencoder"]))
    assert sum(p.numel() for p in trainer.parameters) == count
    # The posterior's noise as the method draws it.
    keys_B = jax.random.split(
        jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0), len(batch["image"])
    )
    sample_keys = jax.vmap(lambda k: jax.random.split(k, 2), out_axes=1)(keys_B)[0]
    side = config.data.size[0] // method.autoencoder.factor
    shape = (side, side, config.model.latent_channels)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(sample_keys)
    x = runtime.images(np.float32(batch["image"]) / 127.5 - 1)
    found = {k: float(v) for k, v in trainer.step(x, runtime.images(noise)).items()}
    for name, ours in (
        ("nll", "autoencoder/nll"),
        ("kl", "autoencoder/kl"),
        ("gan", "autoencoder/gan"),
        ("weight", "autoencoder/weight"),
        ("judged", "discriminator/loss"),
    ):
        np.testing.assert_allclose(found[name], metrics[ours], rtol=1e-3, err_msg=name)
    kernel = trainer.last.weight.detach().permute(2, 3, 1, 0).cpu().numpy()
    ours = after["params"]["autoencoder"]["decoder"]["conv_out"]["kernel"]
    before = state["params"]["autoencoder"]["decoder"]["conv_out"]["kernel"]
    # Adam's first step is the sign of the gradient times the rate, where that is not tiny.
    same = np.sign(ours - before) == np.sign(kernel - np.asarray(before))
    assert same.mean() > 0.99
