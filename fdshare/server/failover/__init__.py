"""The second process: keeper, journal, upgrade, and the copy at the service manager."""
