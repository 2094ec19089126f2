"""Images with captions: what `python -m efae_jax embed` reads.

source = open_captioned("coco:captions_val2017.json", images="val2017", size=(256, 256))
source[0]["captions"]  # 1 to 5 sentences
"""

from efae_jax.data.captions.opening import FORMS, open_captioned
from efae_jax.data.captions.texts import MAX_CAPTIONS, CaptionError

__all__ = ["FORMS", "MAX_CAPTIONS", "CaptionError", "open_captioned"]
