"""Lets the environment it runs in see the packages of another one: `python borrow.py .venv`."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    lender = Path(sys.argv[1]).absolute()
    own = Path(sysconfig.get_path("purelib"))
    theirs = lender / own.relative_to(Path(sys.prefix).absolute())
    # Added, as a site directory is: the checkout is installed there by a .pth file.
    (own / "borrowed.pth").write_text(f"import site; site.addsitedir({str(theirs)!r})\n")
