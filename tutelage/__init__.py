"""Tutelage: serve LLM traffic through the cheapest model that is good enough, and grow those models from the traffic itself."""

__version__ = "0.1.0"
