"""Units of the latent: who states them, and what is known where nobody does.

A diffusion model is trained on (z - shift) scaling, or on (z - mean) / std scaling, of an
autoencoder's latents z. Some files say so, others leave it to the diffusion model's config, and
models with other units have the same shapes. `config.latent.stated` tells whether the numbers in
`config.latent` come from a file, an option or a run's config, or are neutral for want of any.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from efae_jax.errors import UserError
from efae_jax.models.build import build_normalisation

PLAYGROUND_SCALING = 0.5  # of (z - mean) / std, beside `edm_mean` and `edm_std`
PATCH = 2  # side of the patches of a latent whose packed channels batch statistics are of
PATCH_EPS = 1e-4  # which FLUX.2 adds to their variance
COUNTER = "bn.num_batches_tracked"
_SCALING, _SHIFT = ("scale_factor", "scaling_factor"), ("shift_factor",)


@dataclasses.dataclass(frozen=True)
class Family:
    """Published AutoencoderKLs with one structure and one pair of units.

    Attributes:
      name: as people call the diffusion models.
      latent_channels, widths: of the autoencoder.
      quant: it has both 1x1 convolutions around the latent.
      scaling, shift: the units.
      beside: how names begin that only checkpoints with the whole diffusion model have.
    """

    name: str
    latent_channels: int
    quant: bool
    scaling: float
    shift: float = 0.0
    widths: tuple[int, ...] = (128, 256, 512, 512)
    beside: tuple[str, ...] = ()

    @property
    def options(self) -> str:
        """As a user would state these units."""
        shift = f" --shift-factor {self.shift:g}" if self.shift else ""
        return f"--scaling-factor {self.scaling:g}{shift}"


_CLIP = ("cond_stage_model.transformer.text_model.", "cond_stage_model.model.ln_final.")
FAMILIES = (
    Family("Stable Diffusion 1 and 2", 4, True, 0.18215, beside=_CLIP),
    Family("SDXL", 4, True, 0.13025, beside=("conditioner.embedders.",)),
    Family("Stable Diffusion's x4 upscaler", 4, True, 0.08333, widths=(128, 256, 512)),
    Family("FLUX.1", 16, False, 0.3611, 0.1159, beside=("model.diffusion_model.double_blocks.",)),
    Family(
        "Stable Diffusion 3",
        16,
        False,
        1.5305,
        0.0609,
        beside=("model.diffusion_model.joint_blocks.",),
    ),
)


class Found(NamedTuple):
    """What a state dict says of its units.

    Attributes:
      tensors: the others.
      fields: of `config.latent`; empty for none.
      batches: the counter beside batch statistics.
    """

    tensors: dict[str, np.ndarray]
    fields: dict[str, Any]
    batches: int = 0


def split(tensors: Mapping[str, np.ndarray], where: Any) -> Found:
    """Parts a state dict into weights and what states the units of the latent.

    Read are `scale_factor`, which latent-diffusion stores where it was measured, `edm_mean` with
    `edm_std` (Playground's), and `bn.running_mean` with `bn.running_var`, which FLUX.2 has of the
    latent's 2x2 patches.

    Args:
      tensors: names without the autoencoder's prefix, and those that lie outside.
      where: the file, for errors.

    Raises:
      UserError: for values that no unit can have.
    """
    rest, fields, batches = dict(tensors), {}, 0
    for field, names in (("scaling", _SCALING), ("shift", _SHIFT)):
        found = {
            n: _scalar(rest.pop(n), n, where) for n in [*rest] if n.removeprefix("model.") in names
        }
        if len(set(found.values())) > 1:
            raise UserError(f"{where} states its units twice: {found}")
        if found:
            fields[field] = next(iter(found.values()))
    if fields.get("scaling", 1.0) <= 0:
        raise UserError(f"{where}: scale_factor is {fields['scaling']:g}; it must be positive")
    if {"edm_mean", "edm_std"} <= rest.keys():
        fields["mean"], fields["std"] = (
            _vector(rest.pop(n), n, where) for n in ("edm_mean", "edm_std")
        )
        fields.setdefault("scaling", PLAYGROUND_SCALING)
    if {"bn.running_mean", "bn.running_var"} <= rest.keys():
        fields["mean"] = _vector(rest.pop("bn.running_mean"), "bn.running_mean", where)
        fields["variance"] = _vector(rest.pop("bn.running_var"), "bn.running_var", where)
        fields |= {"patch": PATCH, "eps": PATCH_EPS}
        if COUNTER in rest:
            batches = int(_scalar(rest.pop(COUNTER), COUNTER, where))
    return Found(rest, fields, batches)


def set_known(config: Any, found: Found, outside: Iterable[str] = ()) -> list[str]:
    """Puts what is known into a config that `model.new_config` has made.

    Args:
      config: of the model; its structure tells the family where there are several.
      found: what the state dict says.
      outside: names beside the autoencoder, which tell the diffusion model.

    Returns:
      where the units come from, one line, or nothing.
    """
    fields, note = dict(found.fields), ""
    if not fields and (family := recognise(config, outside)):
        fields = {"scaling": family.scaling, "shift": family.shift}
        note = (
            f"the units of the latent are those of {family.name}, which is in the file: scaling "
            f"{family.scaling:g}, shift {family.shift:g}"
        )
    elif fields:
        shown = ", ".join(f"{n} {v:g}" for n, v in fields.items() if isinstance(v, float))
        shown = "mean and variance of its patches" if "variance" in fields else shown
        note = f"the file states the units of the latent: {shown}"
    if not fields:
        return []
    with config.unlocked():
        config.latent.update(fields)
        config.latent.stated = True
        if "variance" in fields:
            config.model.batches = found.batches
    return [note]


def batch_statistics(config: Any, dtype: str) -> dict[str, np.ndarray]:
    """The tensors `bn.*` of a model with packed units; the inverse of `split`.

    Args:
      dtype: of the state dict; numbers that it does not hold stay in float32.
    """
    latent = config.latent
    if latent.get("patch", 1) == 1:
        return {}
    exact = {
        "bn.running_mean": np.array(latent.mean, np.float32),
        "bn.running_var": np.array(latent.variance, np.float32),
    }
    with np.errstate(over="ignore"):
        narrow = {name: a.astype(np.dtype(dtype)) for name, a in exact.items()}
    kept = all(np.array_equal(narrow[n].astype(np.float32), a) for n, a in exact.items())
    counter = {COUNTER: np.array(config.model.get("batches", 0), np.int64)}
    return (narrow if kept else exact) | counter


def is_stated(config: Any) -> bool:
    """Whether somebody said how the latent is scaled.

    A run's config does. Of imports that kept no such field, neutral units were nobody's.
    """
    latent = config.latent
    if "stated" in latent:
        return latent.stated
    neutral = (latent.scaling, latent.shift, len(latent.mean)) == (1, 0, 0)
    imported = config.model.kind == "kl" and not config.get("method", "")
    return not (imported and neutral)


def override(config: Any, scaling: float | None, shift: float | None) -> list[str]:
    """Sets the units that a user has given, whatever stated others.

    Returns:
      what they take the place of, one line.

    Raises:
      UserError: for numbers that make no sense, alone or beside a mean and std per channel.
    """
    given = {"scaling": scaling, "shift": shift}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return []
    if not math.isfinite(given.get("scaling", 1.0)) or given.get("scaling", 1.0) <= 0:
        raise UserError(f"--scaling-factor {scaling}: scaling must be positive and finite")
    if not math.isfinite(given.get("shift", 0.0)):
        raise UserError(f"--shift-factor {shift}: shift must be finite")
    known = is_stated(config)
    if not known and scaling is None:
        raise UserError(
            "--shift-factor alone does not say how the latent is scaled; give --scaling-factor, too"
        )
    before = {name: config.latent[name] for name in given}
    with config.unlocked():
        config.latent.update({name: float(value) for name, value in given.items()})
        config.latent.stated = True
    try:
        build_normalisation(config)
    except ValueError as error:
        raise UserError(f"--shift-factor {shift}: {error}") from error
    changed = [n for n, value in given.items() if known and before[n] != value]
    if not changed:
        return []
    new, old = (", ".join(f"{n} {values[n]:g}" for n in changed) for values in (given, before))
    return [f"{new}, as given, takes the place of {old}, which the model states"]


def recognise(config: Any, outside: Iterable[str]) -> Family | None:
    """The family whose diffusion model lies in the same file.

    Args:
      config: of the model.
      outside: names outside the autoencoder.
    """
    outside = list(outside)
    for family in same_shapes(config):
        if any(name.startswith(family.beside) for name in outside if family.beside):
            return family
    return None


def same_shapes(config: Any) -> list[Family]:
    """The families whose structure a model has."""
    model = config.model
    if model.kind != "kl" or config.latent.get("patch", 1) != 1:
        return []
    plain = not model.decoder_widths and model.attention and model.blocks == 2
    plain &= not model.get("down_attention", ()) and not model.get("up_attention", ())
    return [
        f
        for f in FAMILIES
        if plain
        and tuple(model.widths) == f.widths
        and model.latent_channels == f.latent_channels
        and (model.quant, model.post_quant) == (f.quant, f.quant)
    ]


def unstated_note(config: Any) -> str:
    """What to say where nobody has stated the units; empty where somebody has."""
    if is_stated(config):
        return ""
    note = (
        "the file does not say how its latent is scaled; taken as 1, which only matters to "
        "diffusion models: "
    )
    return note + ways_to_state(config)


def ways_to_state(config: Any) -> str:
    """The options that state units, with the numbers of published models of these shapes."""
    ways = [f"{family.options} ({family.name})" for family in same_shapes(config)]
    if ways:
        return f"of these shapes are {' and '.join(ways)}"
    return "--scaling-factor and --shift-factor state it"


def _scalar(tensor: np.ndarray, name: str, where: Any) -> float:
    if tensor.size != 1 or tensor.dtype.kind not in "fiuV":
        raise UserError(
            f"{where}: {name} is {tensor.dtype.name}{tensor.shape}, expected one number"
        )
    value = tensor.reshape(())
    # The shortest decimal that float32 reads as this number: 0.18215, not 0.182150006.
    number = float(str(value[()])) if tensor.dtype == np.float32 else float(value)
    # Half precision has rounded the published number: it is that number which is meant.
    for known in {f.scaling for f in FAMILIES} | {f.shift for f in FAMILIES} - {0.0}:
        if tensor.dtype.itemsize == 2 and number == float(np.array(known).astype(tensor.dtype)):
            number = known
    if not math.isfinite(number):
        raise UserError(f"{where}: {name} is {number}; it must be finite")
    return number


def _vector(tensor: np.ndarray, name: str, where: Any) -> tuple[float, ...]:
    values = np.asarray(tensor, np.float32).reshape(-1)
    if not np.isfinite(values).all():
        raise UserError(f"{where}: {name} holds numbers that are not finite")
    if name.endswith(("std", "var")) and not (values > 0).all():
        raise UserError(f"{where}: {name} holds numbers that are not positive")
    return tuple(float(v) for v in values)
