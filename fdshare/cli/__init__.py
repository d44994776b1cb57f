"""The command line. One file a family of commands, imported when one of them is used."""
