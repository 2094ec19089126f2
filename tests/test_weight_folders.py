"""Folders of diffusers as they lie about: variants, shards, other names, other programs' JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from weights import assert_same_bytes, error_of

from efae_jax.convert import sources, weight_names

CONFIG = {"_class_name": "AutoencoderKL"}
STEM = "diffusion_pytorch_model"
TENSORS = {
    f"{side}.mid_block.{i}": np.full((2, i + 1), i, np.float32)
    for side in ("encoder", "decoder")
    for i in range(3)
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "vae"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def write(path, tensors=TENSORS):
    path.write_bytes(safetensors.numpy.save(tensors))


def shards(folder, first, names, index=None):
    """Weights in files called so; each tensor in the next one."""
    weight_map = {tensor: names[i % len(names)] for i, tensor in enumerate(TENSORS)}
    for name in names:
        write(folder / name, {t: TENSORS[t] for t, file in weight_map.items() if file == name})
    if index:
        about = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / index).write_text(json.dumps(about))
    return folder / first


# From the best to the last.
ORDER = [
    f"{STEM}.safetensors",
    f"{STEM}.bin",
    f"{STEM}.fp32.safetensors",
    f"{STEM}.fp16.safetensors",
    f"{STEM}.fp16.bin",
    f"{STEM}.bf16.safetensors",
    f"{STEM}.ema.safetensors",
    f"{STEM}.non_ema.safetensors",
    f"{STEM}.non_ema.bin",
    "model.safetensors",
    "model.fp16.safetensors",
    "pytorch_model.bin",
]


@pytest.mark.parametrize("name", ORDER)
def test_weights_under_any_of_these_names(folder, name):
    write(folder / name)
    for path in (folder, folder.parent, folder / name):
        found = sources.read_source(path)
        assert_same_bytes(found.tensors, TENSORS)
        assert found.config == CONFIG
        assert len(found.notes) == (name.count(".") > 1 and path != folder / name)


def test_the_better_file_is_read(folder):
    for i, name in enumerate(reversed(ORDER)):
        write(folder / name, {"encoder.mid_block.x": np.full(1, i, np.float32)})
        assert sources.read_source(folder).tensors["encoder.mid_block.x"] == i
    for i, name in enumerate(reversed(ORDER)):  # but a file that is named is that file
        assert sources.read_source(folder / name).tensors["encoder.mid_block.x"] == i
    names = [c.shards[0] for c in weight_names.candidates(sorted(ORDER))]
    assert names == ORDER


def numbered(pattern, count=2):
    return [pattern.format(f"{i:05d}-of-{count:05d}") for i in range(1, count + 1)]


SHARDS = [
    (f"{STEM}-{{}}.safetensors", f"{STEM}.safetensors.index.json"),
    (f"{STEM}-{{}}.bin", f"{STEM}.bin.index.json"),
    (f"{STEM}.fp16-{{}}.safetensors", f"{STEM}.safetensors.index.fp16.json"),
    (f"{STEM}-{{}}.fp16.safetensors", f"{STEM}.safetensors.index.fp16.json"),
    (f"{STEM}.fp16-{{}}.safetensors", f"{STEM}.fp16.safetensors.index.json"),
    (f"{STEM}-{{}}.fp16.bin", f"{STEM}.bin.index.fp16.json"),
    ("model-{}.safetensors", "model.safetensors.index.json"),
]


@pytest.mark.parametrize(("pattern", "index"), SHARDS)
@pytest.mark.parametrize("indexed", [True, False])
def test_weights_in_shards(folder, pattern, index, indexed):
    names = numbered(pattern)
    shards(folder, names[0], names, index if indexed else None)
    for path in (folder, *(folder / name for name in names), folder / index):
        if path.exists():
            found = sources.read_source(path)
            assert_same_bytes(found.tensors, TENSORS)
            assert found.config == CONFIG


def test_shards_that_are_not_all_there(folder):
    names = numbered(f"{STEM}-{{}}.safetensors", 3)
    shards(folder, names[0], names, f"{STEM}.safetensors.index.json")
    (folder / names[1]).unlink()
    assert f"lists {names[1]}, which is not there" in error_of(sources.read_source, folder)
    (folder / f"{STEM}.safetensors.index.json").unlink()
    assert "holds 2 of 3 files" in error_of(sources.read_source, folder)


def test_shards_that_disagree_with_their_index(folder):
    names = numbered(f"{STEM}-{{}}.safetensors")
    index = folder / f"{STEM}.safetensors.index.json"
    shards(folder, names[0], names, index.name)
    good = json.loads(index.read_text())
    lost = {**good["weight_map"], "encoder.lost": names[0]}
    index.write_text(json.dumps({"weight_map": lost}))
    assert f"lists encoder.lost in {names[0]}" in error_of(sources.read_source, folder)
    for wrong in ({}, None, 3, {"a": 3}, {"a": "../x"}, {"a": "/etc/passwd"}, {"a": ".."}):
        index.write_text(json.dumps({"weight_map": wrong}))
        assert "weight_map must give a file of the folder" in error_of(sources.read_source, folder)
    index.write_text("{")
    assert "is not an index of weights: it is no JSON" in error_of(sources.read_source, folder)
    index.write_text(json.dumps(good))
    write(folder / names[1])
    assert "as another file of the same weights does" in error_of(sources.read_source, folder)


def test_a_repository_of_another_model_with_a_vae(folder):
    root = folder.parent
    write(folder / f"{STEM}.safetensors")
    for other in (
        {"architectures": ["Llama"], "model_type": "llama"},
        {"_class_name": "FluxTransformer2DModel"},
        {"_class_name": "UNet2DConditionModel"},
    ):
        (root / "config.json").write_text(json.dumps(other))
        write(root / "model.safetensors", {"x": np.zeros(1, np.float32)})
        assert_same_bytes(sources.read_source(root).tensors, TENSORS)
        (folder / "config.json").rename(folder / "moved")
        (folder / f"{STEM}.safetensors").rename(folder / "weights")
        message = error_of(sources.read_source, root)
        assert f"config.json is of {next(iter(other.values()))}, which is no autoencoder" in message
        (folder / "moved").rename(folder / "config.json")
        (folder / "weights").rename(folder / f"{STEM}.safetensors")


def test_a_config_beside_a_file_of_another_name(folder, tmp_path):
    """The config counts where the names are diffusers' and it is an autoencoder's."""
    write(folder / "my vae.safetensors")
    assert sources.read_source(folder / "my vae.safetensors").config == CONFIG
    write(folder / "ldm.safetensors", {"encoder.mid.block_1.norm1.weight": np.zeros(1, np.float32)})
    assert sources.read_source(folder / "ldm.safetensors").config is None
    write(tmp_path / "alone.safetensors")  # as ComfyUI keeps it
    assert sources.read_source(tmp_path / "alone.safetensors").config is None
    (tmp_path / "config.json").write_text('{"architectures": ["Llama"]}')
    assert sources.read_source(tmp_path / "alone.safetensors").config is None


@pytest.mark.parametrize(
    "other",
    [
        {"description": "", "sd version": "SD1", "activation text": "", "notes": ""},
        {"modelId": 1, "files": [{"metadata": {"format": "SafeTensor"}}]},
        {},
    ],
)
def test_a_json_of_another_program_is_not_read(other, tmp_path):
    write(tmp_path / "x.safetensors", {"encoder.mid.block_1.norm1.weight": np.zeros(1)})
    (tmp_path / "x.json").write_text(json.dumps(other))
    found = sources.read_source(tmp_path / "x.safetensors")
    assert found.description is None
    assert found.notes == ("x.json is another program's, and not read",)


def test_paths_as_users_write_them(folder, tmp_path, monkeypatch):
    write(folder / f"{STEM}.safetensors")
    strange = folder.rename(folder.with_name("caf\udce9 \u00e9 ::x"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (strange, f"~/{strange.name}", f"~/{strange.name}/{STEM}.safetensors"):
        assert_same_bytes(sources.read_source(path).tensors, TENSORS)
    plain = strange.rename(tmp_path / "plain")
    assert_same_bytes(sources.read_source(f"file://{plain}").tensors, TENSORS)
