"""`python toolbox/report.py --checkpoint FILE --image FILE --subject "a dog"`: what the pack does on your own machine.

Run it with the Python of your ComfyUI. It starts that ComfyUI on a folder of its own and writes a page with images,
times and memory that you can send.
"""

import sys

from _load import run  # ty: ignore[import-not-found] (this folder is on the path of a script)

if __name__ == "__main__":
    sys.exit(run("toolbox.reporting", sys.argv[1:]))
