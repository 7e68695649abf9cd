"""``python -m samantics``: see `samantics.cli`."""

import sys

from samantics.cli import main

sys.exit(main())
