"""The merge-and-export dialog: what it offers, what it refuses, and a real merge through it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PySide6.QtCore import QObject, Qt, Signal
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QWidget
from pytestqt.qtbot import QtBot

from app.adapters.merge_folder import card
from app.adapters.quantized_card import quantized_card
from app.core.certify_plan import SAME_KL, SMALL_KL, Certificate
from app.core.errors import ErrorKind, WeftError
from app.core.export_plan import ExportPlan, ExportResult
from app.core.jobs import Job, JobState, Progress
from app.core.library import ModelFormat, ModelShape
from app.core.merge_plan import MergePlan, MergeResult
from app.core.push_plan import PushResult
from app.core.quantize_plan import QuantizePlan, QuantizeResult
from app.core.stack import AdapterStack, StackedAdapter
from app.viewmodels import export_choices as export_module
from app.viewmodels.export import ExportDraft, ExportOptions
from app.viewmodels.export_choices import SAFETENSORS, choices, default_name
from app.views.export.dialog import ExportDialog
from tests.qt.shell_parts import GB, model
from tests.qt.test_tasks import WAIT, Bench

STACK = AdapterStack(
    adapters=(
        StackedAdapter(path="/loras/pirate", name="pirate", weight=0.7),
        StackedAdapter(path="/loras/off", name="off", weight=0.0),
    )
)


class Queue(QObject):
    """As much of a TaskQueue as a draft uses; the test says what happens."""

    progressed = Signal(int, object)
    warned = Signal(int, str)
    ended = Signal(object, object, object)
    followed = Signal(int, object)

    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[tuple[str, str, Any, str]] = []
        self.then: Any = ()
        self.asked: list[object] = []
        self.active = False

    def submit(self, task: str, title: str, parameters: Any, *, environment: str = "core", then: Any = ()) -> Job:
        self.submitted.append((task, title, parameters, environment))
        self.then = then
        self.active = True
        return Job(id=7, task=task, title=title)

    def is_active(self, _job: int) -> bool:
        return self.active

    def cancel(self, job: int) -> None:
        self.asked.append(("cancel", job))

    def adjust(self, job: int, parameters: object) -> None:
        self.asked.append((job, parameters))

    def follow(self, before: int, number: int, task: str) -> None:
        self.followed.emit(before, Job(id=number, task=task, title=task))

    def end_following(self, number: int, task: str, result: object, error: WeftError | None = None) -> None:
        state = JobState.DONE if error is None else JobState.FAILED
        answer = None if result is None else msgspec.to_builtins(result)
        self.ended.emit(Job(id=number, task=task, title=task, state=state), answer, error)

    def end(self, result: object, error: WeftError | None = None) -> None:
        self.active = False
        state = JobState.DONE if error is None else JobState.FAILED
        answer = None if result is None else msgspec.to_builtins(result)
        self.ended.emit(Job(id=7, task="merge", title="Merge", state=state), answer, error)


class Jobs(QObject):
    """As much of a JobCenter as a draft uses."""

    environment_ready = Signal(str)
    environment_failed = Signal(str, object)

    def __init__(self) -> None:
        super().__init__()
        self.ready = {"core"}
        self.installs: list[str] = []

    def is_ready(self, name: str) -> bool:
        return name in self.ready

    def expected_bytes(self, name: str) -> int:
        return {"core": 1_200_000_000}.get(name, 900_000_000)

    def install(self, name: str) -> None:
        self.installs.append(name)


@pytest.fixture
def queue(qapp: object) -> Queue:
    return Queue()


@pytest.fixture
def jobs(qapp: object) -> Jobs:
    return Jobs()


def folder_model(**fields: Any) -> Any:
    return model("maker/tiny-1B", format=ModelFormat.SAFETENSORS, quantization="BF16", parameters=GB, **fields)


@pytest.fixture
def draft(queue: Queue, jobs: Jobs, tmp_path: Path) -> Iterator[ExportDraft]:
    made = ExportDraft(
        folder_model(),
        STACK,
        queue=queue,
        jobs=jobs,
        models=tmp_path,
        memory_free=lambda: 8 * GB,  # type: ignore[arg-type]
    )
    yield made


@pytest.fixture
def dialog(draft: ExportDraft, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch) -> ExportDialog:
    monkeypatch.setattr(export_module, "free_at", lambda _folder: 100 * GB)
    made = ExportDialog(draft)
    made.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose, False)
    qtbot.addWidget(made)
    made.show()
    return made


def test_one_click_merges_the_stack_that_is_on_under_a_name_made_of_both(
    dialog: ExportDialog, queue: Queue, qtbot: QtBot, tmp_path: Path
) -> None:
    assert dialog.form.stack.text() == "pirate × 0.7" and dialog.form.name.text() == "tiny-1B-pirate"
    assert dialog.start.isEnabled() and dialog.start.isDefault()
    dialog.start.click()
    (task, title, plan, environment) = queue.submitted[0]
    assert (task, environment) == ("merge", "core") and "tiny-1B-pirate" in title
    assert isinstance(plan, MergePlan) and plan.target == str(tmp_path / "tiny-1B-pirate")
    assert [a.name for a in plan.stack.adapters] == ["pirate"]
    queue.progressed.emit(7, Progress(phase="Merging", done=GB, total=2 * GB, unit="bytes"))
    assert "1.0 GB of 2.0 GB" in dialog.figures.text() and dialog.bar.value() == 500
    dialog.pause.click()
    assert queue.asked[-1] == (7, {"paused": True}) and dialog.pause.text() == "Go on"
    dialog.pause.click()
    assert queue.asked[-1] == (7, {"paused": False})
    loads: list[str] = []
    dialog.load_wanted.connect(loads.append)
    queue.end(MergeResult(folder=plan.target, bytes=2 * GB, tensors=10, changed=4, seconds=3.0, notes=["A note."]))
    assert "4 of 10 tensors" in dialog.outcome.text() and dialog.notes.text() == "A note."
    dialog.load.click()
    assert loads == [plan.target]


def test_gguf_installs_what_it_needs_first_and_goes_on_by_itself(
    dialog: ExportDialog, queue: Queue, jobs: Jobs, tmp_path: Path
) -> None:
    dialog.form.format.setCurrentIndex(dialog.form.format.findData("q4_k_m"))
    assert "installed first" in dialog.form.note.text.text()
    dialog.start.click()
    assert jobs.installs == ["export"] and not queue.submitted
    assert "Installing" in dialog.phase.text() and not dialog.pause.isVisible()
    jobs.environment_ready.emit("core")
    assert not queue.submitted
    jobs.environment_ready.emit("export")
    (task, _, plan, environment) = queue.submitted[0]
    assert (task, environment) == ("export_gguf", "export") and isinstance(plan, ExportPlan)
    assert plan.target == str(tmp_path / "tiny-1B-pirate" / "tiny-1B-pirate-Q4_K_M.gguf")
    queue.end(ExportResult(file=plan.target, bytes=GB, type="q4_k_m", tensors=9, seconds=70))
    assert "Q4_K_M" in dialog.outcome.text() and "1 min" in dialog.outcome.text()


def test_gptq_and_awq_are_calibrated_in_the_engine_of_transformers(
    dialog: ExportDialog, queue: Queue, jobs: Jobs, tmp_path: Path
) -> None:
    form = dialog.form
    jobs.ready.clear()  # an engine whose installation was cancelled
    form.format.setCurrentIndex(form.format.findData("awq"))
    assert not form.calibrated.bits.isEnabled() and form.calibrated.bits.currentData() == 4, "AWQ has 4 bits alone"
    assert form.more.header.isChecked() and form.calibrated.isVisible() and not form.calibrated.order.isVisible()
    form.format.setCurrentIndex(form.format.findData("gptq"))
    assert "one more engine of about 1.2 GB" in form.note.text.text() and "more while it is made" in form.need.text()
    fields = form.calibrated
    fields.bits.setCurrentIndex(fields.bits.findData(8))
    fields.group.setCurrentIndex(fields.group.findData(64))
    fields.order.setChecked(True)
    assert "One of ours" in fields.text.text() and not fields.clear.isVisible()
    fields._set(calibration="/texts/mine.txt")
    assert fields.text.text() == "mine.txt"
    dialog.start.click()
    assert jobs.installs == ["core"] and not queue.submitted
    jobs.environment_ready.emit("core")
    (task, title, plan, environment) = queue.submitted[0]
    assert (task, environment) == ("quantize", "core") and isinstance(plan, QuantizePlan)
    assert plan.target == str(tmp_path / "tiny-1B-pirate-GPTQ-8bit") and Path(plan.target).name in title
    assert (plan.method, plan.bits, plan.group_size, plan.desc_act) == ("gptq", 8, 64, True)
    assert plan.calibration == "/texts/mine.txt" and plan.stack.adapters
    (step,) = queue.then
    assert (step.task, step.environment, step.parameters.b.model) == ("certify", "core", plan.target)
    queue.progressed.emit(7, Progress(phase="Quantizing by GPTQ", done=GB, total=4 * GB, unit="bytes"))
    assert "1.0 GB of 4.0 GB" in dialog.figures.text() and dialog.pause.isVisible()
    made = QuantizeResult(folder=plan.target, bytes=GB, matrices=14, method="gptq", bits=8, tokens=5000, seconds=70)
    queue.end(made)
    assert "8 bits by GPTQ" in dialog.outcome.text() and "14 matrices" in dialog.outcome.text()


def test_hqq_asks_for_no_text(dialog: ExportDialog, queue: Queue, jobs: Jobs) -> None:
    form = dialog.form
    form.format.setCurrentIndex(form.format.findData("hqq"))
    fields = form.calibrated
    assert fields.isVisible() and not fields.text.isVisible() and not fields.order.isVisible()
    assert [fields.bits.itemData(n) for n in range(fields.bits.count())] == [1, 2, 3, 4, 8]
    assert (fields.bits.currentData(), fields.group.currentData()) == (4, 64)
    dialog.start.click()
    plan = queue.submitted[0][2]
    assert (plan.method, plan.bits, plan.group_size, plan.calibration) == ("hqq", 4, 64, "")
    queue.end(QuantizeResult(folder=plan.target, bytes=GB, matrices=14, method="hqq", bits=4, seconds=5))
    assert "4 bits by HQQ" in dialog.outcome.text() and "calibrated" not in dialog.outcome.text()
    form.format.setCurrentIndex(form.format.findData("awq"))
    assert fields.text.isVisibleTo(form)


def test_groups_fit_the_models_matrices(queue: Queue, jobs: Jobs, qtbot: QtBot, tmp_path: Path) -> None:
    shape = ModelShape(layers=2, hidden=192, intermediate=512, vocabulary=1000)
    dialog = made_dialog(folder_model(shape=shape), queue, jobs, tmp_path, qtbot)
    dialog.form.format.setCurrentIndex(dialog.form.format.findData("gptq"))
    assert dialog.form.calibrated.group.currentData() == 64
    plan = dialog._draft.plan()
    assert isinstance(plan, QuantizePlan) and plan.group_size == 64 and Path(plan.calibration).is_file()


def test_a_failed_installation_and_a_failed_job_come_back_to_the_form(
    dialog: ExportDialog, queue: Queue, jobs: Jobs
) -> None:
    dialog.form.format.setCurrentIndex(dialog.form.format.findData("q8_0"))
    dialog.start.click()
    jobs.environment_failed.emit("export", WeftError(ErrorKind.NETWORK, "Offline.", "Connect."))
    assert dialog.error.isVisible() and "Connect." in dialog.error.text.text() and dialog.start.isVisible()
    jobs.ready.add("export")
    dialog.start.click()
    assert not dialog.error.isVisible()
    queue.end(None, WeftError(ErrorKind.DISK_FULL, "The drive became full.", "Make room."))
    assert "Make room." in dialog.error.text.text() and dialog.start.isEnabled()


def test_what_is_wrong_is_said_before_the_button(
    dialog: ExportDialog, draft: ExportDraft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words in (("", "needs a name"), ("a/b", "none of"), ("x" * 121, "at most 120"), (".hidden", "point")):
        dialog.form.name.setText(name)
        assert words in dialog.form.note.text.text(), name
        assert not dialog.start.isEnabled()
    (tmp_path / "there").mkdir()
    dialog.form.name.setText("there")
    assert "exists there already" in dialog.form.note.text.text()
    dialog.form.name.setText("fine")
    assert dialog.start.isEnabled()
    monkeypatch.setattr(export_module, "free_at", lambda _folder: GB // 2)
    draft.changed.emit()
    assert "missing on that drive" in dialog.form.note.text.text() and not dialog.start.isEnabled()


def test_low_types_ask_for_a_text_and_sizes_say_what_is_made_on_the_way(
    dialog: ExportDialog, draft: ExportDraft
) -> None:
    dialog.form.format.setCurrentIndex(dialog.form.format.findData("iq2_xs"))
    assert "importance matrix" in dialog.form.note.text.text() and dialog.form.more.header.isChecked()
    draft.set_options(ExportOptions(imatrix="/texts/some.txt"))
    assert dialog.start.isEnabled() and dialog.form.imatrix.text() == "some.txt"
    assert "more while it is made" in dialog.form.need.text()
    draft.entry = msgspec.structs.replace(draft.entry, parameters=4_000_000)
    dialog.form.format.setCurrentIndex(dialog.form.format.findData("q4_k_m"))
    assert "and 8.0 MB more while it is made" in dialog.form.need.text(), "of a small model too"
    dialog.form.format.setCurrentIndex(dialog.form.format.findData("q8_0"))
    assert "more while it is made" not in dialog.form.need.text()


def test_what_can_be_made_of_what(tmp_path: Path) -> None:
    assert choices(folder_model(), STACK)[0].key == SAFETENSORS
    assert [c.key for c in choices(folder_model(), AdapterStack())][:4] == ["gptq", "awq", "hqq", "q4_k_m"]
    assert SAFETENSORS not in [c.key for c in choices(model(), STACK)]
    assert choices(model(format=ModelFormat.EXL2), STACK) == []
    packed = [c.key for c in choices(model(format=ModelFormat.AWQ, quantization="4-bit, group 64"), STACK)]
    assert packed == ["safetensors-16bit", "awq", "gptq", "hqq"], "the base's own method comes first"
    assert default_name(model("maker/Tiny-Q4_K_M"), STACK) == "Tiny-pirate"
    odd = StackedAdapter(path="/x/a b/ü:1", name="a b/ü:1")
    assert default_name(folder_model(), AdapterStack(adapters=(odd,))) == "tiny-1B-a-b-ü-1"


def test_escape_leaves_a_running_export_at_work(dialog: ExportDialog, queue: Queue, qtbot: QtBot) -> None:
    dialog.start.click()
    dialog.reject()
    assert not dialog.isVisible() and not queue.asked


CERTIFICATE = Certificate(
    a="tiny with pirate",
    b="tiny-pirate",
    text="certificate_text.txt",
    text_sha256="0" * 64,
    predictions=2047,
    largest_logit_difference=0.0123,
    mean_kl=0.00045,
    largest_kl=0.2,
    top1_agreement=0.9876,
    perplexity_a=12.3456,
    perplexity_b=12.5,
    window=512,
    notes=["A note of the comparison."],
)


def test_the_certificate_follows_is_shown_and_can_be_switched_off(dialog: ExportDialog, queue: Queue) -> None:
    dialog.start.click()
    (step,) = queue.then
    assert step.task == "certify" and step.environment == "core"
    plan = queue.submitted[0][2]
    assert step.parameters.a.model == plan.model and step.parameters.a.stack == plan.stack
    assert step.parameters.b.model == plan.target == step.parameters.store
    assert Path(step.parameters.text).is_file(), "the text of ours is there"
    queue.end(MergeResult(folder=plan.target, bytes=GB, tensors=4, changed=4))
    queue.follow(7, 8, "certify")
    queue.progressed.emit(8, Progress(phase="Reading the text with A", done=512, total=2048, unit="tokens"))
    assert dialog.following.isVisible() and "512 of 2,048 tokens" in dialog.follow_figures.text()
    dialog.hold.click()
    assert queue.asked[-1] == (8, {"paused": True}) and dialog.hold.text() == "Go on"
    assert "paused" in dialog.follow_phase.text()
    dialog.hold.click()
    assert queue.asked[-1] == (8, {"paused": False}) and "paused" not in dialog.follow_phase.text()
    dialog.skip.click()
    assert queue.asked[-1] == ("cancel", 8)
    queue.end_following(8, "certify", CERTIFICATE)
    values = {key: shown.text() for key, shown in dialog.certificate.values.items()}
    assert dialog.certificate.isVisible() and not dialog.following.isVisible()
    assert values["logits"] == "0.0123" and values["top1"] == "98.76 %" and "0.00045" in values["kl"]
    assert (values["before"], values["after"]) == ("12.3456", "12.5000")
    assert "A note of the comparison." in dialog.certificate.notes.text()
    assert "Practically the same" in dialog.certificate.verdict.text()
    for kl, words in ((SAME_KL, "small difference"), (SMALL_KL, "differs clearly"), (float("nan"), "differs clearly")):
        dialog.certificate.show_certificate(msgspec.structs.replace(CERTIFICATE, mean_kl=kl))
        assert words in dialog.certificate.verdict.text()


def test_without_the_certificate_nothing_follows(dialog: ExportDialog, queue: Queue) -> None:
    dialog.form.certify.setChecked(False)
    dialog.start.click()
    assert queue.then == []


def test_a_text_of_the_users_is_compared_over(dialog: ExportDialog, draft: ExportDraft, queue: Queue) -> None:
    draft.set_options(ExportOptions(text="/texts/mine.txt"))
    assert dialog.form.text.text() == "Over mine.txt"
    dialog.form.our_text.click()
    assert "of ours" in dialog.form.text.text()
    draft.set_options(ExportOptions(text="/texts/mine.txt"))
    dialog.start.click()
    assert queue.then[0].parameters.text == "/texts/mine.txt"


def test_the_upload_follows_the_certificate_also_when_that_fails(
    dialog: ExportDialog, queue: Queue, tmp_path: Path
) -> None:
    assert not dialog.form.repo.isVisible()
    dialog.form.push.setChecked(True)
    assert dialog.form.repo.text() == "tiny-1B-pirate" and dialog.form.private.isChecked()
    dialog.form.repo.setText("not a name")
    assert "no name for the hub" in dialog.form.note.text.text() and not dialog.start.isEnabled()
    dialog.form.repo.setText("alice/pirate")
    dialog.start.click()
    certify, upload = queue.then
    assert (certify.task, upload.task, upload.environment) == ("certify", "push_hub", "") and upload.always
    plan = upload.parameters
    assert (plan.repo, plan.private, plan.token) == ("alice/pirate", True, "")
    assert plan.path == str(tmp_path / "tiny-1B-pirate")
    queue.end(MergeResult(folder=plan.path, bytes=GB, tensors=4, changed=4))
    queue.follow(7, 8, "certify")
    queue.end_following(8, "certify", None, WeftError(ErrorKind.OUT_OF_MEMORY, "Too large.", "Close programs."))
    assert "could not be compared" in dialog.follow_error.text.text() and not dialog.certificate.isVisible()
    queue.follow(8, 9, "push_hub")
    queue.progressed.emit(9, Progress(phase="Uploading", done=GB // 2, total=GB, unit="bytes"))
    assert dialog.following.isVisible() and dialog.follow_bar.value() == 500
    queue.end_following(
        9, "push_hub", PushResult(repo="alice/pirate", url="https://hub/alice/pirate", commit="1", files=4, bytes=GB)
    )
    assert dialog.uploaded.text() == "Uploaded privately: https://hub/alice/pirate"


def made_dialog(
    entry: Any, queue: Queue, jobs: Jobs, folder: Path, qtbot: QtBot, find: Any = None, parent: Any = None
) -> ExportDialog:
    draft = ExportDraft(
        entry,
        STACK,
        queue=queue,  # type: ignore[arg-type]
        jobs=jobs,  # type: ignore[arg-type]
        models=folder,
        memory_free=lambda: 8 * GB,
        find=find or (lambda _name: None),
    )
    dialog = ExportDialog(draft, parent)
    dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose, False)
    qtbot.addWidget(dialog)
    dialog.show()
    return dialog


@pytest.mark.parametrize("here", [False, True])
def test_a_quantized_base_names_the_model_to_use_instead(
    queue: Queue, jobs: Jobs, qtbot: QtBot, tmp_path: Path, here: bool
) -> None:
    packed = tmp_path / "tiny-exl2"
    packed.mkdir()
    (packed / "config.json").write_text('{"_name_or_path": "maker/tiny"}', "utf-8")
    entry = model("maker/tiny-exl2", format=ModelFormat.EXL2, quantization="4 bpw", path=str(packed))
    whole = folder_model() if here else None
    asked: list[str] = []
    dialog = made_dialog(entry, queue, jobs, tmp_path, qtbot, lambda name: (asked.append(name), whole)[1])
    qtbot.waitUntil(dialog.form.base_note.isVisible)
    assert asked == ["maker/tiny"] and "maker/tiny" in dialog.form.note.text.text() and not dialog.start.isEnabled()
    assert dialog.form.use_base.text() == ("Use it" if here else "Find it on the hub")
    shown = dialog.form.note.text
    qtbot.waitUntil(lambda: shown.height() >= shown.heightForWidth(shown.width()), timeout=2000)  # nothing is cut off
    wanted: list[object] = []
    dialog.base_wanted.connect(wanted.append)
    dialog.form.use_base.click()
    assert wanted == [whole or "maker/tiny"] and not dialog.isVisible()


def test_a_base_that_bitsandbytes_packed_can_be_unpacked_or_packed_again(
    queue: Queue, jobs: Jobs, qtbot: QtBot, tmp_path: Path
) -> None:
    packed = tmp_path / "tiny-bnb-4bit"
    packed.mkdir()
    (packed / "config.json").write_text("{}", "utf-8")
    entry = model(
        "maker/tiny-bnb-4bit", format=ModelFormat.BITSANDBYTES, quantization="4-bit", path=str(packed), parameters=GB
    )
    dialog = made_dialog(entry, queue, jobs, tmp_path, qtbot)
    qtbot.waitUntil(dialog.form.base_note.isVisible)
    assert "nothing is lost" in dialog.form.base_note.text.text()
    for key, packing in (("safetensors-16bit", "16bit"), ("safetensors-again", "again")):
        dialog.form.format.setCurrentIndex(dialog.form.format.findData(key))
        plan = dialog._draft.plan()
        assert isinstance(plan, MergePlan) and plan.packed == packing
        assert "los" in dialog.form.help.text() or "rounds" in dialog.form.help.text()
    dialog.start.click()
    loss = "Packing again changed the merged weights by 0.4 % on average."
    queue.end(MergeResult(folder=str(tmp_path / "x"), bytes=GB, tensors=4, changed=4, method="peft", notes=[loss]))
    assert loss in dialog.notes.text() and "Merged by PEFT" in dialog.outcome.text()


def test_a_base_that_gptq_packed_is_unpacked_or_calibrated_again_as_it_was(
    queue: Queue, jobs: Jobs, qtbot: QtBot, tmp_path: Path
) -> None:
    shape = ModelShape(layers=2, hidden=256, intermediate=512, vocabulary=1000)
    entry = model("maker/tiny-GPTQ", format=ModelFormat.GPTQ, quantization="8-bit, group 32", path="/m", shape=shape)
    dialog = made_dialog(entry, queue, jobs, tmp_path, qtbot)
    plan = dialog._draft.plan()
    assert isinstance(plan, MergePlan) and plan.packed == "16bit", "what loses nothing more comes first"
    dialog.form.format.setCurrentIndex(dialog.form.format.findData("gptq"))
    assert "measured and said at the end" in dialog.form.help.text()
    plan = dialog._draft.plan()
    assert isinstance(plan, QuantizePlan) and (plan.method, plan.bits, plan.group_size) == ("gptq", 8, 32)
    assert Path(plan.target).name == "tiny-pirate-GPTQ-8bit"
    dialog.form.format.setCurrentIndex(dialog.form.format.findData("awq"))
    plan = dialog._draft.plan()
    assert isinstance(plan, QuantizePlan) and (plan.bits, plan.group_size) == (4, 32)


def test_what_a_merge_takes_is_asked_of_the_headers(queue: Queue, jobs: Jobs, qtbot: QtBot, tmp_path: Path) -> None:
    from app.core.paths import resources
    from app.core.recognise import recognise_model

    entry = recognise_model(resources() / "starter" / "model")
    assert entry is not None
    # What the library says may be wrong; the files are what is merged.
    dialog = made_dialog(
        msgspec.structs.replace(entry, bytes=7 * GB, weight_bytes=7 * GB), queue, jobs, tmp_path, qtbot
    )
    draft = dialog._draft
    real = sum(path.stat().st_size for path in Path(entry.path).glob("*.safetensors"))
    assert draft.need().result == 7 * GB, "until the headers have been read"
    qtbot.waitUntil(lambda: draft.need().result < GB)
    assert real <= draft.need().disk <= real + 40 * 1024 * 1024
    draft.set_options(ExportOptions(dtype="float32"))
    qtbot.waitUntil(lambda: draft.need().disk > 1.5 * real)


class Pretending(Bench):
    """The real queue: its children run a pretended task in the place of an export."""

    parameters: dict[str, object]
    really: Any

    def begin(self, _task: str, title: str, _plan: object, *, environment: str, then: object) -> Job:
        return self.really("pretend", title, self.parameters, environment=environment)


@pytest.mark.parametrize("end", ["cancelled", "failed"])
def test_an_export_that_a_real_child_does_not_finish_comes_back_to_the_form(
    jobs: Jobs, qtbot: QtBot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(export_module, "free_at", lambda _folder: 100 * GB)
    bench = Pretending(tmp_path)
    bench.really = bench.queue.submit
    cancelled = end == "cancelled"
    bench.parameters = {"steps": 1000, "seconds": 0.02} if cancelled else {"how": "badly"}
    monkeypatch.setattr(bench.queue, "submit", bench.begin)
    try:
        dialog = made_dialog(folder_model(), bench.queue, jobs, tmp_path, qtbot)  # type: ignore[arg-type]
        dialog.start.click()
        assert dialog.stop.isVisible() and not dialog.start.isVisible()
        if cancelled:
            qtbot.waitUntil(lambda: "of 1,000 steps" in dialog.figures.text(), timeout=WAIT)
            dialog.stop.click()
        qtbot.waitUntil(lambda: bool(bench.ends), timeout=WAIT)
        assert dialog.start.isVisible() and dialog.start.isEnabled() and not dialog.stop.isVisible()
        assert dialog.error.isVisible() is not cancelled
        qtbot.waitUntil(lambda: not bench.queue.busy, timeout=WAIT)
        dialog.start.click()  # and it can be tried again
        assert dialog.stop.isVisible()
        dialog.stop.click()
        qtbot.waitUntil(dialog.start.isVisible, timeout=WAIT)
    finally:
        bench.close()


@pytest.mark.skipif(not os.environ.get("WEFT_PYTHON_CORE"), reason="WEFT_PYTHON_CORE names no interpreter with PyTorch")
def test_a_real_merge_through_the_dialog_lands_in_the_library(qtbot: QtBot, tmp_path: Path) -> None:
    from app.core.certificate_file import read_certificate
    from app.core.paths import default_paths, resources
    from app.core.recognise import recognise_model
    from app.engine import launch
    from app.store.database import Database
    from app.store.jobs import JobStore
    from app.viewmodels.tasks import TaskQueue
    from app.workers.task_worker import TaskWorker

    database = Database(tmp_path / "weft.db")
    queue = TaskQueue(
        JobStore(database),
        make_client=lambda name, log: launch.task_engine(name, default_paths(), log.stem),
        make_worker=TaskWorker,
        logs=tmp_path / "logs",
    )
    entry = recognise_model(resources() / "starter" / "model")
    assert entry is not None
    voice = StackedAdapter(path=str(resources() / "starter" / "voice-adapter"), name="voice")
    draft = ExportDraft(
        entry,
        AdapterStack(adapters=(voice,)),
        queue=queue,
        jobs=Jobs(),  # type: ignore[arg-type]
        models=tmp_path / "models",
        memory_free=lambda: 8 * GB,
    )
    dialog = ExportDialog(draft)
    dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose, False)
    qtbot.addWidget(dialog)
    dialog.show()
    try:
        results: list[Any] = []
        draft.done.connect(results.append)
        with qtbot.waitSignal(draft.certified, timeout=180_000) as got:
            dialog.start.click()
        (result,), found = results, got.args[0]
        assert dialog.certificate.isVisible() and found.predictions > 100
        assert found.mean_kl < 1e-3 and found.top1_agreement > 0.99 and found.perplexity_a > 1
        assert read_certificate(Path(result.folder)) == found, "stored with the model"
        made = recognise_model(Path(result.folder))
        assert made is not None and not made.problem and made.has_chat_template
        assert result.changed == 28 and "28 of" in dialog.outcome.text()
        qtbot.waitUntil(lambda: not queue.busy, timeout=20_000)
    finally:
        queue.close()
        database.close()


def test_the_dialog_is_as_high_as_what_it_shows_and_never_higher_than_the_window(
    queue: Queue, jobs: Jobs, qtbot: QtBot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "free_at", lambda _folder: 100 * GB)
    window = QWidget()
    qtbot.addWidget(window)
    window.resize(960, 600)
    window.show()
    packed = tmp_path / "tiny-GPTQ"
    packed.mkdir()
    (packed / "config.json").write_text('{"_name_or_path": "maker/tiny"}', "utf-8")
    entry = model("maker/tiny-GPTQ", format=ModelFormat.GPTQ, quantization="4-bit, group 32", path=str(packed))
    dialog = made_dialog(entry, queue, jobs, tmp_path, qtbot, parent=window)
    form = dialog.form
    qtbot.waitUntil(form.base_note.isVisible)
    low = dialog.height()
    form.format.setCurrentIndex(form.format.findData("gptq"))
    form.name.setText("a/b")
    qtbot.waitUntil(lambda: dialog.height() == window.height())
    qtbot.wait(20)
    for shown in (dialog.start, form.note):  # what stands in the way is never scrolled away
        assert shown.isVisible() and dialog.rect().contains(shown.geometry())
    assert (
        window.frameGeometry().top() <= dialog.y()
        and dialog.frameGeometry().bottom() <= window.frameGeometry().bottom()
    )
    form.more.header.setChecked(False)
    form.name.setText("fine")
    form.format.setCurrentIndex(form.format.findData("safetensors-16bit"))
    form.more.header.setChecked(False)
    qtbot.waitUntil(lambda: dialog.height() <= low)
    dialog.start.click()
    queue.end(MergeResult(folder=str(tmp_path / "x"), bytes=GB, tensors=4, changed=4))
    qtbot.waitUntil(lambda: dialog.height() < 250)
    queue.follow(7, 8, "certify")
    queue.end_following(8, "certify", CERTIFICATE)
    qtbot.waitUntil(lambda: 300 < dialog.height() < 500)


def test_formats_stand_under_headings_that_nobody_can_choose(dialog: ExportDialog) -> None:
    combo = dialog.form.format
    rows = [(combo.itemText(n), combo.itemData(n)) for n in range(combo.count())]
    assert rows[:4] == [("Model folder", None), ("Safetensors", SAFETENSORS), ("GPTQ", "gptq"), ("AWQ", "awq")]
    assert rows[4:7] == [("HQQ", "hqq"), ("GGUF file", None), ("GGUF Q4_K_M (usual)", "q4_k_m")]
    assert rows[11][1] is None and len({key for _, key in rows if key}) == len(rows) - 3 == len(dialog._draft.choices)
    assert combo.maxVisibleItems() < 20
    for text, key in rows:  # by the keyboard, from one end to the other: a heading is passed over
        if key is None:
            assert not combo.model().flags(combo.model().index(combo.findText(text), 0)) & Qt.ItemFlag.ItemIsEnabled
    combo.setCurrentIndex(combo.findData("hqq"))
    QTest.keyClick(combo, Qt.Key.Key_Down)
    assert combo.currentData() == dialog._draft.format == "q4_k_m"


def test_the_proposed_name_is_free_in_each_format_until_the_user_gives_one(
    dialog: ExportDialog, draft: ExportDraft, tmp_path: Path
) -> None:
    for taken in ("tiny-1B-pirate", "tiny-1B-pirate-2", "tiny-1B-pirate-GPTQ-4bit", "new/tiny-1B-pirate"):
        (tmp_path / taken).mkdir(parents=True)
    form = dialog.form
    for key, name in (("gptq", "tiny-1B-pirate-2"), ("awq", "tiny-1B-pirate"), (SAFETENSORS, "tiny-1B-pirate-3")):
        form.format.setCurrentIndex(form.format.findData(key))
        assert form.name.text() == draft.name == name and dialog.start.isEnabled(), key
    draft.set_folder(tmp_path / "new")
    assert form.name.text() == "tiny-1B-pirate-2"
    form.name.setText("tiny-1B-pirate")
    assert "exists there already" in form.note.text.text()
    form.format.setCurrentIndex(form.format.findData("gptq"))
    form.format.setCurrentIndex(form.format.findData(SAFETENSORS))
    assert form.name.text() == "tiny-1B-pirate" and not dialog.start.isEnabled(), "what the user wrote stays"


def test_a_cancel_is_answered_at_once_and_what_rests_has_no_speed(
    dialog: ExportDialog, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialog.form.format.setCurrentIndex(dialog.form.format.findData(SAFETENSORS))
    dialog.start.click()
    assert queue.then[0].title == "Certify tiny-1B-pirate (safetensors)"
    monkeypatch.setattr(ExportDraft, "speed", 5e6)
    queue.progressed.emit(7, Progress(phase="Merging", done=GB, total=2 * GB, unit="bytes"))
    assert "5.0 MB/s" in dialog.figures.text()
    dialog.pause.click()
    queue.progressed.emit(7, Progress(phase="Merging", done=GB, total=2 * GB, unit="bytes"))
    assert dialog.phase.text() == "Paused" and "/s" not in dialog.figures.text()
    dialog.stop.click()
    assert dialog.phase.text() == "Cancelling…" and not dialog.stop.isEnabled() and not dialog.pause.isEnabled()
    queue.progressed.emit(7, Progress(phase="Merging", done=GB, total=2 * GB, unit="bytes"))
    assert dialog.phase.text() == "Cancelling…"
    queue.end(None, WeftError(ErrorKind.CANCELLED, "Cancelled."))
    assert dialog.start.isVisible() and not dialog.error.isVisible()
    dialog.start.click()
    assert dialog.stop.isEnabled() and dialog.phase.text() != "Cancelling…"


@pytest.mark.parametrize("there", ["base", "merge", "nothing"])
def test_a_model_that_weft_packed_leads_to_what_it_was_made_from_and_never_to_a_hub_that_lacks_it(
    queue: Queue, jobs: Jobs, qtbot: QtBot, tmp_path: Path, there: str
) -> None:
    voice = AdapterStack(adapters=(StackedAdapter(path=str(tmp_path / "voice"), name="voice", weight=0.5),))
    merged, packed = tmp_path / "own-voice", tmp_path / "own-voice-GPTQ-4bit"
    for folder in (merged, packed, tmp_path / "voice"):
        folder.mkdir()
    merge = card(MergePlan(model="/m/own", stack=voice, target=str(merged), base_name="own"), [])
    (merged / "README.md").write_text(merge, "utf-8")
    plan = QuantizePlan(model="/m/own", target=str(packed), calibration="", base_name="own")
    (packed / "README.md").write_text(quantized_card(plan, merged, 1), "utf-8")
    here = {
        "own": {"base": folder_model()}.get(there),
        "own-voice": {"merge": folder_model(path=str(merged))}.get(there),
    }
    entry = model("own-voice-GPTQ-4bit", format=ModelFormat.GPTQ, quantization="4-bit, group 32", path=str(packed))
    dialog = made_dialog(entry, queue, jobs, tmp_path, qtbot, here.get)
    qtbot.waitUntil(dialog.form.base_note.isVisible)
    text, use = dialog.form.base_note.text.text(), dialog.form.use_base
    assert ("made from own-voice." if there == "merge" else "made from own with voice 0.5.") in text
    assert use.isVisible() is (there != "nothing") and (not use.isVisible() or use.text() == "Use it")
    assert ("not in your library" in text) is (there == "nothing")
