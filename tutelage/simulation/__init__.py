"""A fleet of students whose truth is known, judged by the rules that judge real ones: what are the engine's own error rates?"""
