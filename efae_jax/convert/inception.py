"""Pretrained weights of the InceptionV3 that the Frechet inception distance looks through.

torch-fidelity publishes them as weights-inception-2015-12-05-6726825d.pth, pytorch-fid, with the
same names, as pt_inception-2015-12-05-6726825d.pth. All of it must be there, the classifier of 1008
classes too, although no feature comes after it: it tells this network from torchvision's, which
has the same names and shapes up to there, and gives other features. The counters
`num_batches_tracked` may be there or not. Every other name that is missing or left over is an
error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efae_jax.convert import files, hub, layout
from efae_jax.errors import UserError
from efae_jax.models.functional import Net
from efae_jax.models.inception import InceptionV3
from efae_jax.paths import user_path

_COUNTER = re.compile(r".*\.bn\.num_batches_tracked$")
PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"
_CLASSIFIER = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
_OTHER_CLASSES = 1000  # of torchvision's
# A path here is that of the module, whose name is theirs too, and one of these.
_LEAVES = {
    "conv/kernel": ("conv.weight", layout.CONV),
    "bn/scale": ("bn.weight", layout.SAME),
    "bn/bias": ("bn.bias", layout.SAME),
    "bn/mean": ("bn.running_mean", layout.SAME),
    "bn/var": ("bn.running_var", layout.SAME),
}


def read_inception(source: str | os.PathLike[str]) -> layout.Params:
    """Pretrained parameters of `models.inception.InceptionV3`.

    Args:
      source: a state dict in a pickle of `torch.save`, safetensors or npz; where there is no such
        file, one of the hub, "owner/name/file".

    Raises:
      UserError: no such file, here or on the hub; a damaged one, one that names code, or one that
        is not of this network (every name listed), such as torchvision's.
    """
    path = inception_file(source)
    tensors = {n: a for n, a in files.read_state_dict(path).items() if not _COUNTER.match(n)}
    shape = getattr(tensors.get("fc.weight"), "shape", ())
    if shape[:1] == (_OTHER_CLASSES,) or any(n.startswith("AuxLogits.") for n in tensors):
        raise UserError(
            f"{source} is torchvision's InceptionV3, whose features are others; the FID needs "
            f"{PUBLISHED} of pytorch-fid, or torch-fidelity's weights-inception"
        )
    abstract = Net(lambda rngs: InceptionV3(rngs=rngs)).abstract
    entries = table(abstract)
    known = {name: a for name, a in tensors.items() if name not in _CLASSIFIER}
    problems = layout.name_problems([*(e.theirs for e in entries), *_CLASSIFIER], tensors)
    problems += layout.tensor_problems(entries, known, abstract)
    problems += [
        f"{name} is {tensors[name].shape}, expected {wanted}"
        for name, wanted in _CLASSIFIER.items()
        if name in tensors and tensors[name].shape != wanted
    ]
    problem = f"{source} does not hold the FID's InceptionV3"
    layout.require(problems or layout.finite_problems(tensors), problem)
    return layout.to_ours(entries, known)


def inception_file(source: str | os.PathLike[str]) -> Path:
    """The file that `read_inception` reads, fetched where it is one of the hub.

    Raises:
      UserError: where the hub does not have it.
    """
    path = Path(user_path(source))
    if not path.exists() and (address := hub.parse(str(source))) is not None:
        if not address.inside:
            raise UserError(f"{source}: no such file; one of the hub is named {source}/FILE")
        path = hub.fetch(str(source))
    return path


def table(abstract: Mapping[str, Any]) -> list[layout.Entry]:
    """The published names of these parameters."""
    entries = []
    for ours in layout.flatten(abstract):
        *module, layer, leaf = ours.split("/")
        theirs, how = _LEAVES[f"{layer}/{leaf}"]
        entries.append(layout.Entry(".".join([*module, theirs]), ours, how))
    return entries
