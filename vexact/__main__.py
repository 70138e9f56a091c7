"""`python -m vexact` is the command `vexact`."""

from vexact import interrupt

interrupt.install()  # before the imports of the command line, which a signal may meet already

from vexact.cli import main  # noqa: E402

code = main()
exec("")  # CPython notes that an interrupt has left some exec(), even if it is caught later, and would die by SIGINT
raise SystemExit(code)
