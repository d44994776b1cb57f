"""Under a real systemd: this machine's own, as PID 1 of a container over a throw-away copy of /."""
