"""Pretrained weights of the InceptionV3 that the Frechet inception distance looks through.

torch-fidelity publishes them as weights-inception-2015-12-05-6726825d.pth, pytorch-fid, with the
same names, as pt_inception-2015-12-05-6726825d.pth. Not read, because no feature comes after
them: the classifiers `fc.*` and `AuxLogits.*`. Nor are the counters `num_batches_tracked`.
Every other name that is missing or left over is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efae_jax.convert import files, hub, layout
from efae_jax.models.functional import Net
from efae_jax.models.inception import InceptionV3
from efae_jax.paths import user_path

_UNREAD = re.compile(r"(fc|AuxLogits)\.|.*\.num_batches_tracked$")
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
        is not of this network (every name listed).
    """
    path = Path(user_path(source))
    if not path.exists() and hub.parse(str(source)) is not None:
        path = hub.fetch(str(source))
    tensors = {n: a for n, a in files.read_state_dict(path).items() if not _UNREAD.match(n)}
    abstract = Net(lambda rngs: InceptionV3(rngs=rngs)).abstract
    problem = f"{source} does not hold the FID's InceptionV3"
    return layout.checked_to_ours(table(abstract), tensors, abstract, problem)


def table(abstract: Mapping[str, Any]) -> list[layout.Entry]:
    """The published names of these parameters."""
    entries = []
    for ours in layout.flatten(abstract):
        *module, layer, leaf = ours.split("/")
        theirs, how = _LEAVES[f"{layer}/{leaf}"]
        entries.append(layout.Entry(".".join([*module, theirs]), ours, how))
    return entries
