"""A basis of a model's latent: read, checked, applied, composed with the group, kept."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_models import conv_config, flow_config, save
from sketch_weights import saved_state_dict
from tiny_nets import random_params
from weights import SHARED, assert_same_bytes, error_of, needs

import efae_jax
from efae_jax import basis as bases
from efae_jax import convert, groups
from efae_jax.api import Model, Restored
from efae_jax.basis import Basis, make_basis
from efae_jax.checkpoint import save_model
from efae_jax.disentangled import Disentangled, read_basis
from efae_jax.models.build import build_autoencoder

laws = settings(max_examples=6, deadline=None, derandomize=True, database=None)
MEAN, STD = (0.5, -1.0, 2.0, 0.25), (0.5, 2.0, 1.5, 4.0)


def rotation(seed, side=4):
    """A random orthogonal matrix."""
    u, _, v = np.linalg.svd(np.random.default_rng(seed).standard_normal((side, side)))
    return u @ v


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ready(config):
    """A model with random weights."""
    model = build_autoencoder(config)
    nets = ("encoder", "velocity") if model.is_flow else ("encoder", "decoder")
    parts = (model.encoder, model.velocity_net if model.is_flow else model.decoder)
    params = {name: random_params(net) for name, net in zip(nets, parts, strict=True)}
    return Model(Restored(model, params, config, 0))


@pytest.fixture(scope="module")
def kl():
    """4 channels at a factor of 2, of which the flip h turns the last one's sign."""
    return ready(conv_config())


@pytest.fixture(scope="module")
def models(kl):
    """With positions; with units of their own for each channel; vectors, of a flow."""
    config = conv_config()
    with config.unlocked():
        config.latent.scaling, config.latent.mean, config.latent.std = 1.0, MEAN, STD
        config.group.representation = "2*trivial + 2*sign_h"
    vector = flow_config(model__encoder__vector=True)
    with vector.unlocked():
        vector.group.representation = "2*regular"
    return {"kl": kl, "units": ready(config), "vector": ready(vector)}


def latents(model, seed):
    channels = model.autoencoder.representation.channels
    return normal(seed, 2, *([] if model.factor is None else [4, 4]), channels)


# Splitting, joining


@pytest.mark.parametrize("name", ["kl", "units", "vector"])
def test_split_and_join_undo_each_other(models, name):
    model = models[name]
    channels = model.autoencoder.representation.channels

    @laws
    @given(seed=st.integers(0, 2**32 - 1), semantic=st.integers(1, channels - 1))
    def law(seed, semantic):
        both = Disentangled(model, rotation(seed, channels), semantic)
        z = latents(model, seed + 1)
        parts = both.split(z)
        assert [p.shape for p in parts] == [
            (*z.shape[:-1], semantic),
            (*z.shape[:-1], channels - semantic),
        ]
        np.testing.assert_allclose(both.join(*parts), z, rtol=0, atol=1e-5)
        again = both.split(both.join(*parts))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), again, parts)
        # In a diffusion model's units nothing changes its length.
        u = np.concatenate(parts, axis=-1)
        n = np.asarray(model.normalise(z))
        np.testing.assert_allclose((u**2).sum(-1), (n**2).sum(-1), rtol=1e-5)

    law()


def test_the_channels_are_rows_of_the_basis_on_normalised_latents(models):
    x, Q = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8), rotation(1)
    for name in ("kl", "units"):
        model = models[name]
        both = Disentangled(model, Q, 1)
        semantic, style = both.encode(x)
        n = np.asarray(model.normalise(model.encode(x)), np.float64)
        np.testing.assert_allclose(semantic, n @ Q[:1].T, rtol=0, atol=1e-5)
        np.testing.assert_allclose(style, n @ Q[1:].T, rtol=0, atol=1e-5)
    wanted = model.decode(model.encode(x))
    np.testing.assert_allclose(both.decode(semantic, style), wanted, rtol=0, atol=1e-4)
    for call in (lambda: both.encode(x, tile=3), lambda: both.decode(semantic, style, tile=3)):
        with pytest.raises(ValueError, match="tiles: side 3 "):
            call()


def test_a_flow_decodes_with_a_key_and_its_options(models):
    model = models["vector"]
    both = Disentangled(model, rotation(3, 8))
    z, key = latents(model, 0), jax.random.key(4)
    parts = both.split(z)
    assert [p.shape for p in parts] == [(2, 4), (2, 4)]
    wanted = model.decode(z, key, steps=1, solver="euler")
    found = both.decode(*parts, key, steps=1, solver="euler")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="give it a jax.random.key"):
        both.decode(*parts)


