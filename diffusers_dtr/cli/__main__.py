"""`python -m diffusers_dtr.cli`, the same as the command `diffusers-dtr`."""

import sys

from . import main


sys.exit(main())
