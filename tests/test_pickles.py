"""Pickles: what PyTorch saves is read, what would run code is not, nothing is ever run."""

from __future__ import annotations

import collections
import contextlib
import io
import itertools
import os
import pickle
import pickletools
import struct
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import assert_same_bytes, error_of

from efae_jax.convert import files, pickles, torch_arrays


def opcodes(*parts):
    """A pickle of protocol 2 from its instructions; text is an instruction with its line ends."""
    body = b"".join(p.encode() if isinstance(p, str) else p for p in parts)
    return b"\x80\x02" + body + b"."


def storage(key="0", count=6, kind="FloatStorage"):
    """Instructions that push a storage."""
    return (
        b"(X\x07\x00\x00\x00storage"
        + f"ctorch\n{kind}\n".encode()
        + push(key)
        + push("cpu")
        + push(count)
        + b"tQ"
    )


def push(value):
    """Instructions that push a plain value."""
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor(shape=(2, 3), strides=(3, 1), offset=0, where=None):
    where = storage() if where is None else where
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + where
        + push(offset)
        + push(shape)
        + push(strides)
        + push(False)
        + b"ccollections\nOrderedDict\n)RtR"
    )


def state_dict(*entries):
    return opcodes("}", *(part for name, value in entries for part in (push(name), value, "s")))


MAGIC = 0x1950A86A20F9469CFC6C  # of the format before zip archives
DATA = np.arange(6, dtype=np.float32)