def test_it_may_be_part_of_a_program(kl):
    both, z = Disentangled(kl, rotation(0)), latents(kl, 1)
    found = jax.jit(lambda z: both.join(*both.split(z)))(z)
    np.testing.assert_allclose(found, z, rtol=0, atol=1e-5)
    # In full precision wherever it runs: nothing may round the factors.
    program = jax.make_jaxpr(lambda z: both.join(*both.split(z)))(z)
    products = [e for e in program.eqns if e.primitive.name == "dot_general"]
    highest = jax.lax.Precision.HIGHEST
    assert [e.params["precision"] for e in products] == [(highest, highest)] * 2


def test_shapes_that_do_not_fit_are_named(kl):
    both = Disentangled(kl, np.eye(4), 1)
    with pytest.raises(ValueError, match=r"latents must be \[B, ..., 4\], not \(2, 4, 4, 3\)"):
        both.split(np.zeros((2, 4, 4, 3)))
    for shapes in (((2, 1), (2, 1)), ((2, 1), (3, 3)), ((2, 4, 1), (2, 3)), ((1,), (3,))):
        with pytest.raises(ValueError, match=r"must be \[B, ..., 1\] and \[B, ..., 3\], not"):
            both.join(*map(np.zeros, shapes))


# The group


@pytest.mark.parametrize("name", ["kl", "units", "vector"])
def test_the_action_is_the_representation_in_the_new_basis(models, name):
    model = models[name]
    channels = model.autoencoder.representation.channels
    Q = rotation(7, channels)
    both = Disentangled(model, Q, 3)
    z = latents(model, 8)
    parts = both.split(z)
    u = np.concatenate(parts, axis=-1)
    rho = model.autoencoder.representation.matrices
    mean = np.array(MEAN) if name == "units" else np.zeros(channels)
    for i, g in enumerate(model.group.elements):
        moved = u if u.ndim == 2 else np.asarray(model.act_image(g, u))
        offset = Q @ ((rho[i] @ mean - mean) / (STD if name == "units" else 1))
        wanted = moved @ both.matrices[i].T + offset
        for element in (g, np.full(2, i)):
            found = np.concatenate(both.act(element, *parts), axis=-1)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
    assert np.abs(both.act("h", *parts)[0] - parts[0]).max() > 0.1


def test_a_basis_that_keeps_the_representation_apart_lets_either_part_move_alone(kl):
    """rho(h) turns the sign of the last channel: the first three may be mixed as one likes."""
    apart = np.block([[rotation(0, 3), np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]])
    semantic, style, other = normal(0, 2, 4, 4, 3), *normal(1, 2, 2, 4, 4, 1)
    for Q, block_diagonal in ((apart, True), (rotation(1), False)):
        both = Disentangled(kl, Q, 3)
        assert both.is_block_diagonal is block_diagonal
        assert list(both.leakage) == ["e", "h", "v", "r180"]
        wanted = groups.block_leakage(kl.autoencoder.representation.matrices, Q, 3)
        np.testing.assert_allclose([*both.leakage.values()], wanted, atol=1e-6)
        assert (both.leakage["h"] > 0.1) is not block_diagonal
        same = both.act("h", semantic, style)[0] - both.act("h", semantic, other)[0]
        assert bool(np.abs(same).max() < 1e-5) is block_diagonal
    # Cut elsewhere, it is no longer so.
    assert not Disentangled(kl, np.roll(apart, 1, axis=0) @ rotation(2), 1).is_block_diagonal


def test_units_of_their_own_make_matrices_that_are_not_orthogonal(kl):
    """An exchange of two channels of std 0.5 and 2: the one becomes 4 times the other."""
    config = conv_config()
    with config.unlocked():
        config.group.name, config.group.representation = "z2_h", "2*regular"
        config.latent.scaling, config.latent.mean, config.latent.std = 3.0, MEAN, STD
    both = Disentangled(ready(config), np.eye(4), 1)
    corner = both.matrices[1][:2, :2]
    np.testing.assert_allclose(corner, [[0, 4], [0.25, 0]], rtol=1e-6)
    assert not both.is_block_diagonal
    np.testing.assert_allclose(Disentangled(kl, np.eye(4)).matrices[1], np.diag([1, 1, 1, -1]))


# Where a basis comes from


def bare(path, matrix, name="weight", **metadata):
    tensors = {name: np.asarray(matrix, np.float32, order="C")}
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata or None))
    return path


