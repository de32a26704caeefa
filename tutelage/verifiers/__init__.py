"""Is an answer right: one rule a kind of task, by program where a program can tell, by a judge where none can.

`rules` holds the pure ones, `code` runs tests in a limited process, `judge` asks a model. None knows where answers come from.
"""

from tutelage.settings import VerifierSettings
from tutelage.verifiers.rules import KINDS, Verdict, Verifier, verifier

__all__ = ["KINDS", "Verdict", "Verifier", "VerifierSettings", "verifier"]
