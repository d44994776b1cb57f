"""The rendezvous server: a pure core, the event loop around it, and a second process for both."""
