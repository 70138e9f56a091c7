"""`python -m vexact` is the command `vexact`."""

from vexact.cli import main

raise SystemExit(main())
