"""``python -m jaxnorm``."""

import sys

from .cli import main

sys.exit(main())
