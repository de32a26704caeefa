"""The gateway as a Bento."""
