"""Curves are kept as text, and what is wrong with one is said once, in words."""

from pathlib import Path

import pytest

from tests.unclip.training import trained_on_workers
from tests.unclip.training.trained_on_workers import End, metrics
from unclip.errors import ConfigError
from unclip.training import curves
from unclip.training.curves import Alarm, Curve
from unclip.training.settings import TrainerConfig
from unclip.training.trainer import CURVE


def falling(num_points: int = 20, scale: float = 1.0) -> Curve:
    return {10 * n: {"relative_loss": scale * 0.9**n, "gradient_norm": 1.0} for n in range(1, num_points + 1)}


def heard(alarm: Alarm, curve: Curve) -> list[str]:
    return [news for samples_seen, point in curve.items() for news in alarm.hear(samples_seen, point)]


def test_a_curve_is_read_as_it_was_written(tmp_path: Path) -> None:
    curve: Curve = {16: {"loss": 0.5, "validation_loss": 0.25}, 32: {"loss": 1e-7}}
    curves.write(f"{tmp_path}/curve.tsv", curve)
    assert curves.read(f"{tmp_path}/curve.tsv") == curve
    assert curves.at(curve, "loss", 0, 100) == pytest.approx(0.25, rel=1e-5)
    assert curves.at(curve, "validation_loss", 17, 100) is None


def test_what_is_no_curve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"reference_curve: got 'curve.tsv', expected an absolute path, a URI, or one of"
    ):
        TrainerConfig(reference_curve="curve.tsv")
    uri = f"{tmp_path}/curve.tsv"
    with pytest.raises(ConfigError, match="no such curve"):
        curves.read(uri)
    for text in (b"samples_seen\tloss\nmany\t0.5\n", b"samples_seen\tprice\n1\t0.5\n", b"", b"\xff"):
        (tmp_path / "curve.tsv").write_bytes(text)
        with pytest.raises(ConfigError, match="got something else than a curve"):
            curves.read(uri)


def test_points_that_are_not_finite_are_passed_over() -> None:
    alarm = Alarm({})
    assert not heard(alarm, {10: {"relative_loss": float("nan")}, **{10 * n: falling()[10 * n] for n in range(2, 20)}})
    [news] = heard(alarm, {10 * n: {"relative_loss": 0.9} for n in range(21, 27)})
    assert "the loss rose" in news


def test_a_damaged_curve_does_not_keep_a_training_from_going_on(tmp_path: Path) -> None:
    trained_on_workers.run(tmp_path, "run", end=End(before_step=2, kill=None), log_samples=16)
    (tmp_path / "run" / CURVE).write_text("torn")
    trained_on_workers.run(tmp_path, "run", log_samples=16)
    assert list(curves.read(f"{tmp_path}/run/{CURVE}")) == list(range(48, 129, 16))


def test_a_training_that_goes_well_is_left_alone() -> None:
    assert not heard(Alarm({}, falling()), falling())


def test_a_loss_that_rises_is_told_once_and_again_when_it_rises_again() -> None:
    rising = {10 * n: {"relative_loss": 0.9} for n in range(21, 27)}
    fallen = {10 * n: {"relative_loss": 0.13} for n in range(27, 40)}
    again = {10 * n: {"relative_loss": 0.9} for n in range(40, 45)}
    alarm = Alarm({})
    assert not heard(alarm, falling())
    [news] = heard(alarm, rising)
    assert "the loss rose" in news and "lower learning rate" in news
    assert not heard(alarm, fallen)
    assert len(heard(alarm, again)) == 1


def test_one_that_learns_nothing_is_told() -> None:
    [news] = heard(Alarm({}), {10 * n: {"relative_loss": 1.01} for n in range(1, 40)})
    assert "1.010 of that of predicting the mean" in news and "after 110 samples" in news


def test_a_gradient_of_nothing_is_told() -> None:
    [news] = heard(Alarm({}), {10: {"loss": 1.0, "gradient_norm": 0.0}, 20: {"loss": 1.0, "gradient_norm": 0.0}})
    assert "no gradient reaches the weights after 10 samples" in news


def test_one_that_falls_behind_its_reference_is_told() -> None:
    alarm = Alarm({}, falling())
    [news] = heard(alarm, falling(scale=1.5))
    assert "1.50 times that of the reference curve" in news
    assert alarm.over_reference() == pytest.approx(1.5)


def test_a_training_that_was_stopped_has_the_curve_of_one_that_was_not(tmp_path: Path) -> None:
    trained_on_workers.run(tmp_path, "whole", log_samples=16)
    trained_on_workers.run(tmp_path, "twice", end=End(before_step=2, kill=None), log_samples=16)
    trained_on_workers.run(tmp_path, "twice", log_samples=16)
    whole = (tmp_path / "whole" / CURVE).read_text()
    assert whole == (tmp_path / "twice" / CURVE).read_text()
    curve = curves.read(f"{tmp_path}/whole/{CURVE}")
    assert list(curve) == list(range(16, 129, 16))
    assert {"validation_loss", "validation_relative_loss"} <= set(curve[48])

    trained_on_workers.run(tmp_path, "beside", log_samples=16, reference_curve=f"{tmp_path}/whole/{CURVE}")
    beside = [point["loss_over_reference"] for point in metrics(tmp_path, "beside") if "loss_over_reference" in point]
    assert beside == pytest.approx([1.0] * 4, abs=1e-4)


@pytest.mark.parametrize("name", ["demo-prior", "demo-decoder", "demo-upsampler-64"])
def test_the_references_are_of_trainings_that_learnt(name: str) -> None:
    losses = [point["relative_loss"] for point in curves.read(name).values() if "relative_loss" in point]
    assert len(losses) >= 90 and sum(losses[-5:]) / 5 < 0.75 * losses[0]
