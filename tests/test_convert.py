"""Weights to and from PyTorch: same bytes both ways, same numbers, every problem named."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from original_model import ARCHITECTURE, random_inputs, random_params

from efae_jax import flow, sampling
from efae_jax.convert import FORMATS, efae, files, layout
from efae_jax.errors import UserError

GOLDEN = Path(__file__).parents[2] / "shared" / "fixtures" / "efae_mnist.npz"


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def state_dict(params):
    return efae.to_torch(params)


@pytest.fixture
def exported(params, tmp_path):
    path = tmp_path / "out" / "model.safetensors"
    efae.export_efae(params, ARCHITECTURE, path)
    return path


def assert_same_bytes(a, b):
    a, b = layout.flatten(a), layout.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        assert a[name].tobytes() == b[name].tobytes(), name


def error_of(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_import_of_an_export_is_the_same_model_bit_for_bit(params, exported):
    architecture, again = FORMATS["efae"].load(exported)
    assert architecture == ARCHITECTURE
    assert_same_bytes(again, params)


def test_export_of_an_import_is_the_same_state_dict_bit_for_bit(state_dict, tmp_path):
    rng = np.random.default_rng(5)
    theirs = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in state_dict.items()}
    safetensors.numpy.save_file(theirs, tmp_path / "theirs.safetensors")
    architecture, ours = efae.import_efae(tmp_path / "theirs.safetensors", heads=2)
    FORMATS["efae"].export(ours, architecture, tmp_path / "again.safetensors")
    assert_same_bytes(safetensors.numpy.load_file(tmp_path / "again.safetensors"), theirs)


@pytest.mark.skipif(not GOLDEN.exists(), reason="no golden numbers here")
def test_published_names_come_back_bit_for_bit(tmp_path):
    architecture, params = efae.import_efae(GOLDEN, heads=4)
    efae.export_efae(params, architecture, tmp_path / "mnist.safetensors")
    with np.load(GOLDEN) as file:
        theirs = {k.removeprefix("sd/"): v for k, v in file.items() if k.startswith("sd/")}
    assert_same_bytes(safetensors.numpy.load_file(tmp_path / "mnist.safetensors"), theirs)


def test_pytorch_computes_the_same_from_an_exported_model(params, exported):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from torch_original import Original

    description = json.loads(exported.with_suffix(".json").read_text())
    theirs = Original(*(description["architecture"][key] for key in efae.NETWORK_KEYS))
    theirs.load_state_dict(load_file(exported), strict=True)
    x, t, noise = random_inputs()
    with torch.no_grad():
        x_t, noise_t = (torch.tensor(a).permute(0, 3, 1, 2) for a in (x, noise))
        z_t = theirs.encoder(x_t)
        v_t = theirs.velocity(x_t, torch.tensor(t), z_t)
        sample_t = theirs.sample(noise_t, z_t, steps=4, guidance=2.0)

    nets = efae.nets(ARCHITECTURE)
    velocity = jax.jit(nets["velocity"].__call__)
    z = jax.jit(nets["encoder"].__call__)(params["encoder"], x)
    v = velocity(params["velocity"], x, t, z)
    field = flow.guided(lambda *xtz: velocity(params["velocity"], *xtz), z, 2.0)
    pairs = {
        "latent": (z, z_t),
        "velocity": (v, v_t.permute(0, 2, 3, 1)),
        "sample": (sampling.sample(field, noise, 4), sample_t.permute(0, 2, 3, 1)),
    }
    for name, (ours, other) in pairs.items():
        atol = 1e-4 * float(other.abs().max())
        np.testing.assert_allclose(ours, other.numpy(), rtol=0, atol=atol, err_msg=name)


def test_json_beside_the_weights_says_how_to_build_the_model(exported):
    assert sorted(p.name for p in exported.parent.iterdir()) == ["model.json", "model.safetensors"]
    assert json.loads(exported.with_suffix(".json").read_text()) == {
        "format": "efae",
        "architecture": ARCHITECTURE,
        "image_range": [-1, 1],
    }


def test_all_problems_are_listed_at_once(state_dict, tmp_path):
    broken = dict(state_dict)
    missing = ["encoder.conv.4.bias", "velocity.layers.1.attention.wo.weight"]
    extra = ["velocity.extra", "optimizer\nstep"]
    wrong = "velocity.t_embedder.mlp.2.weight"
    for name in missing:
        del broken[name]
    broken |= {name: np.zeros(2, np.float32) for name in extra}
    broken[wrong] = np.zeros((3, 64), np.float32)
    broken["encoder.conv.0.bias"] = np.zeros(32, np.int64)
    safetensors.numpy.save_file(broken, tmp_path / "broken.safetensors")
    message = error_of(efae.import_efae, tmp_path / "broken.safetensors", heads=2)
    assert f"2 missing: {', '.join(missing)}" in message
    assert "2 left over: 'optimizer\\nstep', velocity.extra" in message
    assert f"1 of the wrong shape: {wrong} is (3, 64), expected (64, 64)" in message
    assert "1 of the wrong type: encoder.conv.0.bias is int64" in message
    assert "broken.safetensors" in message


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("velocity.x_embedder.weight", (64, 513), "expected (width, width/2 * patch^2)"),
        ("velocity.x_embedder.weight", (64, 32 * 5), "expected (width, width/2 * patch^2)"),
        ("velocity.x_embedder.weight", (0, 5), "expected 2 dimensions, none of them 0"),
        ("velocity.x_embedder.weight", (96, 48), "width 96"),
        ("encoder.conv.0.weight", (32, 3), "expected 4 dimensions"),
        ("velocity.c_embedder.weight", (256, 64), "expected (64, 256)"),
        ("velocity.layers.999999999.x", (1,), "left over: velocity.layers.999999999.x"),
    ],
)
def test_shapes_that_fit_no_architecture_are_named(state_dict, name, shape, expected):
    message = error_of(efae.from_torch, state_dict | {name: np.zeros(shape, np.float32)})
    assert name in message or "width" in message
    assert expected in message


def test_a_lost_block_is_listed_name_by_name(state_dict):
    broken = {k: v for k, v in state_dict.items() if not k.startswith("velocity.layers.0.")}
    message = error_of(efae.from_torch, broken)
    assert "17 missing" in message
    assert message.count("velocity.layers.0.") == 17


def test_half_precision_is_widened_exactly(state_dict, tmp_path):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = {k: v.astype(dtype) for k, v in state_dict.items()}
        path = tmp_path / "half.safetensors"
        path.write_bytes(safetensors.numpy.save(half))
        _, ours = efae.import_efae(path, heads=2)
        assert_same_bytes(efae.to_torch(ours), {k: v.astype(np.float32) for k, v in half.items()})


def test_heads_come_from_the_json_or_from_the_caller(params, exported):
    assert "heads is stated as 2 and found to be 4" in error_of(efae.import_efae, exported, heads=4)
    assert efae.import_efae(exported, heads=2)[0] == ARCHITECTURE
    exported.with_suffix(".json").unlink()
    assert "--heads" in error_of(efae.import_efae, exported)
    assert "3 heads do not divide width 64" in error_of(efae.import_efae, exported, heads=3)
    assert efae.import_efae(exported, heads=8)[0] == ARCHITECTURE | {"heads": 8}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"width": 128, "patch": 2}, "width is stated as 128 and found to be 64; patch is"),
        ({"depth": 10**9}, "depth is stated as 1000000000"),
        ({"heads": 2.0}, "heads must be a positive whole number, not 2.0"),
        ({"heads": True}, "heads must be a positive whole number, not True"),
        ({"colour": 1}, "1 left over: colour"),
        ({"group": "z3"}, "unknown group 'z3'"),
        ({"group": 3}, "group must be a string"),
        ({"representation": "4*sign"}, "'4*sign' acts on 4 of the latent's 256 numbers"),
        ({"representation": "9999999999*trivial"}, "more than the latent's 256"),
    ],
)
def test_a_json_that_disagrees_is_refused(exported, changes, expected):
    beside = exported.with_suffix(".json")
    description = json.loads(beside.read_text())
    description["architecture"] |= changes
    beside.write_text(json.dumps(description))
    message = error_of(efae.import_efae, exported)
    assert expected in message
    assert str(beside) in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must hold a JSON object, not a list"),
        ("{}", "does not describe a model of format efae"),
        ('{"format": "efae", "architecture": {"heads": 2}}', "5 missing: channels, depth"),
        (
            json.dumps({"format": "efae", "architecture": ARCHITECTURE, "image_range": [0, 1]}),
            "image_range must be [-1, 1]",
        ),
    ],
)
def test_a_json_that_describes_no_model_is_refused(exported, text, expected):
    exported.with_suffix(".json").write_text(text)
    assert expected in error_of(efae.import_efae, exported)


def test_models_of_other_architectures_are_told_what_can_be_exported(params, tmp_path):
    out = tmp_path / "new" / "model.safetensors"
    ours = {"encoder": {"stem": {"kernel": np.zeros(3)}}, "velocity": params["velocity"]}
    learned = params | {"representation": {"free": np.zeros((4, 4), np.float32)}}
    no_blocks = params | {"velocity": {}}
    for tree, architecture in [
        (ours, ARCHITECTURE),
        (learned, ARCHITECTURE),
        (no_blocks, ARCHITECTURE),
        (params, {"side": 32}),
    ]:
        message = error_of(efae.export_efae, tree, architecture, out)
        assert "configs/efae.py:mnist" in message
        assert "configs/efae.py:cifar10" in message
    for architecture, expected in [
        (ARCHITECTURE | {"depth": 3}, "depth is stated as 3 and found to be 2"),
        (ARCHITECTURE | {"heads": 3}, "3 heads do not divide"),
        (ARCHITECTURE | {"image_side": 32}, "left over: image_side"),
    ]:
        assert expected in error_of(efae.export_efae, params, architecture, out)
    assert list(tmp_path.iterdir()) == []


def small():
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.weight": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        "n": np.array(3.0, np.float32),
    }


@pytest.mark.parametrize("kind", ["safetensors", "npz", "npz_compressed", "npz_prefixed"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_files_are_recognised_by_content(kind, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    with path.open("wb") as file:
        if kind == "safetensors":
            file.write(
                safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in small().items()})
            )
        elif kind == "npz":
            np.savez(file, **small())
        elif kind == "npz_compressed":
            np.savez_compressed(file, **small())
        else:
            named = {f"sd/{k}": v for k, v in small().items()}
            np.savez(file, **named, **{"in/x": np.zeros(3), "out/y": np.zeros(4)})
    read = files.read_state_dict(path)
    assert read.keys() == small().keys()
    for name, value in small().items():
        np.testing.assert_array_equal(read[name], value)
        assert read[name].dtype == value.dtype


def test_arrays_are_written_by_value_however_they_lie_in_memory(state_dict, tmp_path):
    files.write_model(tmp_path / "small.safetensors", small(), {})
    read = files.read_state_dict(tmp_path / "small.safetensors")
    assert_same_bytes(read, small())
    assert all(tensor.flags.c_contiguous for tensor in state_dict.values())


def test_strangers_among_prefixed_names_are_kept_to_be_reported(tmp_path):
    np.savez(tmp_path / "x.npz", **{"sd/a": np.zeros(1), "b": np.zeros(1), "in/c": np.zeros(1)})
    assert files.read_state_dict(tmp_path / "x.npz").keys() == {"a", "b"}


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_named_and_never_run(tmp_path):
    evil, trace = tmp_path / "evil.pt", tmp_path / "ran"
    code = pickle.dumps(Evil(trace))
    evil.write_bytes(code)
    assert error_of(files.read_state_dict, evil).startswith(f"{evil} is a PyTorch pickle")
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/data/0", bytes(8))
    assert error_of(files.read_state_dict, evil).startswith(f"{evil} is a PyTorch pickle")
    np.savez(evil.with_suffix(".npz"), a=np.array([Evil(trace)], dtype=object))
    assert "Python objects" in error_of(files.read_state_dict, evil.with_suffix(".npz"))
    assert not trace.exists()


def npy(shape, data, dtype="<f4"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def promises_more_than_there_is():
    """An archive whose member states, as its array does, 4,000 bytes more than follow."""
    whole = zipped([("a.npy", npy("(1000,)", b""))], zipfile.ZIP_STORED)
    place = whole.index(b"PK\x01\x02") + 20
    size = struct.unpack_from("<I", whole, place)[0] + 4000
    return whole[:place] + struct.pack("<II", size, size) + whole[place + 8 :]


def tensors_file(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "(0 bytes) is neither"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "is neither a safetensors nor an npz file"),
        (struct.pack("<Q", 2**62) + b"{}", "safetensors file"),
        (struct.pack("<Q", 1000) + b"{}", "safetensors file"),
        (struct.pack("<Q", 9) + b"{not json", "safetensors file"),
        (
            tensors_file({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
            "safetensors file",
        ),
        (
            tensors_file({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
            "safetensors file",
        ),
        (
            tensors_file({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}) + b"0",
            "safetensors file",
        ),
        (zipped([("a.npy", npy("(1000000000000,)", b"0000"))]), "states 4000000000000 bytes"),
        (zipped([("a.npy", npy("(-2, -2)", bytes(16)))]), "npz file"),
        (zipped([("a.npy", npy("(2,)", bytes(12)))]), "states 8 bytes"),
        (zipped([("a.npy", b"\x93NUMPY\x03\x00" + bytes(20))]), "npy version"),
        (zipped([("a.npy", b"not an array")]), "npz file"),
        (zipped([("a.npy", npy("(2,", bytes(8)))]), "npz file"),
        (promises_more_than_there_is(), "npz file: EOFError"),
        (zipped([("a.npy", npy("(2,)", bytes(8)).replace(b"{", b"{{"))]), "npz file"),
        (zipped([("a.npy", npy("(2,)", bytes(8)))])[:-30] + bytes(30), "npz file"),
        (zipped([("read.me", b"hello")]), "'read.me', which is no array"),
        (zipped([("a.npy", npy("(1,)", bytes(4))), ("a", b"")]), "two arrays of the same name"),
    ],
)
def test_damaged_and_foreign_files_end_in_one_clear_line(content, expected, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    message = error_of(files.read_state_dict, path)
    assert expected in message
    assert str(path) in message


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    path.write_bytes(zipped([("a.npy", npy("(1000000,)", bytes(4_000_000)))]))
    assert files.read_state_dict(path)["a"].shape == (1_000_000,)
    monkeypatch.setattr(files, "_ZIP_FREE", 10**6)
    assert "refused" in error_of(files.read_state_dict, path)


def test_missing_files_and_folders_are_named(tmp_path):
    assert "No such file" in error_of(files.read_state_dict, tmp_path / "nothing.npz")
    assert "is a folder" in error_of(files.read_state_dict, tmp_path)


WHOLE = {
    "safetensors": safetensors.numpy.save({"a": np.arange(40, dtype=np.float32)}),
    "npz": zipped([("a.npy", npy("(40,)", np.arange(40, dtype=np.float32).tobytes()))]),
}


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_any_truncation_is_an_error(kind, data, tmp_path_factory):
    whole = WHOLE[kind]
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    error_of(files.read_state_dict, path)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_damage_anywhere_raises_nothing_but_a_user_error(kind, data, tmp_path_factory):
    content = bytearray(WHOLE[kind])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        tensors = files.read_state_dict(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 160


@pytest.mark.parametrize("fails", ["write_bytes", "write_text", "replace"])
def test_a_failed_write_leaves_what_was_there(params, exported, fails, monkeypatch):
    before = {path: path.read_bytes() for path in exported.parent.iterdir()}
    changed = jax.tree.map(lambda leaf: leaf + 1, params)

    def full(path, *args, **kwargs):
        if fails == "write_bytes":
            with path.open("wb") as file:
                file.write(args[0][:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, fails, full)
        message = error_of(efae.export_efae, changed, ARCHITECTURE, exported)
    assert "No space left on device" in message
    assert {path: path.read_bytes() for path in exported.parent.iterdir()} == before
    efae.export_efae(changed, ARCHITECTURE, exported)
    assert_same_bytes(efae.import_efae(exported)[1], changed)


def test_places_that_cannot_be_written_are_named(params, tmp_path):
    message = error_of(efae.export_efae, params, ARCHITECTURE, tmp_path / "model.pt")
    assert "must end in .safetensors" in message
    for folder in ("a.safetensors", "b.json"):
        (tmp_path / folder).mkdir()
        out = (tmp_path / folder).with_suffix(".safetensors")
        assert "is a folder" in error_of(efae.export_efae, params, ARCHITECTURE, out)
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "model.safetensors"
    assert "cannot write" in error_of(efae.export_efae, params, ARCHITECTURE, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.json", "file"]
