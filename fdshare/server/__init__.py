"""The rendezvous server: a pure registry, policy and service, and the loop around them."""
