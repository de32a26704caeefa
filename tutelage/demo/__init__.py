"""`tutelage demo`: real traffic through the whole loop, and a report of what it was worth.

`traffic` makes or reads the requests, `run` sends them and drives the cycle, `outcome` computes the report from what was
observed, `page` and `console` show it, `memory` measures what it took.
"""
