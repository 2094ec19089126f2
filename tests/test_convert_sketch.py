"""The disentangler's weights: a basis of the latent that belongs to a model."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
from weights import SHARED, assert_same_bytes, error_of, needs, random_state_dict

from efae_jax import convert
from efae_jax.convert import files, layout, sketch


def shapes(blocks=2):
    found = {"z_transform.weight": (4, 4)}
    for side in ("sem_embedder", "style_embedder"):
        found |= {f"{side}.in_conv.weight": (4, 2, 1, 1), f"{side}.in_conv.bias": (4,)}
        width = 4
        for i in range(blocks):
            block, width = f"{side}.blocks.{i}", 2 * width
            found |= {
                f"{block}.in_conv.0.weight": (width, width // 2, 3, 3),
                f"{block}.in_conv.1.weight": (width,),
                f"{block}.in_conv.1.bias": (width,),
                f"{block}.block.0.weight": (2 * width, width, 1, 1),
                f"{block}.block.0.bias": (2 * width,),
                f"{block}.block.2.weight": (width, 2 * width, 1, 1),
                f"{block}.block.2.bias": (width,),
            }
        found |= {f"{side}.embedder.1.{n}": (width,) for n in ("weight", "bias")}
        found |= {f"{side}.embedder.3.weight": (8, width), f"{side}.embedder.3.bias": (8,)}
    return found


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "sketch.pt"
    path.write_bytes(safetensors.numpy.save(random_state_dict(shapes())))
    return path


def test_the_whole_comes_back_bit_for_bit(saved, tmp_path):
    params = sketch.read(saved)
    assert params["semantic"]["blocks"]["1"]["down"]["kernel"].shape == (3, 3, 8, 16)
    sketch.write(tmp_path / "out.safetensors", params)
    written = files.read_state_dict(tmp_path / "out.safetensors")
    assert_same_bytes(written, files.read_state_dict(saved))


@needs("fixtures/sketch.npz")
def test_published_names_come_back_bit_for_bit(tmp_path):
    params = sketch.read(SHARED / "fixtures" / "sketch.npz")
    assert len(params["style"]["blocks"]) == 3
    sketch.write(tmp_path / "out.safetensors", params)
    theirs = files.read_state_dict(SHARED / "fixtures" / "sketch.npz")
    assert_same_bytes(files.read_state_dict(tmp_path / "out.safetensors"), theirs)


def test_the_matrix_alone(tmp_path):
    matrix = np.arange(16, dtype=np.float32).reshape(4, 4)
    path = tmp_path / "matrix.safetensors"
    path.write_bytes(safetensors.numpy.save({"weight": matrix}))
    params = sketch.read(path)
    np.testing.assert_array_equal(params["transform"]["matrix"], matrix)
    sketch.write(tmp_path / "out.safetensors", params)
    assert_same_bytes(files.read_state_dict(tmp_path / "out.safetensors"), {"weight": matrix})
    path.write_bytes(safetensors.numpy.save({"weight": matrix[:3]}))
    assert "(3, 4), expected a square matrix" in error_of(sketch.read, path)


def test_all_problems_are_listed_at_once(saved):
    tensors = files.read_state_dict(saved)
    del tensors["sem_embedder.in_conv.bias"]
    tensors |= {
        "style_embedder.blocks.99999.block.0.bias": np.zeros(1, np.float32),
        "style_embedder.embedder.3.weight": np.zeros((3, 4, 5), np.float32),
        "z_transform.weight": np.zeros((4, 4), np.int64),
    }
    saved.write_bytes(safetensors.numpy.save(tensors))
    message = error_of(sketch.read, saved)
    assert "1 missing: sem_embedder.in_conv.bias" in message
    assert "1 left over: style_embedder.blocks.99999.block.0.bias" in message
    assert "style_embedder.embedder.3.weight is (3, 4, 5), expected 2 dimensions" in message
    assert "z_transform.weight is int64" in message


def test_other_trees_are_not_written(saved, tmp_path):
    params = layout.unflatten(layout.flatten(sketch.read(saved)) | {"more": np.zeros(1)})
    out = tmp_path / "out.safetensors"
    assert "not those of a disentangler" in error_of(sketch.write, out, params)
    assert not out.exists()


def test_importing_one_says_that_it_is_no_model(saved):
    message = error_of(convert.read_model, saved)
    assert "belongs to a model and is not one; efae_jax.convert.sketch.read" in message
