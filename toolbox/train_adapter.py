"""Train EZIGen's adapter on a large dataset, on one or several GPUs or machines.

    accelerate launch toolbox/train_adapter.py --model <folder> --data <folder> --out <folder>

See docs/train_adapter.md; `--help` lists the settings.
"""

import sys

from _load import load_pack, run  # ty: ignore[import-not-found] (this folder is on the path of a script)

load_pack()  # also in the data loader's processes, which import this file unless they are forks

if __name__ == "__main__":
    sys.exit(run("toolbox.adapter_trainer.run", sys.argv[1:]))
