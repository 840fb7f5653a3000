"""Places to publish to, on the loopback interface, and what can go wrong on the way there."""
