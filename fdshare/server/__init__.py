"""The rendezvous server: a pure table, policy and service, and the loop around them."""
