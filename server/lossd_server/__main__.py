"""`python -m lossd_server` is the `lossd` command."""

from lossd_server.cli import main

main()
