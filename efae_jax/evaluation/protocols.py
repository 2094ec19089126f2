"""How published evaluations prepare images and measure: one entry for each, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from efae_jax.data import Transform, make_transform
from efae_jax.data.tensor_resize import TensorTransform
from efae_jax.errors import UserError

_TENSOR = (
    "to floats, shorter side resized on the tensor (bilinear, {}), centre crop, floats throughout, "
    "as torchvision {}"
)


class Protocol(NamedTuple):
    """Choices that figures depend on.

    Attributes:
      images: how they are prepared, in words.
      antialias: of the resizing of floats; None: images are resized and kept in 8 bits.
      ssim_range: (low, high) of the pixels, which are clipped to it; None: of the pair's own
        values, not clipped.
      latent: "sample", of the posterior, or "mean"; None: as the user says, samples unless told
        otherwise.
      source: where the choices were read.
    """

    images: str
    antialias: bool | None
    ssim_range: tuple[float, float] | None
    latent: str | None
    source: str

    @property
    def floats(self) -> bool:
        """Whether images come as floats."""
        return self.antialias is not None

    def reader(self, config: Any) -> Transform:
        """What makes a batch's images of `config`, a `config.data`.

        Raises:
          ValueError: sizes that the protocol does not know.
        """
        if self.antialias is None:
            return make_transform(config, train=False)
        return TensorTransform(
            size=tuple(config.size),
            channels=config.channels,
            max_pixels=config.max_pixels,
            antialias=self.antialias,
        )

    def choose_latent(self, name: str, asked: str | None) -> str:
        """What is decoded.

        Raises:
          UserError: when another is asked for than the protocol has.
        """
        if self.latent is not None and asked not in (None, self.latent):
            raise UserError(
                f"--latent {asked}: --protocol {name} decodes the posterior's {self.latent}; "
                f"--protocol {DEFAULT} decodes either"
            )
        return asked or self.latent or "sample"


_ANTIALIASED = _TENSOR.format("antialiased", "from 0.17 on")
PROTOCOLS = {
    "pillow": Protocol(
        "shorter side resized (Pillow, bicubic, antialiased), centre crop, 8 bits",
        None,
        None,
        None,
        "this package",
    ),
    "eq-vae": Protocol(
        _ANTIALIASED, True, None, "sample", "zelaki/eqvae c34589c, evaluation/eval.py"
    ),
    "eq-vae-aliased": Protocol(
        _TENSOR.format("not antialiased", "before 0.17"),
        False,
        None,
        "sample",
        "zelaki/eqvae c34589c, evaluation/eval.py, which does not say which torchvision it had",
    ),
    "lightningdit": Protocol(
        _ANTIALIASED, True, (-1.0, 1.0), "sample", "hustvl/LightningDiT, evaluate_tokenizer.py"
    ),
}
DEFAULT = "pillow"


def find_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
      UserError: for another name.
    """
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: allowed are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