def archive(path, pickled, data=None, byteorder=b"little"):
    """A zip archive as `torch.save` writes it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", pickled)
        file.writestr("model/byteorder", byteorder)
        for key, content in ({"0": DATA.tobytes()} if data is None else data).items():
            file.writestr(f"model/data/{key}", content)
    return path


def test_a_handmade_archive_is_read_with_offset_and_strides(tmp_path):
    path = archive(
        tmp_path / "x.pt",
        state_dict(("a", tensor()), ("b", tensor((3,), (2,), 1)), ("c", tensor((0, 4), (4, 1)))),
    )
    read = files.read_state_dict(path)
    np.testing.assert_array_equal(read["a"], DATA.reshape(2, 3))
    np.testing.assert_array_equal(read["b"], DATA[1::2])
    assert read["c"].shape == (0, 4)


def make_saved(torch):
    t = torch.arange(24.0).reshape(4, 6) / 7
    saved = collections.OrderedDict(
        whole=t,
        transposed=t.t(),
        part=t[1:3, 2:],
        scalar=torch.tensor(3.0),
        empty=torch.zeros(0, 3),
        repeated=torch.randn(1, 4).expand(3, 4),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        half=torch.randn(3).half(),
        bfloat=torch.randn(3).bfloat16(),
        double=torch.randn(3, dtype=torch.float64),
        long=torch.arange(3),
        byte=torch.arange(3, dtype=torch.uint8),
        flags=torch.tensor([True, False]),
    )
    saved._metadata = {"": {"version": 1}}  # modules' state dicts have it
    return saved


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_what_pytorch_saves_comes_back_bit_for_bit(zipped, nested, tmp_path):
    torch = pytest.importorskip("torch")
    saved = make_saved(torch)
    if zipped:
        saved["uint16"] = torch.tensor([1, 60000], dtype=torch.uint16)  # has no storage class
    path = tmp_path / "weights"
    # As a training framework leaves it: a class as a key, an optimiser, numbers.
    whole = {"state_dict": saved, "callbacks": {torch.optim.Adam: {"best": 0.1}}, "epoch": 3}
    torch.save(whole if nested else saved, path, _use_new_zipfile_serialization=zipped)
    read = files.read_state_dict(path)
    assert read.keys() == saved.keys()
    for name, tensor_ in saved.items():
        tensor_ = tensor_.detach()
        expected = tensor_.float() if tensor_.dtype == torch.bfloat16 else tensor_
        assert read[name].dtype.name == str(tensor_.dtype).removeprefix("torch."), name
        np.testing.assert_array_equal(
            read[name].astype(expected.numpy().dtype), expected.numpy(), err_msg=name
        )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bare_pickles_of_arrays_are_read(protocol, tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
        "n": np.float32(3),
    }
    path = tmp_path / "arrays.ckpt"
    path.write_bytes(pickle.dumps(arrays, protocol=protocol))
    assert_same_bytes(files.read_state_dict(path), {k: np.asarray(v) for k, v in arrays.items()})


class Callback:
    """A class of a training framework, which is not there when its checkpoint is read."""

    made = 0

    def __init__(self):
        self.best = {"score": 1.5}
        type(self).made += 1

    def __setstate__(self, state):
        raise AssertionError("an unknown class was called")


def test_unknown_classes_are_inert_stand_ins(tmp_path):
    value = {"callbacks": [Callback()], "state_dict": {"w": np.ones(2, np.float32)}}
    pickled = pickle.dumps(value)
    path = tmp_path / "lightning.ckpt"
    path.write_bytes(pickled.replace(b"test_pickles", b"nowhere_____"))
    np.testing.assert_array_equal(files.read_state_dict(path)["w"], np.ones(2))
    # Neither called nor looked up where it is there.
    path.write_bytes(pickled)
    files.read_state_dict(path)
    stand_in = pickles.read(io.BytesIO(pickled))["callbacks"][0]
    assert isinstance(stand_in, pickles.Call)
    assert stand_in.state == {"best": {"score": 1.5}}
    assert Callback.made == 1


class Reduced:
    """Pickles as whatever call it is given."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def attacks(trace):
    """Pickles that make the file `trace` when Python loads them, by different instructions."""
    shell = f"touch {trace}"
    python = f"open({str(trace)!r}, 'w')"
    system = ("posix", "system") if os.name == "posix" else ("nt", "system")
    return {
        "reduce": pickle.dumps({"w": Reduced(os.system, (shell,))}),
        "protocol 2": pickle.dumps({"w": Reduced(os.system, (shell,))}, protocol=2),
        "eval": pickle.dumps({"w": Reduced(eval, (python,))}),
        "exec": pickle.dumps({"state_dict": {"w": Reduced(exec, (python,))}}),
        "open": pickle.dumps(Reduced(open, (str(trace), "w"))),
        "getattr": pickle.dumps(Reduced(getattr, (Reduced(__import__, ("os",)), "system"))),
        "state": pickle.dumps(Reduced(Callback, (), {"x": Reduced(os.system, (shell,))})),
        "instance": opcodes("(", push(shell), f"i{system[0]}\n{system[1]}\n"),
        "object": opcodes("(", f"c{system[0]}\n{system[1]}\n", push(shell), "o"),
        "new object": opcodes(f"c{system[0]}\n{system[1]}\n", push((shell,)), b"\x81"),
        "popped": opcodes(f"c{system[0]}\n{system[1]}\n", push((shell,)), "R0}"),
        "stack global": b"\x80\x04" + push(system[0]) + push(system[1]) + b"\x93"
        + push((shell,)) + b"R.",
        "through torch": opcodes("ctorch.serialization\nos.system\n", push((shell,)), "R"),
        "numpy's": opcodes("cnumpy.testing._private.utils\nrunstring\n", push((python, {})), "R"),
        "subclasses": opcodes("cbuiltins\nobject.__subclasses__\n)R"),
        "as a storage": opcodes(
            "}", push("w"), tensor(where=b"c" + "\n".join(system).encode() + b"\n"), "s"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("attack", sorted(attacks("x")))
def test_pickles_that_would_run_code_are_refused_and_not_run(attack, wrapped, tmp_path):
    trace, path = tmp_path / "ran", tmp_path / "evil.pt"
    code = attacks(trace)[attack]
    if wrapped:
        archive(path, code)
    else:
        path.write_bytes(code)
    message = error_of(files.read_state_dict, path)
    assert "which can run code: refused" in message
    assert str(path) in message
    assert not trace.exists()


def test_the_attacks_of_these_tests_are_real(tmp_path):
    for name in ("reduce", "eval", "state", "instance", "object", "stack global", "popped"):
        trace = tmp_path / name.replace(" ", "_")
        with contextlib.suppress(Exception):
            pickle.loads(attacks(trace)[name])
        assert trace.exists(), name


def test_names_that_are_neither_known_nor_dangerous_are_not_imported(tmp_path):
    path = tmp_path / "x.pt"
    module = "a_module_that_nobody_has"
    path.write_bytes(opcodes(f"c{module}\nthing\n)R0", state_dict(("w", push(None)))[2:-1]))
    assert "no state dict: w" in error_of(files.read_state_dict, path)
    assert module not in sys.modules
    before = set(sys.modules)
    archive(path, opcodes("cantigravity\nfly\n)R0", state_dict(("w", tensor()))[2:-1]))
    assert files.read_state_dict(path).keys() == {"w"}
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (tensor((2, 3), (3, 1), 1), "beyond the 24 bytes"),
        (tensor((2, 3), (3, 2)), "beyond the 24 bytes"),
        (tensor((10**15,), (1,)), "beyond the 24 bytes"),
        (tensor((2**62,), (0,)), "are no sizes"),
        (tensor((2, 3), (-3, 1)), "are no sizes"),
        (tensor((-2, 3), (3, 1)), "are no sizes"),
        (tensor((2, 3), (3, 1), -4), "are no sizes"),
        (tensor((2, 3), (3, 1), 2**70), "are no sizes"),
        (tensor((2.0, 3), (3, 1)), "are no sizes"),
        (tensor((True, 3), (3, 1)), "are no sizes"),
        (tensor((2, 3), (3,)), "2 sizes and 1 strides"),
        (tensor(33 * (1,), 33 * (1,)), "33 sizes"),
        (tensor((2**40,), (0,)), "would unpack"),
        (tensor((2**20, 2**20), (0, 0)), "would unpack"),
        (tensor(where=storage(count=2**63)), "are no sizes"),
        (tensor(where=storage(key="1")), "data/1"),
        (tensor(where=storage(key="../data.pkl")), "data.pkl"),
        (tensor(where=storage(kind="QInt8Storage")), "type qint8"),
        (tensor(where=push(("storage",)) + b"Q"), "damaged"),
        (tensor(where=push("storage") + b"Q"), "damaged"),
        (tensor(where=b"Pstorage\n"), "damaged"),
        (tensor(where=push(None)), "damaged"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "damaged"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n" + push(5) + b"R", "damaged"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", "damaged"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n)R", "no state dict: w"),
        (push(7), "no state dict: w"),
        (push([1, 2]), "no state dict: w"),
    ],
)
def test_hostile_tensors_end_in_one_line(broken, expected, tmp_path):
    path = archive(tmp_path / "x.pt", state_dict(("w", broken)))
    message = error_of(files.read_state_dict, path)
    assert expected in message
    assert str(path) in message


