"""Commands: from the words of a command line to an exit code, one file each; help, and what mistyped words may mean."""
