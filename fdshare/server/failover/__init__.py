"""The second process: keeper, journal, upgrade, and the service manager's store."""
