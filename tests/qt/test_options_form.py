"""The generated form: values, Auto, ranges, greyed fields, the folded part."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import pytest
from PySide6.QtCore import Qt
from PySide6.QtWidgets import QCheckBox, QComboBox, QWidget
from pytestqt.qtbot import QtBot

from app import backends
from app.core.options import OptionValue, build, describe, option
from app.core.sampling import Sampling
from app.views.option_fields import NumberBox
from app.views.options_form import OptionsForm


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    count: Annotated[int, option("Count", "How many.", ge=1, le=100, unit="layers")] = 10
    ratio: Annotated[float, option("Ratio", "How much.", ge=0, le=1, group="Other")] = 0.5
    size: Annotated[int, option("Size", "How large.", ge=8, automatic="from the model")] | None = None
    on: Annotated[bool, option("On", "Whether.")] = False
    maybe: Annotated[bool, option("Maybe", "Perhaps.", automatic="as it suits")] | None = None
    kind: Annotated[Literal["a", "b"], option("Kind", "Which.")] = "a"
    text: Annotated[str, option("Text", "What.")] = ""
    gone: Annotated[bool, option("Gone", "Was.", replaced="Today `kind` does this.")] = False
    deep: Annotated[int, option("Deep", "Inside.", advanced=True, ge=0)] = 3


@pytest.fixture
def form(qtbot: QtBot) -> OptionsForm:
    made = OptionsForm(Options)
    qtbot.addWidget(made)
    made.show()
    return made


def set_number(form: OptionsForm, name: str, value: float) -> None:
    control = form.rows[name].control
    assert isinstance(control, NumberBox)
    control.setValue(value)


def test_only_changed_fields_and_back_to_default(form: OptionsForm, qtbot: QtBot) -> None:
    assert form.values() == {}
    with qtbot.waitSignal(form.changed, timeout=20_000):
        set_number(form, "count", 20)
    assert form.values() == {"count": 20}
    assert isinstance(form.values()["count"], int)
    assert form.rows["count"]._reset.isVisible()
    form.rows["count"]._reset.click()
    assert form.values() == {}


def test_automatic(form: OptionsForm) -> None:
    row = form.rows["size"]
    assert isinstance(row.auto, QCheckBox)
    assert row.auto.isChecked()
    assert not row.control.isEnabled()
    form.suggest({"size": 2048})
    row.auto.setChecked(False)
    assert form.values() == {"size": 2048}
    row.auto.setChecked(True)
    assert form.values() == {}
    maybe = form.rows["maybe"].control
    assert isinstance(maybe, QComboBox)
    assert [maybe.itemText(i) for i in range(maybe.count())] == ["Auto", "On", "Off"]
    maybe.setCurrentIndex(2)
    assert form.values() == {"maybe": False}


def test_wrong_values_say_so_at_the_field(form: OptionsForm) -> None:
    set_number(form, "count", 4000)
    assert "from 1 to 100" in form.problems()["count"]
    assert form.rows["count"].problem.isVisible()
    assert form.rows["count"].control.property("invalid") is True
    set_number(form, "count", 40)
    assert form.problems() == {}
    assert not form.rows["count"].problem.isVisible()


def test_typing(form: OptionsForm, qtbot: QtBot) -> None:
    control = form.rows["ratio"].control
    assert isinstance(control, NumberBox)
    control.setFocus()
    control.selectAll()
    qtbot.keyClicks(control, "0.25")
    assert form.values() == {"ratio": 0.25}
    control.selectAll()
    qtbot.keyClicks(control, "7")
    assert "ratio" in form.problems()
    qtbot.keyClick(control, Qt.Key.Key_Up)
    assert form.problems() == {}, "stepping comes back into the range"


def test_replaced_fields_are_grey_and_say_by_what(form: OptionsForm) -> None:
    row = form.rows["gone"]
    assert not row.control.isEnabled()
    assert row.help.text() == "Today `kind` does this."
    form.set_values({"gone": True})
    assert form.values() == {}


def test_advanced_part_is_built_when_opened_and_keeps_values(form: OptionsForm) -> None:
    assert "deep" not in form.rows
    form.set_values({"deep": 9, "kind": "b", "unknown": 1})
    assert form.values() == {"kind": "b", "deep": 9}
    assert form._advanced is not None
    assert "1 changed" in form._advanced.header.text()
    form._advanced.header.click()
    assert form.rows["deep"].value() == 9
    assert form.values() == {"kind": "b", "deep": 9}


def test_fields_not_served(qtbot: QtBot) -> None:
    form = OptionsForm(Sampling, served={"temperature"}, reason="Only llama.cpp has it.", advanced_open=True)
    qtbot.addWidget(form)
    assert form.rows["temperature"].control.isEnabled()
    assert not form.rows["top_k"].control.isEnabled()
    assert form.rows["top_k"].help.text() == "Only llama.cpp has it."
    form.set_served(None)
    assert form.rows["top_k"].control.isEnabled()


def examples(spec_options: type[msgspec.Struct]) -> dict[str, OptionValue]:
    """A value other than the default for every field that takes one."""
    found: dict[str, OptionValue] = {}
    for field in describe(spec_options):
        if field.replaced:
            continue
        if field.kind == "bool":
            found[field.name] = not field.default
        elif field.kind == "choice":
            found[field.name] = next(choice for choice in field.choices if choice != field.default)
        elif field.kind == "text":
            found[field.name] = "some text"
        else:
            low = field.minimum if field.minimum is not None else 0
            value = low + 1 if field.kind == "int" else low + 0.125
            if field.maximum is not None:
                value = min(value, field.maximum)
            if value == field.default:
                value = low
            found[field.name] = int(value) if field.kind == "int" else value
    return {
        name: value
        for name, value in found.items()
        if value != next(f.default for f in describe(spec_options) if f.name == name)
    }


@pytest.mark.parametrize("loader", [*sorted(backends.specs()), "sampling"])
def test_every_loaders_options_go_through_the_form_unchanged(loader: str, qtbot: QtBot) -> None:
    options = Sampling if loader == "sampling" else backends.specs()[loader].options
    form = OptionsForm(options, advanced_open=True)
    qtbot.addWidget(form)
    wanted = examples(options)
    form.set_values(wanted)
    assert form.values() == wanted
    assert form.problems() == {}
    assert build(options, form.values())


def test_every_control_has_a_name(form: OptionsForm) -> None:
    for row in form.rows.values():
        assert row.control.accessibleName() == row.field.title
        assert row.control.accessibleDescription()
    focusable = [w for w in form.findChildren(QWidget) if w.focusPolicy() & Qt.FocusPolicy.TabFocus and w.isVisible()]
    nameless = [w for w in focusable if not w.accessibleName() and w.objectName() != "qt_spinbox_lineedit"]
    assert not nameless, nameless


def test_tiny_numbers_keep_their_value(qtbot: QtBot) -> None:
    """An optimizer's epsilon of 1e-8 is its default still when the advanced part has been opened."""
    from app.training.run_config import DataConfig, MethodConfig, ModelConfig, TrainConfig

    for struct, left_out in (
        (TrainConfig, ()),
        (MethodConfig, ()),
        (ModelConfig, ()),
        (DataConfig, ("files", "mapping", "held_out_files")),
    ):
        made = OptionsForm(struct, advanced_open=True, leave_out=left_out)
        qtbot.addWidget(made)
        assert made.values() == {} and made.problems() == {}
    made = OptionsForm(TrainConfig, advanced_open=True)
    qtbot.addWidget(made)
    box = made.rows["learning_rate"].control
    assert isinstance(box, NumberBox)
    box.lineEdit().setText("5e-7")
    assert made.values() == {"learning_rate": 5e-7} and not made.problems()
    made.set_values({"epsilon": 1e-10, "learning_rate": 3e-6})
    assert made.values() == {"epsilon": 1e-10, "learning_rate": 3e-6}
