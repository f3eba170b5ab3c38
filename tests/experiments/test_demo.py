"""Answers as they come, on a terminal and elsewhere."""

import pytest

from experiments.demo import Answers
from experiments.serve import Request
from paged_flash import Params


def requests(count: int) -> list[Request]:
  return [Request(label=f"label {i}", text=f"question {i}", prompt=[1], params=Params()) for i in range(count)]


def test_a_finished_answer_is_printed_whole(capsys: pytest.CaptureFixture[str]):
  answers = Answers(requests(2), lines=0)
  answers.text(1, "First\nof ")
  answers.text(0, "Other")
  answers.text(1, "two.")
  assert not capsys.readouterr().out
  answers.end(1)
  assert capsys.readouterr().out == "[1] label 1: question 1\n  First of two.\n"
  answers.end(0)
  assert capsys.readouterr().out == "[0] label 0: question 0\n  Other\n"


def test_an_answer_without_text_is_printed(capsys: pytest.CaptureFixture[str]):
  Answers(requests(1), lines=0).end(0)
  assert capsys.readouterr().out == "[0] label 0: question 0\n"


def test_live_lines_show_the_running_answers(capsys: pytest.CaptureFixture[str]):
  answers = Answers(requests(3), lines=2)
  answers.text(0, "zero")
  answers.text(1, "one " * 100)
  shown = capsys.readouterr().err
  assert "[0] zero" in shown and "[1] " in shown
  assert max(len(line) for line in shown.replace("\r", "\n").split("\n")) < 130  # one line of a terminal each
  answers.end(0)
  answers.text(2, "two")  # takes the line of the one that ended
  assert "[2] two" in capsys.readouterr().err
  answers.end(1)
  answers.end(2)
