"""``python -m onestage.cli``."""

import sys

from onestage.cli.app import main

sys.exit(main())
