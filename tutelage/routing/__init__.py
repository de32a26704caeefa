"""Which model should answer: find the domain of a request, and say how sure a student is of its answer."""
