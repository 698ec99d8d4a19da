"""The sweeping job: `python jobs/sweep.py …` is `onestage sweep …`."""

import sys

from onestage.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
