# SPDX-License-Identifier: Apache-2.0
"""``python -m virt_dib`` is the command ``virt-dib``."""

import sys

from virt_dib.cli import main

if __name__ == "__main__":
    sys.exit(main())
