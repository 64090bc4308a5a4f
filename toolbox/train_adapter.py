"""Trains EZIGen's adapter on a large set, on one GPU, several, or several machines.

    accelerate launch toolbox/train_adapter.py --model <folder> --data <folder> --out <folder>

docs/train_adapter.md tells how; `--help` lists the settings.
"""

from __future__ import annotations

import sys

from _load import load_pack, run  # ty: ignore[import-not-found] (this folder is on the path of a script)

load_pack()  # also in the processes that read the data, which import this file where they are not forks

if __name__ == "__main__":
    sys.exit(run("toolbox.adapter_trainer.run", sys.argv[1:]))
