"""The command line: `main` defines the arguments of each command, and the file named after the command runs it."""
