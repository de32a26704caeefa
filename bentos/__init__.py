"""What listens on a port through BentoML: one folder per service."""