def test_stated_sizes_are_bounded_over_all_tensors(tmp_path, monkeypatch):
    """Many tensors may share a storage, as tied weights do; not without end."""
    path = archive(tmp_path / "x.pt", state_dict(*((f"w{i}", tensor()) for i in range(50))))
    assert len(files.read_state_dict(path)) == 50
    monkeypatch.setattr(torch_arrays, "FREE", 0)
    monkeypatch.setattr(torch_arrays, "RATIO", 0.2)
    assert "would unpack" in error_of(files.read_state_dict, path)


@pytest.mark.parametrize(
    ("pickled", "expected"),
    [
        (opcodes(push([1])), "holds a list, not a state dict"),
        (opcodes("cmodels\nNet\n)R"), "holds a whole Python object, not a state dict"),
        (opcodes("}", push(3), push(1), "s"), "a key that is no text"),
        (opcodes("}", push("a\nb"), push(1), "s"), "no state dict: 'a\\nb'"),
        (opcodes("("), "damaged"),
        (opcodes(), "damaged"),
        (opcodes("R"), "damaged"),
        (opcodes("h\x07"), "damaged"),
        (opcodes("}}", push(1), "s"), "a key that is no text"),
        (opcodes("}(", push(1), "u"), "damaged"),
        (b"\x80\x02\x82\x01.", "EXT1 is not supported"),
        (b"\x80\x05\x97.", "NEXT_BUFFER is not supported"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc.", "damaged"),
        (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.", "damaged"),
        (b"\x80\x02r" + struct.pack("<I", 2**32 - 1) + b".", "damaged"),
        (b"\x80\x02\xff.", "damaged"),
    ],
)
def test_pickles_of_other_things_end_in_one_line(pickled, expected, tmp_path):
    for path in (archive(tmp_path / "x.pt", pickled), tmp_path / "bare"):
        if path.name == "bare":
            path.write_bytes(pickled)
        message = error_of(files.read_state_dict, path)
        assert expected in message
        assert str(path) in message


def nested(depth, width=1):
    """A tuple in a tuple in a tuple ..., `width` times each: width^depth of them if copied."""
    return b"N" + depth * ((width - 1) * b"2" + bytes([0x84 + width]))


def test_deep_nesting_and_endless_values_do_no_harm(tmp_path):
    """A nested tuple's hash recurses in C and ends the process; printed, one never ends."""
    path = tmp_path / "x.pt"

    def places(deep):
        yield opcodes("}", deep, "Ns", push("w"), tensor(), "s")
        yield state_dict(("w", tensor(where=storage().replace(push("0"), deep))))
        yield opcodes("}", push("w"), deep, "s")
        yield state_dict(("w", tensor(where=b"(" + 5 * deep + b"tQ")))
        yield state_dict(("w", tensor().replace(push(0), deep)))
        yield state_dict(("w", tensor().replace(push((2, 3)), deep)))
        yield state_dict(("w", b"cnumpy\ndtype\n" + deep + b"R"))

    for pickled in (*places(nested(100, width=2)), *itertools.islice(places(nested(250_000)), 2)):
        archive(path, pickled)
        assert len(error_of(files.read_state_dict, path)) < 400
        path.write_bytes(pickled)
        assert len(error_of(files.read_state_dict, path)) < 400
    for place in (push("7"), pickle.dumps(["7"], protocol=2)[2:-1]):
        path.write_bytes(legacy().replace(place, nested(100, width=2)))
        assert len(error_of(files.read_state_dict, path)) < 400
    wrapped = 5_000 * b"ctorch._utils\n_rebuild_parameter\n" + tensor() + 5_000 * b"\x85R"
    archive(path, state_dict(("w", wrapped)))
    assert "damaged" in error_of(files.read_state_dict, path)


def test_big_endian_archives_are_refused(tmp_path):
    path = archive(tmp_path / "x.pt", state_dict(("w", tensor())), byteorder=b"big")
    assert "big-endian" in error_of(files.read_state_dict, path)
    old = b"".join(
        pickle.dumps(v, protocol=2)
        for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False})
    )
    path.write_bytes(old)
    assert "big-endian" in error_of(files.read_state_dict, path)


