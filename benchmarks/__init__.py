"""Where every speed claim of fdshare comes from. `python -m benchmarks` runs all of it."""
