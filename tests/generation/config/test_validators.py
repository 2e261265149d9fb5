"""Values of fields come out in one type, or are refused with the field's name and the value."""

from typing import Any

import numpy as np
import pytest

from jaxgen.generation.config.validators import integer, number, positive, token_id, token_ids


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (integer, np.int64(3), 3),
        (integer, None, None),
        (positive, 1, 1),
        (token_ids, None, ()),
        (token_ids, 5, (5,)),
        (token_ids, np.array([5, 6]), (5, 6)),
        (token_id, [7], 7),
        (token_id, None, None),
    ],
)
def test_a_value_of_any_library_comes_out_in_one_type(check: Any, value: Any, expected: Any) -> None:
    assert check("field", value) == expected


@pytest.mark.parametrize(("value", "expected"), [(None, 2.0), (1, 1.0), (np.float32(0.5), 0.5)])
def test_a_number_has_a_default(value: Any, expected: float) -> None:
    assert number("field", value, 2.0) == expected


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (integer, True, "`field`=True must be an integer"),
        (integer, 1.0, "`field`=1.0 must be an integer"),
        (positive, 0, "`field`=0 must be at least 1"),
        (token_ids, [5, True], "`field`=.5, True. must be a token id or a list of them"),
        (token_id, [5, 6], "`field`=.5, 6. must be one token id"),
        (token_id, 2**31, "`field`=2147483648 must be one token id of at most 32 bits"),
        (lambda name, value: number(name, value, 1.0), float("nan"), "`field`=nan must be a finite number"),
        (lambda name, value: number(name, value, 1.0), True, "`field`=True must be a finite number"),
    ],
)
def test_other_values_are_refused_by_name(check: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check("field", value)
