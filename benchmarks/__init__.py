"""Every speed claim of fdshare, measured beside what it is compared with. `python -m benchmarks`."""
