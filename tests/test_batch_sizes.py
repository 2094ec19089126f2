"""How many images at a time: by the images there are, and by memory."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from saved_models import conv_config, folder_of_images, save
from weights import error_of

from efae_jax import batch_sizes
from efae_jax.batch_sizes import GIB, Batch, first_batch, free_host_memory, smaller
from efae_jax.data.latents import Latents
from efae_jax.encode import encode_source
from efae_jax.errors import RunError, UserError
from efae_jax.evaluation import Settings, evaluate, networks, transformations
from efae_jax.evaluation import run as run_module
from efae_jax.evaluation.programs import Programs
from efae_jax.extract import Extractor
from efae_jax.extract import Settings as LatentSettings


def cores(count, platform="cpu"):
    return [SimpleNamespace(platform=platform, process_index=0, id=i) for i in range(count)]


@pytest.mark.parametrize(
    ("images", "devices", "most", "wanted"),
    [
        (1, 2, 4, (1, 1)),
        (2, 8, 4, (2, 2)),
        (3, 2, 4, (2, 4)),  # rounded up to the devices
        (24, 2, 4, (2, 8)),
        (10, 2, 4, (2, 6)),  # two batches of nearly one size, instead of 8 and 2
        (50_000, 4, 16, (4, 64)),
    ],
)
def test_no_more_than_there_are(images, devices, most, wanted):
    found = first_batch(cores(devices), images, most, None)
    assert (len(found.devices), found.size) == wanted


def test_a_given_size_is_kept():
    assert first_batch(cores(2), 3, 4, 64).size == 64
    message = error_of(first_batch, cores(4), 3, 4, 6)
    assert "--batch-size 6 must be a positive multiple of the 4 devices" in message


def settled(batch, bytes_of_image, free):
    """What is tried, until it fits."""
    tried = [batch]
    while batch := smaller(
        batch, bytes_of_image * batch.size // len(batch.devices), free, "an image of 9x9"
    ):
        tried.append(batch)
    return [(len(b.devices), b.size) for b in tried]


def test_batches_are_halved_until_they_fit():
    assert settled(Batch(cores(2), 8), GIB, 9 * GIB) == [(2, 8)]
    # What cannot fit by the figure of the larger one is not compiled.
    assert settled(Batch(cores(2), 32), GIB, 3 * GIB) == [(2, 32), (2, 2)]
    assert smaller(Batch(cores(1), 5), None, None, "").size == 3  # the compiler itself gave up
    message = error_of(smaller, Batch(cores(1), 1), 8 * GIB, 3 * GIB, "an image of 9x9")
    assert "an image of 9x9 does not fit into memory" in message
    assert "need 8 GiB; 3 GiB are free, of which at most 50% are used" in message
    assert "--batch-size 1" in message


def test_cores_of_a_cpu_become_fewer_but_not_accelerators():
    assert [len(Batch(cores(n), n).halved().devices) for n in (8, 3, 2)] == [4, 1, 1]
    assert Batch(cores(2, "gpu"), 2).halved() is None


def test_free_memory_is_that_of_machine_and_group(tmp_path):
    assert free_host_memory(tmp_path) is None  # no Linux
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert free_host_memory(tmp_path) == 8000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    group = tmp_path / "sys/fs/cgroup/a"
    (group / "b").mkdir(parents=True)
    (group / "b/memory.max").write_text("max\n")
    (group / "b/memory.current").write_text("100\n")
    (group / "memory.max").write_text("5000\n")  # of a group above
    (group / "memory.current").write_text("4000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 500\n")
    assert free_host_memory(tmp_path) == 1500
    (tmp_path / "proc/self/cgroup").write_text("3:cpu:/\n4:memory:/of/the/host\n0::/\n")
    group = tmp_path / "sys/fs/cgroup/memory"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text("3000\n")
    (group / "memory.usage_in_bytes").write_text("2000\n")
    assert free_host_memory(tmp_path) == 1000


def test_memory_of_accelerators_is_what_they_say():
    stats = {"bytes_limit": 10, "bytes_in_use": 4}
    gpus = [SimpleNamespace(platform="gpu", process_index=0, memory_stats=lambda: stats)]
    assert batch_sizes.free_memory(gpus) == 6
    silent = [SimpleNamespace(platform="tpu", process_index=0, memory_stats=lambda: None)]
    assert batch_sizes.free_memory(silent) is None


# ---- the commands


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "kl", conv_config())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    return folder_of_images(folder, [(16, 16)] * 4, broken=[4])


@pytest.fixture
def no_networks(monkeypatch):
    def read(kind, path):
        raise UserError("the pretrained weights are not here")

    monkeypatch.setattr(networks, "read_lpips", read)


@pytest.fixture
def tried(monkeypatch):
    """[(devices, images, bytes a device needs)] of every batch that was compiled."""
    found, original = [], batch_sizes.smaller

    def noted(batch, needed, *others):
        found.append((len(batch.devices), batch.size, needed))
        return original(batch, needed, *others)

    monkeypatch.setattr(batch_sizes, "smaller", noted)
    return found


def total_memory(monkeypatch, size):
    monkeypatch.setattr(batch_sizes, "free_memory", lambda devices: size // len(devices))


def test_an_evaluation_in_little_memory(model, images, tmp_path, no_networks, monkeypatch, tried):
    # Few programs, which soon are compiled.
    monkeypatch.setattr(transformations, "ALL", transformations.ALL[:1])
    total_memory(monkeypatch, 2**40)
    whole = evaluate(model, tmp_path / "whole", data=str(images))
    ((devices, size, needed),) = tried
    assert (devices, size) == (5, 5)  # of the 8 devices as many as there are images
    total_memory(monkeypatch, round(2.1 * needed / batch_sizes.SHARE))
    less = evaluate(model, tmp_path / "less", data=str(images))
    assert [each[:2] for each in tried[1:]] == [(5, 5), (2, 2)]
    for found in (whole, less):
        assert found["images"] == 4
    one, two = (found["reconstruction"]["psnr"] for found in (whole, less))
    assert one == pytest.approx(two, rel=1e-5)
    total_memory(monkeypatch, 1000)
    message = error_of(evaluate, model, tmp_path / "none", data=str(images))
    assert "an image of 16x16 does not fit into memory" in message
    assert not (tmp_path / "none" / "evaluation.json").exists()


def test_encoding_in_little_memory(model, images, tmp_path, monkeypatch, tried):
    total_memory(monkeypatch, 2**40)
    encode_source(model, tmp_path / "whole", settings=LatentSettings(), data=str(images))
    ((devices, size, needed),) = tried
    assert (devices, size) == (5, 5)
    total_memory(monkeypatch, round(1.1 * needed / batch_sizes.SHARE))
    encode_source(model, tmp_path / "less", settings=LatentSettings(), data=str(images))
    assert tried[-1][:2] == (1, 1)
    one, two = (stored_latents(tmp_path / name) for name in ("whole", "less"))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


def stored_latents(folder):
    stored = Latents(folder)
    return np.stack([stored[i]["latent"] for i in range(len(stored))])


def test_out_of_memory_names_batch_and_option(model, images, tmp_path, no_networks, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.")

    monkeypatch.setattr(run_module.Run, "_dispatch", exhausted)
    monkeypatch.setattr(Programs, "compile", lambda *_: None)
    settings = Settings(batch_size=4)
    with pytest.raises(RunError, match="batches of 4 images on 4 device.*smaller --batch-size"):
        evaluate(model, tmp_path / "out", settings=settings, data=str(images))
    monkeypatch.setattr(Extractor, "_encoded", exhausted)
    with pytest.raises(RunError, match="batches of 4 images .*allocating 99 bytes"):
        encode_source(
            model, tmp_path / "z", settings=LatentSettings(), batch_size=4, data=str(images)
        )
