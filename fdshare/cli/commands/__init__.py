"""The commands, one file a family, imported when one of them is used."""
