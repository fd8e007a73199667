"""The `hubsync` command. `hubsync.cli.commands` is the table of commands; each has a module of its name here."""
