"""Data for training and evaluation: images, or latents with embeddings.

source = make_source(config.data, "train")
reader = make_reader(config.data, train=True)
for batch in train_batches(source, reader, batch_size=64, seed=0):
    batch["image"]  # uint8 [64, H, W, C]
"""

from efae_jax.data.array_records import write_array_record
from efae_jax.data.pipeline import eval_batches, train_batches
from efae_jax.data.sources import make_reader, make_source
from efae_jax.data.transforms import Transform, make_transform

__all__ = [
    "Transform",
    "eval_batches",
    "make_reader",
    "make_source",
    "make_transform",
    "train_batches",
    "write_array_record",
]
