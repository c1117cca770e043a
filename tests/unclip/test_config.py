import dataclasses
from typing import Literal

import pytest

from unclip import config
from unclip.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4
    kind: Literal["cosine", "linear"] = "cosine"
    sides: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        config.require(self.width > 0, "width", self.width, "a positive number")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.5
    fast: bool = False
    path: str | None = None
    inner: Inner = Inner()
    others: dict[str, Inner] = dataclasses.field(default_factory=dict)


def test_values_fill_nested_sections() -> None:
    loaded = config.load(Outer, {"name": "x", "rate": 1, "inner": {"sides": [3]}, "path": "none"})
    assert loaded == Outer("x", 1.0, inner=Inner(sides=(3,)), path=None)
    assert config.load(Outer, config.to_dict(loaded)) == loaded


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "inner": {"widht": 3}}, "inner.widht: unknown setting. Did you mean 'width'?"),
        ({"name": "x", "zzz": 3}, "zzz: unknown setting. Valid names: fast, inner, name, others, path, rate."),
        ({"name": "x", "inner": {"width": 0}}, "inner.width: got 0, expected a positive number."),
        ({"name": "x", "inner": {"width": "4"}}, "inner.width: got '4', expected int."),
        ({"name": "x", "inner": {"width": True}}, "inner.width: got True, expected int."),
        ({"name": "x", "inner": {"kind": "cosin"}}, "inner.kind: got 'cosin'. Did you mean 'cosine'?"),
        ({"name": "x", "inner": {"sides": 3}}, "inner.sides: got 3, expected a list."),
        ({"name": "x", "inner": {"sides": [1, "a"]}}, "inner.sides[1]: got 'a', expected int."),
        ({"name": "x", "inner": 3}, "inner: got 3, expected a section with width, kind, sides."),
        ({"name": "x", "others": 3}, "others: got 3, expected a section of named sections."),
        ({"name": "x", "others": {"a": 3}}, "others.a: got 3, expected a section with width, kind, sides."),
        ({"name": "x", "others": {"a": {"widht": 3}}}, "others.a.widht: unknown setting. Did you mean 'width'?"),
        ({"name": "x", "others": {"a": {}, "b": {"width": 0}}}, "others.b.width: got 0, expected a positive number."),
        ({}, "name: missing. Set it in the run file or with --set."),
    ],
)
def test_bad_values_are_named_with_the_remedy(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(Outer, values)
    assert str(caught.value) == message


def test_sections_may_have_names_of_their_own() -> None:
    values = config.override({"name": "x", "others": {"b": {"width": 7}}}, "others.a.sides=[3]")
    loaded = config.load(Outer, config.merge(values, {"others": {"b": {"kind": "linear"}}}))
    assert loaded.others == {"b": Inner(7, "linear"), "a": Inner(sides=(3,))} and list(loaded.others) == ["b", "a"]
    assert config.load(Outer, config.to_dict(loaded)) == loaded
    turned = config.to_dict(dataclasses.replace(loaded, others=dict(reversed(loaded.others.items()))))
    assert config.fingerprint(turned) == config.fingerprint(config.to_dict(loaded))


def test_overrides_are_typed_and_leave_the_original() -> None:
    values = {"inner": {"width": 1}}
    changed = config.override(values, "inner.sides=[5, 6]")
    changed = config.override(changed, "name=red circle")
    assert changed == {"inner": {"width": 1, "sides": [5, 6]}, "name": "red circle"}
    assert values == {"inner": {"width": 1}}
    with pytest.raises(ConfigError, match=r"expected section\.field=value"):
        config.override(values, "inner.width")
    with pytest.raises(ConfigError, match="'name' is a value"):
        config.override({"name": "x"}, "name.first=y")


def test_fingerprints_know_values_not_order() -> None:
    assert config.fingerprint({"a": 1, "b": 2}) == config.fingerprint({"b": 2, "a": 1})
    assert config.fingerprint({"a": 1}) != config.fingerprint({"a": 2})


def test_merging_lays_sections_over_sections() -> None:
    assert config.merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}}) == {"a": {"b": 5, "c": 2}, "d": 3}


def test_operational_settings_are_not_decisive() -> None:
    @dataclasses.dataclass(frozen=True)
    class Training:
        rate: float = 0.1
        patience: int = config.operational(3)

    @dataclasses.dataclass(frozen=True)
    class Stage:
        trainer: Training = Training()

    assert config.to_dict(Stage()) == {"trainer": {"rate": 0.1, "patience": 3}}
    assert config.decisive(Stage()) == {"trainer": {"rate": 0.1}}
    assert config.load(Stage, {"trainer": {"patience": 5}}).trainer.patience == 5
