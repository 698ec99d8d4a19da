import pytest

from onestage.bench import tracking


def turn(seconds, *, waited_s=0.0, sender_s=0.0):
    one = tracking._Turn(steps=10)
    one.seconds, one.waited_s, one.sender_s = seconds, waited_s, sender_s
    return one


def test_the_cost_is_the_median_of_the_rounds_so_that_a_busy_moment_does_not_count():
    turns = [turn(1.01, waited_s=0.001, sender_s=0.002) for _ in range(4)] + [turn(8.0, waited_s=2.0, sender_s=0.002)]
    cost = tracking._cost(turns, [1.0, 1.0, 1.0, 4.0, 1.0])
    assert cost["ratio"] == pytest.approx(1.01)
    assert cost["call_s"] == pytest.approx(0.0001)
    assert cost["waited"] == pytest.approx(0.001 / 1.01)
    assert cost["sender"] == pytest.approx(0.01 / 12.04)


def test_the_report_is_a_table_with_its_conditions():
    cost = {"ratio": 1.0042, "error": 0.0031, "call_s": 143e-6, "waited": 0.00143, "sender": 0.0061}
    artifact = {
        "call_s": 0.04, "uploaded_s": 1.8, "step_s": 0.1, "step_beside_s": 0.12,
        "longest_s": 0.15, "longest_beside_s": 0.2,
    }  # fmt: skip
    report = {
        "rounds": 3, "steps": 60, "metrics": 15, "step_s": 0.1, "ways": {"SQLite": cost}, "artifact": artifact,
    }  # fmt: skip
    text = tracking.markdown(report)
    assert "10.0 steps/s, 15 metrics a step, 3 rounds of 60 steps each way" in text
    assert "| SQLite | 143 µs | 0.14% | 0.61% | 0.75% | 1.004 ± 0.003 |" in text
    assert "the upload in the background 1.8 s; a step took 120 ms meanwhile and 100 ms before" in text


def test_a_step_logs_the_metrics_that_the_cost_is_stated_for(monkeypatch):
    monkeypatch.setattr(tracking, "STEP_S", 0.001)  # reached with one image
    step, batch = tracking._step()
    assert batch == 1
    assert len(step()) == 15
