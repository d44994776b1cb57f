"""Proof by breaking it. docs/reliability.md says which test shows which promise."""
