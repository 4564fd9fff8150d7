"""The command `diffusers-dtr`. An installation has this file as a module of its own beside the package.

Importing the package takes seconds, because diffusers has to know its models; `--version` and `--help` should not.
"""

import runpy
from importlib.util import find_spec


def main() -> int:
    """Run the package's `cli/command.py` without importing the package."""
    (folder,) = find_spec("diffusers_dtr").submodule_search_locations
    return runpy.run_path(f"{folder}/cli/command.py")["main"]()
