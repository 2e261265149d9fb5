"""The command line: `main` says what each command takes, and a file of its name what it does."""