def test_every_file_gives_the_same_basis(tmp_path, models):
    Q = rotation(0).astype(np.float32)
    np.save(tmp_path / "a.npy", Q)
    np.savez(tmp_path / "b.npz", matrix=Q)
    np.savez(tmp_path / "c.npz", weight=Q)
    bare(tmp_path / "e.safetensors", Q)
    bare(tmp_path / "f.safetensors", Q, semantic="1")
    saved_state_dict(tmp_path / "g.safetensors", Q)
    for path in sorted(tmp_path.iterdir()):
        found = read_basis(path)
        assert found.matrix.dtype == np.float32
        assert found.matrix.tobytes() == Q.tobytes(), path
        assert found.semantic == (1 if path.name[0] in "fg" else 2)
        assert found.source == str(path)
        assert read_basis(str(path), semantic=3).semantic == 3
        for basis, semantic in ((path, None), (str(path), 3), (found, None), (found, 3)):
            both = Disentangled(models["kl"], basis, semantic)
            assert both.basis.matrix.tobytes() == Q.tobytes()
            assert both.basis.semantic == (semantic or found.semantic)
    for array in (Q, jnp.asarray(Q), Q.astype(np.float64)):
        assert Disentangled(models["kl"], array, 1).basis.matrix.tobytes() == Q.tobytes()
    assert efae_jax.read_basis is read_basis
    assert efae_jax.Disentangled is Disentangled


@needs("fixtures/sketch.npz")
def test_the_published_weights_before_and_after_their_last_step(tmp_path):
    """Before it, this W is not near to orthogonal; the program then keeps the bare Q."""
    path = SHARED / "fixtures" / "sketch.npz"
    assert "far from orthogonal: max |W^T W - 1| = 0.873, allowed is 0.5" in error_of(
        read_basis, path
    )
    golden = dict(np.load(path))
    Q = golden["out/q_of_qr"]
    np.savez(tmp_path / "whole.npz", **golden | {"sd/z_transform.weight": Q})
    for file in (tmp_path / "whole.npz", bare(tmp_path / "bare.safetensors", Q)):
        found = read_basis(file)
        assert found.semantic == 2
        np.testing.assert_allclose(found.matrix, Q, rtol=0, atol=1e-6)


def test_what_is_not_orthogonal_is_made_so_and_said(caplog):
    Q, E = rotation(0), np.random.default_rng(1).uniform(-1, 1, (4, 4))
    for size, warned in ((1e-8, False), (1e-5, False), (1e-3, True), (0.05, True)):
        caplog.clear()
        W = Q + size * E
        found = make_basis(W, None, "W")
        assert groups.orthogonality_error(found.matrix) < 1e-6
        np.testing.assert_allclose(found.matrix, Q, rtol=0, atol=5 * size + 1e-7)
        assert len(caplog.records) == warned
        if warned:
            error = groups.orthogonality_error(W)
            assert f"W is not orthogonal (max |W^T W - 1| = {error:.2g}); taken is Q" in caplog.text
        if size > 1e-6:
            np.testing.assert_allclose(found.matrix, groups.qr_basis(W), rtol=0, atol=1e-7)


def says(expected, function, *arguments):
    message = error_of(function, *arguments)
    assert expected in message, message


def test_matrices_that_are_no_basis_are_refused():
    one = np.eye(4)
    says("far from orthogonal: max |W^T W - 1| = 3, allowed is 0.5", make_basis, 2 * one, 1, "W")
    says("W: a basis is made of finite numbers", make_basis, one * np.nan, 1, "W")
    says("made of real numbers, not complex128", make_basis, one * 1j, 1, "W")
    says("made of real numbers, not <U4", make_basis, one.astype("<U4"), 1, "W")
    for shape in ((4, 3), (1, 1), (4,), (1, 4, 4)):
        expected = f"W: a basis is a square matrix of at least 2 channels, not {shape}"
        says(expected, make_basis, np.ones(shape), 1, "W")
    for k in (0, 4, -1):
        says(f"W: {k} semantic of 4 channels; allowed are 1 to 3", make_basis, one, k, "W")


