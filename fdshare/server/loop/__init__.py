"""What the server does: one thread and epoll carry out what core decided."""
