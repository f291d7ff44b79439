"""`python -m llmc.data prepare ...`."""

import sys

from llmc.data.prepare import main

if __name__ == "__main__":
    sys.exit(main())
