"""The training job: `python jobs/train.py …` is `onestage train …`."""

import sys

from onestage.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