def test_files_that_hold_no_basis_are_refused(tmp_path):
    one = np.eye(4)
    says("No such file", read_basis, tmp_path / "none.npy")
    says("is neither a safetensors, npz nor pickle", read_basis, ROOT / "README.md")
    np.save(tmp_path / "a.npy", one)
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-8])
    says("a.npy is a truncated or damaged npy file", read_basis, tmp_path / "a.npy")
    np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
    says("Python objects in 'o.npy'; only arrays are read", read_basis, tmp_path / "o.npy")
    two = tmp_path / "two.npz"
    np.savez(two, weight=one, bias=one[0])
    says("two.npz holds no basis: neither z_transform.weight", read_basis, two)
    says("begin with weight, bias", read_basis, two)
    for stated in ("x", "-1", "1.0", "9" * 9):
        path = bare(tmp_path / "stated.safetensors", one, semantic=stated)
        says(f"semantic must be a number of channels, not '{stated}'", read_basis, path)
    says("4 semantic of 4", read_basis, bare(tmp_path / "s.safetensors", one, semantic="4"))
    whole = saved_state_dict(tmp_path / "whole.safetensors", one)
    tensors = safetensors.numpy.load_file(whole)
    tensors["sem_embedder.in_conv.weight"] = np.zeros((2, 2, 1, 1), np.float32)
    whole.write_bytes(safetensors.numpy.save(tensors))
    says("the embedders take 2 and 3 of 4 channels", read_basis, whole)
    says("holds no basis: it is no work directory of configs/disentangle.py", read_basis, tmp_path)


def test_a_basis_that_is_not_the_models_is_refused(kl):
    says("no basis travels with the model; give one", Disentangled, kl)
    expected = "the matrix that was given is a basis of 3 channels; the model's latent has 4"
    says(expected, Disentangled, kl, np.eye(3))
    says("4 semantic of 4", Disentangled, kl, make_basis(np.eye(4), 1, "W"), 4)


# It travels with the model


def test_a_work_directory_holds_both(tmp_path, kl):
    both = Disentangled(kl, rotation(0), 3)
    both.save(tmp_path / "both")
    model = efae_jax.load(tmp_path / "both")
    assert_same_bytes(jax.device_get(model.params), jax.device_get(kl.params))
    assert model.basis.matrix.tobytes() == both.basis.matrix.tobytes()
    assert model.basis.semantic == 3
    again = Disentangled(model)
    assert again.basis is model.basis
    z = latents(kl, 0)
    for a, b in zip(again.split(z), both.split(z), strict=True):
        np.testing.assert_array_equal(a, b)
    assert read_basis(tmp_path / "both").semantic == 3
    assert Disentangled(model, np.eye(4)).basis.semantic == 2  # what is given comes first
    assert Disentangled(model, semantic=1).basis.semantic == 1

    theirs = safetensors.numpy.load_file(tmp_path / "both" / "basis.safetensors")
    assert_same_bytes(theirs, {"weight": both.basis.matrix})
    assert "both is there already" in error_of(both.save, tmp_path / "both")
    file = tmp_path / "both" / "basis.safetensors"
    file.write_bytes(bases.to_bytes(make_basis(np.eye(3), 1, "")))
    message = error_of(efae_jax.load, tmp_path / "both")
    assert "basis.safetensors is a basis of 3 channels; the model's latent has 4" in message
    file.write_bytes(b"")
    assert "basis.safetensors (0 bytes) is neither" in error_of(read_basis, tmp_path / "both")


def test_a_model_and_its_files_are_written_together_or_not_at_all(tmp_path, kl):
    assert "No such file" in error_of(
        save_model, tmp_path / "both", {"autoencoder": {"a": np.zeros(1)}}, {}, {"no/name": b""}
    )
    assert not list(tmp_path.iterdir())
    assert efae_jax.load(save(tmp_path / "alone", conv_config())).basis is None
    assert not (tmp_path / "alone" / "basis.safetensors").exists()


def test_exported_weights_carry_it(tmp_path, kl):
    found = make_basis(rotation(0), 1, "here")
    for out, format in ((tmp_path / "ldm.safetensors", "ldm"), (tmp_path / "folder", "diffusers")):
        convert.write_model(kl.config, jax.device_get(kl.params), out, format)
        place = bases.write_beside(found, out)
        assert place in (tmp_path / "ldm.basis.safetensors", out / "basis.safetensors")
        basis = efae_jax.load(out).basis
        assert basis.matrix.tobytes() == found.matrix.tobytes()
        assert (basis.semantic, basis.source) == (1, str(place))
        assert "is there already" in error_of(bases.write_beside, found, out)
        assert isinstance(read_basis(place), Basis)
    assert read_basis(tmp_path / "folder").semantic == 1


def test_importing_the_package_stays_instant():
    code = "import sys, efae_jax; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        efae_jax.nothing  # noqa: B018
