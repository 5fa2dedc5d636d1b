"""Bad requests of every kind, what may come of them, and a server that does worse."""
