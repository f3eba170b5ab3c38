"""What `trace` reads out of a recording; to record takes a GPU."""

from tests.kernels import trace


def event(thread, phase, name, cycles):
  return dict(tid=thread, ph=phase, name=name, ts=cycles / 1000)


def test_spans_lie_in_each_other_and_threads_apart():
  events = [
    event(1, "B", "item", 100), event(2, "B", "item", 7), event(1, "B", "softmax", 130),
    event(1, "E", "softmax", 150), event(2, "E", "item", 9), event(1, "E", "item", 200),
    event(3, "B", "item", 0), event(3, "E", "item", 40),
  ]  # fmt: skip
  found = trace.spans(events)
  assert [[span.name, round(span.begin), round(span.cycles)] for span in found[1]] == [
    ["item", 0, 100],
    ["softmax", 30, 20],
  ]
  _, of_first, softmax, of_second = (line.split() for line in trace.summary(found, per_block=2))
  assert of_first[:4] == ["0", "item", "2", "70"] and softmax[:4] == ["0", "softmax", "1", "20"]
  assert of_second[:4] == ["1", "item", "1", "2"]


def test_cases_are_those_of_the_experiments():
  names = list(trace.all_cases())
  assert len(set(names)) == len(names) > 50
  assert trace.select("grad-segments-full", names) and trace.select("paged-b32-prefix", names)
