import dataclasses
from typing import Literal

import pytest

from unclip import config
from unclip.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4
    kind: Literal["cosine", "linear"] = "cosine"
    sizes: tuple[int, ...] = (1, 2)

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
    loaded = config.load(Outer, {"name": "x", "rate": 1, "inner": {"sizes": [3]}, "path": "none"})
    assert loaded == Outer("x", 1.0, inner=Inner(sizes=(3,)), path=None)
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
        ({"name": "x", "inner": {"sizes": 3}}, "inner.sizes: got 3, expected a list."),
        ({"name": "x", "inner": {"sizes": [1, "a"]}}, "inner.sizes[1]: got 'a', expected int."),
        ({"name": "x", "inner": 3}, "inner: got 3, expected a section with width, kind, sizes."),
        ({"name": "x", "others": 3}, "others: got 3, expected a section of named sections."),
        ({"name": "x", "others": {"a": 3}}, "others.a: got 3, expected a section with width, kind, sizes."),
        ({"name": "x", "others": {"a": {"widht": 3}}}, "others.a.widht: unknown setting. Did you mean 'width'?"),
        ({"name": "x", "others": {"a": {}, "b": {"width": 0}}}, "others.b.width: got 0, expected a positive number."),
        ({}, "name: missing. Set it in the run file or with --set."),
    ],
)
def test_errors_name_the_bad_value_and_the_remedy(values: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(Outer, values)
    assert str(caught.value) == message


def test_sections_can_be_named_by_the_user() -> None:
    values = config.override({"name": "x", "others": {"b": {"width": 7}}}, "others.a.sizes=[3]")
    loaded = config.load(Outer, config.merge(values, {"others": {"b": {"kind": "linear"}}}))
    assert loaded.others == {"b": Inner(7, "linear"), "a": Inner(sizes=(3,))} and list(loaded.others) == ["b", "a"]
    assert config.load(Outer, config.to_dict(loaded)) == loaded
    reordered = config.to_dict(dataclasses.replace(loaded, others=dict(reversed(loaded.others.items()))))
    assert config.fingerprint(reordered) == config.fingerprint(config.to_dict(loaded))


def test_overrides_are_typed_and_do_not_change_the_original() -> None:
    values = {"inner": {"width": 1}}
    changed = config.override(values, "inner.sizes=[5, 6]")
    changed = config.override(changed, "name=red circle")
    assert changed == {"inner": {"width": 1, "sizes": [5, 6]}, "name": "red circle"}
    assert values == {"inner": {"width": 1}}
    with pytest.raises(ConfigError, match=r"expected section\.field=value"):
        config.override(values, "inner.width")
    with pytest.raises(ConfigError, match="'name' is a value"):
        config.override({"name": "x"}, "name.first=y")


def test_fingerprints_depend_on_values_and_not_on_order() -> None:
    assert config.fingerprint({"a": 1, "b": 2}) == config.fingerprint({"b": 2, "a": 1})
    assert config.fingerprint({"a": 1}) != config.fingerprint({"a": 2})


def test_merging_overrides_section_by_section() -> None:
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
    assert config.without_operational(Stage()) == {"trainer": {"rate": 0.1}}
    assert config.load(Stage, {"trainer": {"patience": 5}}).trainer.patience == 5


def test_f101_suggestions_can_be_copied_and_show_letters_that_look_alike() -> None:
    suggestions = {
        ("legende", "l\u00e9gende"): "'l\u00e9gende'",
        ("caption", "c\u0430ption"): "'c\u0430ption', in ASCII 'c\\u0430ption'",
        ("caption", "ca\uff50tion"): "'ca\uff50tion', in ASCII 'ca\\uff50tion'",
        ("Caption", "cap\u200btion"): "'cap\\u200btion'",
        ("c\u0430ption", "caption"): "'caption'",
        ("url_bild", "url_bild_\u56fe"): "'url_bild_\u56fe'",
    }
    for (name, valid), shown in suggestions.items():
        assert config.nearest(name, [valid, "url"]) == f"Did you mean {shown}?"
