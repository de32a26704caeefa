"""How strong the evidence for one promotion must be when many students are tried in a year.

e-LOND (Xu and Ramdas 2024, "Online multiple testing with e-values", AISTATS): the t-th test of the year is passed at an e-value of at least
1 / αₜ with αₜ = α γₜ (R + 1), where R counts those passed by then and γ sums to at most 1. Then the expected share of false
ones among all that passed is at most α, whatever the dependence between the tests, and each may be looked at after every query.
γₜ = a / ((t + a − 1)(t + a)) sums to 1 over endless tests; half of it goes to the first `a`.
A pure rule; it refuses to know what is tested.
"""

from __future__ import annotations


def needed(number: int, passed: int, *, alpha: float, half: int, least: float) -> float:
    """The e-value that test `number` (from 1) of the year needs when `passed` of the others have been passed, never below `least`.

    `half`: so many tests share half of `alpha`. Raises ValueError for a number below 1 or a negative count.
    """
    if number < 1 or passed < 0:
        raise ValueError(f"test {number} with {passed} passed: tests are numbered from 1, and a count is not negative")
    share = half / ((number + half - 1) * (number + half))
    return max(least, 1 / (alpha * share * (passed + 1)))
