"""Losses of autoencoders trained with perceptual and adversarial terms.

Every loss gives one value per example, [B]; the caller takes the mean. The
formulas are those of the `vqgan-training` program that AuraEquiVAE was trained
with, unless a docstring names another source.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

GRADIENT_EPS = 1e-8
ADAPTIVE_EPS, ADAPTIVE_LIMIT = 1e-4, 1e4
POOL = 16
HEATMAP_FLOOR = 0.8
THRESHOLD = 0.1
QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)

_BLUR_RADIUS, _BLUR_SIGMA = 6, 2.0


def normalise_gradient(x: Array, kind: str, weight: Float[Array, ""] | float = 1.0) -> Array:
    """x itself; the gradient g that comes back through it is normalised, then weighted.

        elementwise:  weight * g[b,i] / (sqrt(sum_b g[b,i]^2) + 1e-8)
        global:       weight * g[b,i] / (sqrt(sum_bi g[b,i]^2) + 1e-8)

    Put between a reconstruction and each of its losses, it makes the losses pull with the
    strengths of their weights, whatever their own scales. The total norm is `weight` with
    "global", and with "elementwise" up to sqrt(number of elements of an example) times that.
    With a single example "elementwise" is the sign of g.

    Inside `jax.jit` the batch is the global batch, however it is sharded: the result does
    not depend on the number of devices. Under gradient accumulation it is each part, which is
    how a recipe keeps the size of the batch that it normalises over. The original program
    normalises by the norm of each process's own batch (the later one averages these norms over
    processes). It calls encoder and decoder past its wrapper for data-parallel training, so that
    their gradients are never averaged over processes: each trains a copy of its own on its own
    batches, and the first one's is saved. Where the gradients of a batch's examples agree, an
    element's norm grows like the square root of their number, and so does its pull beside terms
    that are not normalised.

    1e-8 is the original's: it leaves a gradient of zeros zero and does not amplify what
    rounding leaves of one. It is meant for losses that are means over the batch and over
    pixels, whose norms are some 1e-6 for an element of a 256 x 256 image.
    Norms are computed in float32; the gradient keeps x's dtype.

    Args:
      x: [B, ...].
      kind: "elementwise" (the released AuraEquiVAE) or "global" (the later program).
      weight: a number or a traced scalar; it receives no gradient.

    Raises:
      ValueError: another kind.
    """
    if kind not in ("elementwise", "global"):
        raise ValueError(
            f"gradient normalisation {kind!r} does not exist; allowed: elementwise, global"
        )
    return _normalise_gradient(kind, x, jnp.asarray(weight, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise_gradient(kind: str, x: Array, weight: Array) -> Array:
    del kind, weight
    return x


def _forward(kind: str, x: Array, weight: Array) -> tuple[Array, Array]:
    del kind
    return x, weight


def _backward(kind: str, weight: Array, gradient: Array) -> tuple[Array, Array]:
    g = gradient.astype(jnp.float32)
    axes = 0 if kind == "elementwise" else None
    norm = jnp.sqrt(jnp.sum(jnp.square(g), axis=axes, keepdims=True))
    normalised = weight * g / (norm + GRADIENT_EPS)
    return normalised.astype(gradient.dtype), jnp.zeros_like(weight)


_normalise_gradient.defvjp(_forward, _backward)


def carry_gradient(x: Float[Array, "B ..."], gradient: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """Zeros, [B], through which x receives `gradient` (per example of the value's own).

    It puts a gradient that is known already, such as one that was weighted by its norm, into
    a loss: grad of mean(carry_gradient(x, B g)) is g.
    """
    inner = jnp.sum(x * jax.lax.stop_gradient(gradient), axis=tuple(range(1, x.ndim)))
    return inner - jax.lax.stop_gradient(inner)


def gaussian_nll(
    error_B: Float[Array, " B"], log_variance: Float[Array, ""] | float, count: int
) -> Float[Array, " B"]:
    """error / exp(log_variance) + count * log_variance: latent-diffusion's "nll".

    Args:
      error_B: of every example, summed over its `count` numbers.
      log_variance: of the decoder's output, one for all numbers.
      count: numbers in an example.
    """
    return error_B * jnp.exp(-log_variance) + count * log_variance


def adaptive_weight(
    reconstruction: Float[Array, ...], adversarial: Float[Array, ...]
) -> Float[Array, ""]:
    """clamp(|reconstruction| / (|adversarial| + 1e-4), 0, 1e4), norms of two gradients.

    The weight of VQGAN (Esser et al. 2021, arXiv:2012.09841, eq. 7) with which an adversarial
    loss pulls as hard as the reconstruction loss, at the parameters of the decoder's last
    layer. It is a constant to the losses.
    """
    norms = [jnp.linalg.norm(g.astype(jnp.float32)) for g in (reconstruction, adversarial)]
    weight = norms[0] / (norms[1] + ADAPTIVE_EPS)
    return jax.lax.stop_gradient(jnp.clip(weight, 0, ADAPTIVE_LIMIT))


def pooled_l1(
    target_BHWC: Float[Array, "B H W C"], x_BHWC: Float[Array, "B H W C"]
) -> Float[Array, " B"]:
    """mean |pool(target) - pool(x)|, pool = the mean over blocks of 16 x 16 pixels.

    Raises:
      ValueError: sides that 16 does not divide.
    """
    difference = target_BHWC.astype(jnp.float32) - x_BHWC.astype(jnp.float32)
    B, H, W, C = difference.shape
    if H % POOL or W % POOL:
        raise ValueError(f"pooled L1 of {H}x{W} pixels: each side must be a multiple of {POOL}")
    blocks = difference.reshape(B, H // POOL, POOL, W // POOL, POOL, C)
    return _mean(jnp.abs(blocks.mean(axis=(2, 4))))


def heatmap_l1(
    target_BHWC: Float[Array, "B H W C"], x_BHWC: Float[Array, "B H W C"]
) -> Float[Array, " B"]:
    """mean m |target - x|, m = `blurriness_heatmap` of the target, without gradient."""
    heat = jax.lax.stop_gradient(blurriness_heatmap(target_BHWC))
    difference = target_BHWC.astype(jnp.float32) - x_BHWC.astype(jnp.float32)
    return _mean(heat * jnp.abs(difference))


def blurriness_heatmap(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W 1"]:
    """Where images are smooth: 0, or a value from 0.8 to 1 (the smoothest place).

    The mean over channels is filtered by a 5x5 Laplacian (centre -20, corners 0, all
    others 1; zeros outside); its absolute value is blurred by a 13x13 Gaussian of sigma 2
    (mirrored outside) and scaled to [0, 1] by the minimum and maximum of the whole batch;
    the map is one minus that, and 0 where this is below 0.8.

    Raises:
      ValueError: sides below 7, which have too little to mirror.
    """
    H, W = x_BHWC.shape[1:3]
    if min(H, W) <= _BLUR_RADIUS:
        raise ValueError(f"heat map of {H}x{W} pixels: sides must be at least {_BLUR_RADIUS + 1}")
    laplacian = np.ones((5, 5), np.float32)
    laplacian[::4, ::4], laplacian[2, 2] = 0, -20
    offsets = np.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    gaussian = np.exp(-np.square(offsets) / (2 * _BLUR_SIGMA**2)).astype(np.float32)
    gaussian /= gaussian.sum()

    grey_BHW1 = x_BHWC.astype(jnp.float32).mean(axis=-1, keepdims=True)
    edges = jnp.abs(_filter(grey_BHW1, laplacian, 2))
    mirror = [(0, 0), (_BLUR_RADIUS, _BLUR_RADIUS), (_BLUR_RADIUS, _BLUR_RADIUS), (0, 0)]
    edges = jnp.pad(edges, mirror, mode="reflect")
    edges = _filter(_filter(edges, gaussian[:, None], 0), gaussian[None, :], 0)
    low, high = edges.min(), edges.max()
    # A batch without any edge is smooth everywhere.
    heat = 1 - (edges - low) / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)
    return jnp.where(heat < HEATMAP_FLOOR, 0, heat)


def latent_penalty(z: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """mean z^2."""
    return _mean(jnp.square(z.astype(jnp.float32)))


def discriminator_loss(
    real: Float[Array, "B ..."], fake: Float[Array, "B ..."], kind: str, *, halved: bool
) -> Float[Array, " B"]:
    """What the discriminator minimises, from its logits D(x) of images and D(x') of decodings.

        bce:    mean log(1 + exp(-D(x))) + mean log(1 + exp(D(x')))
        hinge:  mean max(0, 1 - D(x))    + mean max(0, 1 + D(x'))

    Args:
      kind: "bce" or "hinge".
      halved: multiply by 1/2, as the later program does; the released model's does not.

    Raises:
      ValueError: another kind.
    """
    real, fake = real.astype(jnp.float32), fake.astype(jnp.float32)
    if kind == "bce":
        loss = _mean(jax.nn.softplus(-real)) + _mean(jax.nn.softplus(fake))
    elif kind == "hinge":
        loss = _mean(jax.nn.relu(1 - real)) + _mean(jax.nn.relu(1 + fake))
    else:
        raise ValueError(f"discriminator loss {kind!r} does not exist; allowed: bce, hinge")
    return 0.5 * loss if halved else loss


def generator_loss(
    fake: Float[Array, "B ..."], kind: str, real: Float[Array, "B ..."] | None = None
) -> Float[Array, " B"]:
    """What the autoencoder minimises, from the discriminator's logits D(x') and D(x).

        thresholded:  mean max(0, D(x) - D(x') - 0.1), D(x) constant
        bce:          mean log(1 + exp(-D(x')))
        hinge:        -mean D(x')

    Args:
      fake: D(x') of the decodings.
      kind: "thresholded", "bce" or "hinge".
      real: D(x) of the images; "thresholded" needs it, the others do not use it.

    Raises:
      ValueError: another kind, or "thresholded" without `real`.
    """
    fake = fake.astype(jnp.float32)
    if kind == "thresholded":
        if real is None:
            raise ValueError("generator loss 'thresholded' needs the logits of the images too")
        return _mean(
            jax.nn.relu(jax.lax.stop_gradient(real.astype(jnp.float32)) - fake - THRESHOLD)
        )
    if kind == "bce":
        return _mean(jax.nn.softplus(-fake))
    if kind == "hinge":
        return -_mean(fake)
    raise ValueError(f"generator loss {kind!r} does not exist; allowed: thresholded, bce, hinge")


def discriminator_accuracy(
    real: Float[Array, "B ..."], fake: Float[Array, "B ..."]
) -> Float[Array, " B"]:
    """The share of logits on their side of zero: images above, decodings below; half of each."""
    return 0.5 * (_mean(real > 0) + _mean(fake < 0))


def lecam(
    real: Float[Array, "B ..."],
    fake: Float[Array, "B ..."],
    anchors: dict[str, Float[Array, ""]],
) -> Float[Array, " B"]:
    """mean (D(x) - anchor of fake)^2 + mean (D(x') - anchor of real)^2.

    LeCam regularisation of the discriminator (Tseng et al. 2021, arXiv:2104.03310) in its
    two-sided form. Anchors {"real", "fake"} are scalars, zero at the start; see
    `update_anchors`.
    """
    real_term = jnp.square(real.astype(jnp.float32) - anchors["fake"])
    fake_term = jnp.square(fake.astype(jnp.float32) - anchors["real"])
    return _mean(real_term) + _mean(fake_term)


def update_anchors(
    anchors: dict[str, Float[Array, ""]],
    real: Float[Array, "B ..."],
    fake: Float[Array, "B ..."],
    decay: float = 0.9,
) -> dict[str, Float[Array, ""]]:
    """decay * anchor + (1 - decay) * mean logit of the whole batch, without gradient."""
    means = {"real": real.astype(jnp.float32).mean(), "fake": fake.astype(jnp.float32).mean()}
    return jax.lax.stop_gradient(
        {name: decay * anchors[name] + (1 - decay) * means[name] for name in ("real", "fake")}
    )


def latent_statistics(z: Float[Array, "B ..."]) -> dict[str, Float[Array, ""]]:
    """The distribution of all numbers of a batch of latents, as scalars.

    quantile_0 (minimum), _0.01, _0.25, _0.5, _0.75, _0.99, _1 (maximum); mean_abs; and with
    u = (z - mean) / std: skewness = mean u^3, and kurtosis = mean u^4, 3 for a normal
    distribution. A constant z has skewness and kurtosis 0.
    """
    z = z.astype(jnp.float32).reshape(-1)
    quantiles = jnp.quantile(z, jnp.array(QUANTILES))
    centred = z - z.mean()
    variance = jnp.mean(jnp.square(centred))
    u = centred * jnp.where(variance > 0, jax.lax.rsqrt(variance), 0)
    return {
        **{f"quantile_{q:g}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
        "mean_abs": jnp.abs(z).mean(),
        "skewness": jnp.mean(u**3),
        "kurtosis": jnp.mean(u**4),
    }


def _mean(x: Array) -> Float[Array, " B"]:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)), dtype=jnp.float32)


def _filter(x_BHW1: Array, kernel: np.ndarray, padding: int) -> Array:
    return jax.lax.conv_general_dilated(
        x_BHW1,
        kernel[:, :, None, None],
        (1, 1),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        # The default is bfloat16 on some accelerators.
        precision=jax.lax.Precision.HIGHEST,
    )
