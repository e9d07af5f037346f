"""Install nbs_lib, and the wheels that Kaggle's image lacks, from the attached datasets, offline.

Part of the dataset with the library; the first cell of every stage notebook runs it.
"""

import os
import subprocess
import sys
from pathlib import Path

root = Path(os.environ.get("NBS_KAGGLE_INPUT", "/kaggle/input"))
locks = list(root.glob("**/*/wheelhouse.lock"))
names = [line.split("==")[0] for lock in locks for line in lock.read_text().splitlines()]
links = [f"--find-links={lock.parent}" for lock in locks]
pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
subprocess.run([*pip, *links, *names], check=True)