def test_archives_with_none_or_two_pickles_or_compressed_ones(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", state_dict())
        file.writestr("b/data.pkl", state_dict())
    assert "2 files data.pkl" in error_of(files.read_state_dict, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", state_dict(("w", tensor())))
        file.writestr("a/data/0", DATA.tobytes())
    np.testing.assert_array_equal(files.read_state_dict(path)["w"], DATA.reshape(2, 3))


def test_the_machine_follows_every_instruction_of_pythons_pickler():
    shared = [1, 2]
    value = {
        "numbers": [0, 1, -1, 300, 70_000, 2**40, -(2**40), 1.5, True, False, None],
        "text": ["a", "é" * 300, b"bytes", b"b" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "shared": [shared, shared],
        "dict": {1: 2, "a": {}},
        "list": [[]],
    }
    for protocol in range(2, 6):
        for optimised in (False, True):
            pickled = pickle.dumps(value, protocol=protocol)
            pickled = pickletools.optimize(pickled) if optimised else pickled
            read = pickles.read(io.BytesIO(pickled))
            expected = value
            if protocol == 2:  # which writes bytes as a call
                read["text"], expected = read["text"][:2], value | {"text": value["text"][:2]}
            assert read == expected
            assert read["shared"][0] is read["shared"][1]


def legacy():
    """The format before zip archives, by hand."""
    heads = (MAGIC, 1001, {"little_endian": True})
    where = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + push("7") + push("cpu") + push(6)
        + b"NtQ"
    )  # fmt: skip
    return (
        b"".join(pickle.dumps(v, protocol=2) for v in heads)
        + state_dict(("w", tensor(where=where)))
        + pickle.dumps(["7"], protocol=2)
        + struct.pack("<q", 6)
        + DATA.tobytes()
    )


def test_the_format_before_zip_archives(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(legacy())
    np.testing.assert_array_equal(files.read_state_dict(path)["w"], DATA.reshape(2, 3))
    for wrong in (2**40, 2**62, -1):
        path.write_bytes(legacy().replace(struct.pack("<q", 6), struct.pack("<q", wrong)))
        assert "beyond the end" in error_of(files.read_state_dict, path)


def zip_bytes():
    buffer = io.BytesIO()
    archive(buffer, state_dict(("w", tensor()), ("v", tensor((3,), (2,), 1))))
    return buffer.getvalue()


WHOLE = {
    "zip": zip_bytes(),
    "old": legacy(),
    "arrays": pickle.dumps({"a": np.arange(5), "b": np.ones(3, np.float32)}),
}


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_any_truncation_is_an_error(kind, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(WHOLE[kind][: data.draw(st.integers(0, len(WHOLE[kind]) - 1))])
    error_of(files.read_state_dict, path)


@pytest.mark.filterwarnings("ignore:.*invalid escape sequence:DeprecationWarning")
@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_damage_anywhere_raises_nothing_but_a_user_error(kind, data, tmp_path_factory):
    content = bytearray(WHOLE[kind])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    with contextlib.suppress(files.UserError):
        tensors = files.read_state_dict(path)
        assert sum(tensor_.nbytes for tensor_ in tensors.values()) < 2**10
