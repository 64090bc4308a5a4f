"""`python3 toolbox/demo.py`: set everything up and run the shipped HiPer graph in the toyworld, headless.

With --serve the server keeps running, to open the same graph in the browser. Set COMFYUI_PATH to use an existing
ComfyUI.
"""

import sys

from _load import set_up_and_run  # ty: ignore[import-not-found] (this folder is on the path of a script)

if __name__ == "__main__":
    sys.exit(set_up_and_run("toolbox.demonstration", sys.argv[1:]))
