"""What a file is that was taken for weights, and what to do about it, in words."""

from __future__ import annotations

from efae_jax import json_files
from efae_jax.data.bad_image import looks_like

_UNPACK = "unpack it, and give the file in it"
_CONVERT = "have its program save PyTorch's weights as safetensors"
# start of the content -> what it is, and what to do
_STARTS = {
    b"version https://git-lfs": ("a Git LFS pointer", "`git lfs pull` fetches the file itself"),
    b"GGUF": ("a GGUF file of llama.cpp", _CONVERT),
    b"GGML": ("a GGML file", _CONVERT),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, such as Keras writes", _CONVERT),
    b"\x1f\x8b": ("compressed by gzip", _UNPACK),
    b"BZh": ("compressed by bzip2", _UNPACK),
    b"\xfd7zXZ\0": ("compressed by xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"\x93NUMPY": ("a .npy file, which holds one array without a name", "save an .npz"),
}
HEAD = 4096  # bytes of a file's start that are looked at


def describe(head: bytes, whole: bool) -> tuple[str, str]:
    """(what it is, what to do) of content that is no file of weights.

    Args:
      head: its first `HEAD` bytes.
      whole: whether that is all of it.
    """
    if not head:
        return "an empty file", "the download or copy may have failed: fetch it again"
    for start, words in _STARTS.items():
        if head.startswith(start):
            return words
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite file", _CONVERT
    if head[:1] == b"\x08" and any(word in head for word in (b"pytorch", b"onnx", b"ONNX")):
        return "an ONNX file", _CONVERT
    if (text := _text(head)) is not None:
        return _describe_text(text, whole)
    # A map whose first key is a short text.
    if (head[0] in range(0x81, 0x90) and head[1] in range(0xA1, 0xC0)) or head[0] in (0xDE, 0xDF):
        return "a msgpack file, such as Flax writes", _CONVERT
    return looks_like(head), "give a file of weights"


def _describe_text(text: str, whole: bool) -> tuple[str, str]:
    start = text.lstrip()
    if start[:1] in ("{", "["):
        if '"weight_map"' in text:
            return "the index of weights in several files", "give the folder that holds them"
        try:
            json_files.parse(text.encode())
        except ValueError:
            if whole:
                return "a text file", "give a file of weights"
        return "a JSON file", "give the file or folder of weights that it belongs to"
    if start[:200].lower().startswith(("<!doctype", "<html", "<head", "<?xml")):
        return "a web page", "download the file itself (its page has a link for that)"
    return "a text file", "give a file of weights"


def _text(head: bytes) -> str | None:
    """The content if it is text; a character that the end of `head` cuts does no harm."""
    if b"\0" in head:
        return None
    for end in range(len(head), max(len(head) - 4, 0), -1):
        try:
            text = head[:end].decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        controls = sum(ord(c) < 32 and c not in "\t\n\r\f" for c in text)
        return text if controls == 0 else None
    return None
