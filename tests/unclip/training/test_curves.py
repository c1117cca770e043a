"""Loss curves: text files, and one warning per problem."""

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


def warnings_of(alarm: Alarm, curve: Curve) -> list[str]:
    return [warning for samples_seen, point in curve.items() for warning in alarm.check(samples_seen, point)]


def test_a_curve_is_read_as_written(tmp_path: Path) -> None:
    curve: Curve = {16: {"loss": 0.5, "validation_loss": 0.25}, 32: {"loss": 1e-7}}
    curves.write(f"{tmp_path}/curve.tsv", curve)
    assert curves.read(f"{tmp_path}/curve.tsv") == curve
    assert curves.at(curve, "loss", 0, 100) == pytest.approx(0.25, rel=1e-5)
    assert curves.at(curve, "validation_loss", 17, 100) is None


def test_a_file_that_is_not_a_curve_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"reference_curve: got 'curve.tsv', expected an absolute path, a URI, or one of"
    ):
        TrainerConfig(reference_curve="curve.tsv")
    uri = f"{tmp_path}/curve.tsv"
    with pytest.raises(ConfigError, match="no such curve"):
        curves.read(uri)
    for text in (b"samples_seen\tloss\nmany\t0.5\n", b"samples_seen\tprice\n1\t0.5\n", b"", b"\xff"):
        (tmp_path / "curve.tsv").write_bytes(text)
        with pytest.raises(ConfigError, match="not a curve"):
            curves.read(uri)


def test_points_that_are_not_finite_are_ignored() -> None:
    alarm = Alarm({})
    assert not warnings_of(
        alarm, {10: {"relative_loss": float("nan")}, **{10 * n: falling()[10 * n] for n in range(2, 20)}}
    )
    [warning] = warnings_of(alarm, {10 * n: {"relative_loss": 0.9} for n in range(21, 27)})
    assert "the loss rose" in warning


def test_a_training_resumes_despite_a_damaged_curve(tmp_path: Path) -> None:
    trained_on_workers.run(tmp_path, "run", end=End(before_step=2, kill=None), log_samples=16)
    (tmp_path / "run" / CURVE).write_text("torn")
    trained_on_workers.run(tmp_path, "run", log_samples=16)
    assert list(curves.read(f"{tmp_path}/run/{CURVE}")) == list(range(48, 129, 16))


def test_a_good_training_gets_no_warnings() -> None:
    assert not warnings_of(Alarm({}, falling()), falling())


def test_a_rising_loss_is_reported_once_and_again_if_it_rises_again() -> None:
    rising = {10 * n: {"relative_loss": 0.9} for n in range(21, 27)}
    fallen = {10 * n: {"relative_loss": 0.13} for n in range(27, 40)}
    again = {10 * n: {"relative_loss": 0.9} for n in range(40, 45)}
    alarm = Alarm({})
    assert not warnings_of(alarm, falling())
    [warning] = warnings_of(alarm, rising)
    assert "the loss rose" in warning and "lower learning rate" in warning
    assert not warnings_of(alarm, fallen)
    assert len(warnings_of(alarm, again)) == 1


def test_a_training_that_learns_nothing_is_reported() -> None:
    [warning] = warnings_of(Alarm({}), {10 * n: {"relative_loss": 1.01} for n in range(1, 40)})
    assert "1.010 times that of predicting the mean" in warning and "after 110 samples" in warning


def test_a_zero_gradient_is_reported() -> None:
    [warning] = warnings_of(
        Alarm({}), {10: {"loss": 1.0, "gradient_norm": 0.0}, 20: {"loss": 1.0, "gradient_norm": 0.0}}
    )
    assert "no gradient reaches the weights after 10 samples" in warning


def test_a_training_worse_than_its_reference_is_reported() -> None:
    alarm = Alarm({}, falling())
    [warning] = warnings_of(alarm, falling(scale=1.5))
    assert "1.50 times that of the reference curve" in warning
    assert alarm.over_reference() == pytest.approx(1.5)


def test_a_stopped_and_resumed_training_has_the_same_curve(tmp_path: Path) -> None:
    trained_on_workers.run(tmp_path, "whole", log_samples=16)
    trained_on_workers.run(tmp_path, "resumed", end=End(before_step=2, kill=None), log_samples=16)
    trained_on_workers.run(tmp_path, "resumed", log_samples=16)
    whole = (tmp_path / "whole" / CURVE).read_text()
    assert whole == (tmp_path / "resumed" / CURVE).read_text()
    curve = curves.read(f"{tmp_path}/whole/{CURVE}")
    assert list(curve) == list(range(16, 129, 16))
    assert {"validation_loss", "validation_relative_loss"} <= set(curve[48])

    trained_on_workers.run(tmp_path, "compared", log_samples=16, reference_curve=f"{tmp_path}/whole/{CURVE}")
    ratios = [point["loss_over_reference"] for point in metrics(tmp_path, "compared") if "loss_over_reference" in point]
    assert ratios == pytest.approx([1.0] * 4, abs=1e-4)


@pytest.mark.parametrize("name", ["demo-prior", "demo-decoder", "demo-upsampler-64"])
def test_reference_curves_are_from_successful_trainings(name: str) -> None:
    losses = [point["relative_loss"] for point in curves.read(name).values() if "relative_loss" in point]
    assert len(losses) >= 90 and sum(losses[-5:]) / 5 < 0.75 * losses[0]
