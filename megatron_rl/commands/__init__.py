"""Parts of the command line (cli.py): groups of commands, and the options that several share."""
