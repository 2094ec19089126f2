"""Two small images evaluated by a model of large ones, in little memory."""

import json
import os
import subprocess
import sys

from conftest import ROOT
from saved_models import conv_config, folder_of_images, save

# Not ru_maxrss, which a process inherits from the one that starts it.
COMMAND = """
import sys
from pathlib import Path
from efae_jax.__main__ import main
code = main(sys.argv[1:])
peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
print("peak", peak.split()[1])
sys.exit(code)
"""


def test_two_small_images_take_little_memory(tmp_path):
    """They are resized to the config's 256 pixels; a batch of 32 took 18 GB with LPIPS."""
    workdir = save(tmp_path / "kl", conv_config(size=(256, 256), widths=(4, 4, 8, 8)))
    folder = folder_of_images(tmp_path / "images", [(32, 32)] * 2)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    arguments = ["evaluate", "--model", workdir, "--data", folder, "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "used 2 of 2 images" in done.stdout
    peak = int(done.stdout.split("peak ")[1])
    assert peak * 1024 < 3e9
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["data"]["read"] == {"images": 2, "used": 2, "left_out": {}}
