"""common/functions.py: functions of the user's own."""

import pytest

from common.cli import UserError
from common.functions import function_file


@pytest.mark.parametrize(
    "text",
    [
        "def score(m, r): return 1\n",
        "if True:\n    from math import sqrt as score\n",
        "score = lambda m, r: 1\n",
        "from math import *\n",
        "def __getattr__(name): return len\n",
    ],
)
def test_a_function_is_known_to_be_there_without_running_its_file(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert function_file(f"{path}:score", "--reward_function", "x.py:y", look=True) == (path, "score")


def test_a_function_that_is_not_there(tmp_path):
    (tmp_path / "mine.py").write_text("def scor(m, r): return 1\n")
    with pytest.raises(UserError, match="has no function score, did you mean 'scor'"):
        function_file(f"{tmp_path / 'mine.py'}:score", "--reward_function", "x.py:y", look=True)
