"""The table of errors is a promise to clients, and the documentation shows all of it."""

import json
import re
from pathlib import Path

import pytest

from clipdit_serve.errors import ERRORS, IMAGE_FAULTS, ApiError

PAGE = Path(__file__).parents[2] / "docs" / "serve.md"


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_has_openais_shape_and_its_rows_status(code: str):
    response = ApiError(code, "it went wrong", param="image", retry_after_s=3).response()
    assert response.status_code == ERRORS[code].status
    assert json.loads(bytes(response.body)) == {
        "error": {"message": "it went wrong", "type": ERRORS[code].type, "code": code, "param": "image"}
    }
    assert response.headers["retry-after"] == "3"
    assert ("www-authenticate" in response.headers) == (ERRORS[code].status == 401)


def test_the_documentation_lists_every_code_with_its_status():
    listed = {code: int(status) for status, code in re.findall(r"^\| (\d{3}) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)}
    assert listed == {code: kind.status for code, kind in ERRORS.items()}


def test_every_fault_of_an_image_has_a_row():
    assert set(IMAGE_FAULTS.values()) <= set(ERRORS)
