"""The measurements behind every speed claim of fdshare. `python -m benchmarks` runs them all."""
