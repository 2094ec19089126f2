"""Which files are images, by the endings of their names, and what the installed Pillow reads.

What an image is, its content says; the ending only says which files of a folder or a shard are
looked at. Types that some program reads and Pillow does not are counted, not passed over.
"""

from __future__ import annotations

import functools
import io

from PIL import Image

# Read by Pillow itself, from a signature at the start of the content. It would hand EPS and WMF
# to other programs or to the system; the rest of its list hold no photographs or need a stub.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "PSD"),
    *("QOI", "PCX", "DCX", "SGI", "SUN", "ICO", "CUR", "ICNS", "DDS", "XBM", "XPM", "MSP"),
    *("FITS", "PIXAR"),
)
# No signature: anything would pass for one, so that the ending of the name must say it.
UNSIGNED = {"TGA": (".tga", ".icb", ".vda", ".vst")}
# Of other programs, and those that Pillow reads by means that are not used here.
FOREIGN = frozenset(
    [
        ".dpx",
        ".cin",
        ".heics",
        ".heifs",
        ".mng",
        ".heic",
        ".heif",
        ".hif",
        ".jxl",
        ".jxr",
        ".hdp",
        ".wdp",
        ".exr",
        ".hdr",
        ".svg",
        ".svgz",
        ".eps",
        ".ps",
        ".pdf",
        ".ai",
        ".psb",
        ".xcf",
        ".kra",
        ".wmf",
        ".emf",
        ".dng",
        ".cr2",
        ".cr3",
        ".crw",
        ".nef",
        ".nrw",
        ".arw",
        ".srf",
        ".sr2",
        ".raf",
        ".orf",
        ".rw2",
        ".pef",
        ".srw",
        ".x3f",
        ".raw",
        ".3fr",
        ".iiq",
        ".bpg",
        ".flif",
        ".pcd",
        ".djvu",
        ".jbig2",
        ".jls",
        ".dcm",
    ]
)
# Endings of types that are read which Pillow's list lacks.
_ALSO = {".mpo": "JPEG", ".jif": "JPEG", ".jfi": "JPEG", ".jpg_large": "JPEG"}
# Texts and tables that lie beside images; all else in a folder is counted.
COMPANIONS = frozenset(
    [
        ".txt",
        ".caption",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".parquet",
        ".xml",
        ".html",
        ".md",
        ".rst",
        ".yaml",
        ".yml",
        ".toml",
        ".cls",
        ".npy",
        ".npz",
        ".py",
        ".sh",
        ".log",
        ".db",
        ".ini",
        ".license",
    ]
)
VIDEOS = frozenset([".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv"])


@functools.cache
def extensions() -> tuple[str, ...]:
    """The endings of the types that are read here, usual ones first."""
    Image.init()
    usual = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
    registered = Image.registered_extensions() | _ALSO
    there = {e for e, name in registered.items() if _is_read(name)}
    # Pillow names the endings of what it could read were it built so.
    return tuple(e for e in usual if e in there) + tuple(sorted(there - {*usual}))


def listed_extensions() -> str:
    """The usual endings, and how many others, for a message."""
    usual, others = extensions()[:9], extensions()[9:]
    return f"{' '.join(usual)} and {len(others)} other types that Pillow reads"


def formats() -> tuple[str, ...]:
    """Names of the formats that the installed Pillow opens by their signature."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _is_read(name: str) -> bool:
    return name in Image.OPEN and (name in FORMATS or name in UNSIGNED)


def is_image(name: str) -> bool:
    """Whether a file of that name is an image that is read here."""
    return extension(name) in _read_extensions()


@functools.cache
def _read_extensions() -> frozenset[str]:
    return frozenset(extensions())


def foreign(name: str) -> str | None:
    """What to call a file of that name that is an image or a video, and is not read; else None."""
    ending = extension(name)
    if ending in _read_extensions():
        return None
    if ending in FOREIGN or ending in _registered():
        return f"of type {ending}, which is not read here"
    return f"videos ({ending})" if ending in VIDEOS else None


@functools.cache
def _registered() -> frozenset[str]:
    Image.init()
    images = {e for e, name in Image.registered_extensions().items() if name in Image.OPEN}
    return frozenset(images - {".h5", ".hdf", ".grib", ".bufr"} - VIDEOS)


def extension(name: str) -> str:
    """The ending from the last dot on, in lower case."""
    stem, dot, ending = name.rpartition(".")
    # A name that begins with its only dot has no ending.
    return f".{ending}".lower() if dot and stem[-1:] not in ("", "/") and "/" not in ending else ""


def is_unsigned(name: str) -> bool:
    """Whether only the name of such a file tells its type."""
    return any(extension(name) in endings for endings in UNSIGNED.values())


def stored(content: bytes, name: str) -> bytes | Image.Image:
    """The image in a file of that name, as sources give it: its content, or, of the types that
    only a name tells, the opened image."""
    ending = extension(name)
    for form, endings in UNSIGNED.items():
        if ending in endings:
            return Image.open(io.BytesIO(content), formats=(form,))
    return content
