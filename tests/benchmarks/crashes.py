"""A command that prints a whole report and then crashes, as one does whose memory is torn down wrongly."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.stdout.write(Path(sys.argv[1]).read_text())
    sys.stdout.flush()
    os.abort()
