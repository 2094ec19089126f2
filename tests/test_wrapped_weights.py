"""Models under keys and behind prefixes, in files of every kind: found, chosen, or asked for."""

from __future__ import annotations

import collections
import functools
import io
import pickle

import numpy as np
import pytest
import safetensors.numpy
from saved_models import conv_config
from weights import assert_same_bytes, error_of, random_state_dict, torch_shapes

import efae_jax
from configs.pretrained import get_config
from efae_jax import convert
from efae_jax.__main__ import main
from efae_jax.convert import kl_table, sources, taesd
from efae_jax.models.build import build_autoencoder

NAMES = {"ldm": kl_table.LDM, "diffusers": kl_table.DIFFUSERS, "aura": kl_table.AURA}


@functools.cache
def plain(form="ldm", seed=0):
    """Weights of a small model in the names of a format."""
    if form == "taesd":
        config = get_config("taesd")
        with config.unlocked():
            config.model.variant = "taesd"
    else:
        sizes = {"widths": (32, 64), "norm_groups": 32, "attention": True}
        config = conv_config("aura" if form == "aura" else "kl", **sizes)
    model = build_autoencoder(config)
    table = taesd.table("taesd") if form == "taesd" else kl_table.table(NAMES[form], config.model)
    abstract = {"encoder": model.encoder.abstract, "decoder": model.decoder.abstract}
    return random_state_dict(torch_shapes(table, abstract), seed=seed)


def behind(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def safetensors_file(path, tensors):
    path.write_bytes(safetensors.numpy.save(tensors))
    return path


def pickled(path, value):
    path.write_bytes(pickle.dumps(value, protocol=2))
    return path


def read(path):
    return sources.read_source(path)


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "vae.", "first_stage_model.", "a.b.c."]


