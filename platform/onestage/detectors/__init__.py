"""One file per paper; ``conf/detector/*.yaml`` names the class."""
