"""The table of broken code is about this code: each line to break is there once, and so is the test beside it.

That the tests do notice is for `python tests/scripts/mutants.py`, which takes half an hour.
"""

import pytest
from mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.where}")
def test_what_a_mutant_breaks_and_the_test_that_notices_are_there_once(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    file, name = mutant.test.split("::")
    assert (ROOT / file).read_text().count(f"def {name.partition('[')[0]}(") == 1