@pytest.mark.parametrize("form", ["ldm", "diffusers", "aura", "taesd"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_before_names_of_any_format(form, prefix, tmp_path):
    stranger = {"text_model.encoder.layers.0.self_attn.weight": np.zeros(2, np.float32)}
    stranger = {} if prefix in ("module.", "_orig_mod.", "module._orig_mod.") else stranger
    path = safetensors_file(tmp_path / "x", behind(prefix, plain(form)) | stranger)
    found = read(path)
    names = {name.removeprefix(prefix) for name in found.tensors} - stranger.keys()
    assert names == plain(form).keys()
    if form != "diffusers":  # whose structure is not told by names alone
        imported = convert.read_model(path)
        assert imported.format == {"aura": "vqgan-training"}.get(form, form)
        assert sum(imported.ignored.values()) == len(stranger)


def test_wrappers_in_the_middle_of_names(tmp_path):
    part = "._checkpoint_wrapped_module.block."
    inner = {name.replace("encoder.", "encoder._orig_mod.", 1): a for name, a in plain().items()}
    inner = {f"module.{n.replace('.block.', part)}": a for n, a in inner.items()}
    assert_same_bytes(read(safetensors_file(tmp_path / "x", inner)).tensors, plain())


@pytest.mark.parametrize("key", ["model", "ema", "module", "state_dict", "params", "generator"])
@pytest.mark.parametrize("deep", [False, True])
def test_a_state_dict_under_any_key(key, deep, tmp_path):
    optimizer = {"state": {0: {"exp_avg": np.zeros(3), "step": 7}}, "param_groups": [{"lr": 0.1}]}
    inside = {"net": plain()} if deep else plain()
    path = pickled(tmp_path / "x.ckpt", {key: inside, "optimizer": optimizer, "epoch": 3, 5: "x"})
    found = read(path)
    assert_same_bytes(found.tensors, plain())
    assert found.ignored == {"optimizer.": 1}
    for address in (f"{path}::{key}", f"{path}::{key}.net" if deep else f"{path}::{key}"):
        assert_same_bytes(read(address).tensors, plain())
    assert convert.read_model(path).ignored == {"optimizer.": 1}


def test_strangers_among_the_weights_do_no_harm(tmp_path):
    whole = {**plain(), "epoch": 3, "args": {"lr": 1.0}, "n_averaged": np.int64(5)}
    found = read(pickled(tmp_path / "x.ckpt", whole))
    assert_same_bytes(found.tensors, plain())
    assert found.ignored == {"n_averaged": 1}


TWO = [
    lambda path, a, b: pickled(path, {"model": a, "model_ema": b}),
    lambda path, a, b: pickled(path, {"state_dict": behind("model.", a) | behind("model_ema.", b)}),
    lambda path, a, b: safetensors_file(path, behind("model.", a) | behind("model_ema.", b)),
]


@pytest.mark.parametrize("write", TWO)
def test_of_several_models_the_user_chooses(write, tmp_path):
    path = write(tmp_path / "x.ckpt", plain(), plain(seed=1))
    message = error_of(read, path)
    assert "holds several models" in message
    for key, seed in (("model", 0), ("model_ema", 1)):
        (address,) = [w for w in message.split() if w.endswith(f"{key}")]
        assert address.startswith(f"{path}::")
        assert_same_bytes(read(address).tensors, plain(seed=seed))
        assert_same_bytes(read(f"{path}::{address.split('::')[1]}.").tensors, plain(seed=seed))
        assert sum(read(address).ignored.values()) == len(plain())
    message = error_of(read, f"{path}::emma")
    assert "holds nothing under emma; allowed keys:" in message
    assert "model_ema" in message


def test_plain_names_beside_a_copy(tmp_path):
    path = safetensors_file(tmp_path / "x", plain() | behind("ema.", plain(seed=1)))
    message = error_of(read, path)
    assert message.endswith(f"{path}:: or {path}::ema") or f"{path}::ema" in message
    assert_same_bytes(read(f"{path}::ema").tensors, plain(seed=1))
    found = read(f"{path}::").tensors
    assert {n: a for n, a in found.items() if not n.startswith("ema.")}.keys() == plain().keys()


def test_the_key_serves_load_import_and_a_start(tmp_path, capsys):
    path = pickled(tmp_path / "x.ckpt", {"model": plain(), "ema": plain(seed=1)})
    address = f"{path}::ema"
    expected = convert.read_model(address).params
    assert_same_bytes(efae_jax.load(address).params, expected)
    assert main(["import", address, str(tmp_path / "run")]) == 0
    assert_same_bytes(efae_jax.load(tmp_path / "run").params, expected)
    assert main(["export", address, str(tmp_path / "out.safetensors"), "--format", "ldm"]) == 0
    assert_same_bytes(read(tmp_path / "out.safetensors").tensors, plain(seed=1))
    capsys.readouterr()
    assert main(["import", str(path), str(tmp_path / "other")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{path}::model or {path}::ema" in line


def test_a_path_may_hold_two_colons(tmp_path):
    path = safetensors_file(tmp_path / "a::b", plain())
    assert_same_bytes(read(path).tensors, plain())


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("tensors", ["torch", "numpy", "parameters"])
def test_pickles_of_any_protocol(protocol, tensors, tmp_path):
    values = dict(list(plain().items())[:9]) | {
        "encoder.down.0.half": np.arange(4, dtype=np.float16),
        "encoder.down.0.turned": np.asfortranarray(plain()["encoder.conv_in.weight"][0, 0]),
    }
    saved = values
    if tensors != "numpy":
        torch = pytest.importorskip("torch")
        kind = torch.nn.Parameter if tensors == "parameters" else torch.as_tensor
        saved = {n: kind(torch.as_tensor(np.array(a))) for n, a in values.items()}
        if tensors == "torch":  # views of one storage, and a type that NumPy lacks
            both = torch.arange(6.0)
            saved |= {"encoder.down.1.a": both[:3], "encoder.down.1.b": both.view(2, 3).t()}
            values = values | {"encoder.down.1.a": both[:3].numpy()}
            values |= {"encoder.down.1.b": both.view(2, 3).t().numpy()}
    path = tmp_path / "x.pkl"
    for kind in (dict, collections.OrderedDict):
        for whole in (kind(saved), kind(model=kind(saved), epoch=3)):
            path.write_bytes(pickle.dumps(whole, protocol=protocol))
            assert_same_bytes(read(path).tensors, values)


def test_float8_is_widened_and_scaled_float8_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    kinds = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    for kind in kinds:
        small = {n: torch.tensor(a).to(getattr(torch, kind)) for n, a in plain().items()}
        wide = {n: a.float().numpy() for n, a in small.items()}
        if "fnuz" not in kind:
            buffer = io.BytesIO()
            torch.save(small, buffer)
            (tmp_path / "x.pt").write_bytes(buffer.getvalue())
            assert_same_bytes(read(tmp_path / "x.pt").tensors, wide)
        try:
            content = save(small)
        except Exception:  # safetensors has no name for some
            continue
        (tmp_path / "x.safetensors").write_bytes(content)
        assert_same_bytes(read(tmp_path / "x.safetensors").tensors, wide)
        scaled = small | {"encoder.conv_in.scale_weight": torch.ones(())}
        (tmp_path / "s.safetensors").write_bytes(save(scaled))
        message = error_of(read, tmp_path / "s.safetensors")
        assert f"holds {kind} numbers with scales" in message
        assert "encoder.conv_in.scale_weight" in message
