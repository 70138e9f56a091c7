"""`python -m vexact` is the command `vexact`."""

from vexact import interrupt

interrupt.install()  # before the imports of the command line, which a signal may meet already

from vexact.cli import main  # noqa: E402

raise SystemExit(main())
