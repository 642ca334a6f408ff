"""The one-line message of a user's mistake."""

import pytest

from cdul_steps.errors import UserError


def message_of(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message
