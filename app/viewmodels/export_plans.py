"""From what was chosen for an export to the jobs that make it: the task's own plan, and what follows it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from app.core.certify_plan import CertifyPlan, CertifySide
from app.core.export_plan import OWN, ExportPlan, ExportResult
from app.core.library import ModelEntry
from app.core.merge_plan import MergePlan, MergeResult
from app.core.paths import resources
from app.core.push_plan import PushPlan
from app.core.quantize_plan import CALIBRATED, CALIBRATION_TEXT, ENVIRONMENT, QuantizePlan, QuantizeResult
from app.core.stack import AdapterStack
from app.hub.push import check_repo
from app.viewmodels.export_choices import PACKINGS, SAFETENSORS, ExportOptions, bits_of, group_of, method_of
from app.viewmodels.tasks import Step

Plan = MergePlan | ExportPlan | QuantizePlan
Result = MergeResult | ExportResult | QuantizeResult


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """An export as it was chosen. format: see `export_choices.choices`. imatrix: whether a matrix makes a difference."""

    entry: ModelEntry
    stack: AdapterStack
    format: str
    name: str
    folder: Path
    options: ExportOptions

    @property
    def makes_folder(self) -> bool:
        """Whether a model folder is made, and no GGUF file."""
        return self.format in PACKINGS or bool(method_of(self.format))

    @property
    def target(self) -> Path:
        """The folder, or the GGUF file in a folder of its own, that is made."""
        if method := method_of(self.format):
            return self.folder / f"{self.name}-{method.upper()}-{bits_of(self.format, self.options, self.entry)}bit"
        if self.makes_folder:
            return self.folder / self.name
        kind = self.entry.quantization if self.format == OWN.name else self.format
        return self.folder / self.name / f"{self.name}-{(kind or self.format).upper()}.gguf"

    @property
    def environment(self) -> str:
        """Where the task runs."""
        if method_of(self.format):
            return ENVIRONMENT
        return "core" if self.makes_folder else "export"

    @property
    def task(self) -> str:
        """Its name."""
        if method_of(self.format):
            return "quantize"
        return "merge" if self.makes_folder else "export_gguf"

    @property
    def title(self) -> str:
        """What the job is called."""
        if self.task == "merge":
            return f"Merge {self.name}"
        return f"{'Quantize' if self.task == 'quantize' else 'Export'} {self.target.name}"

    @property
    def kind(self) -> str:
        """The format in a word or two: one name may stand for several exports."""
        if method := method_of(self.format):
            return method.upper()
        if self.makes_folder:
            return "safetensors"
        return f"GGUF {(self.entry.quantization if self.format == OWN.name else self.format).upper()}".strip()

    @property
    def takes_imatrix(self) -> bool:
        """Whether an importance matrix makes a difference: only where llama.cpp quantizes."""
        return not self.makes_folder and self.format not in ("f32", "f16", "bf16", "q8_0", OWN.name)

    def plan(self) -> Plan:
        """What the task is given."""
        entry, options, target = self.entry, self.options, str(self.target)
        if method := method_of(self.format):
            return QuantizePlan(
                model=entry.path,
                stack=self.stack,
                target=target,
                method=method,
                bits=bits_of(self.format, options, entry),
                group_size=group_of(self.format, options, entry),
                desc_act=options.desc_act and method == "gptq",
                calibration=(options.calibration or str(resources() / CALIBRATION_TEXT))
                if method in CALIBRATED
                else "",
                base_name=entry.name,
            )
        if self.makes_folder:
            return MergePlan(
                model=entry.path,
                stack=self.stack,
                target=target,
                dtype=options.dtype if self.format == SAFETENSORS else "",
                shard_size=options.shard_size,
                packed=PACKINGS[self.format],
                base_name=entry.name,
            )
        return ExportPlan(
            model=entry.path,
            stack=self.stack,
            target=target,
            type=self.format,
            name=self.name,
            imatrix=options.imatrix if self.takes_imatrix else "",
            modelfile=options.modelfile,
        )

    def steps(self) -> list[Step]:
        """What follows the export: the certificate first, so that it goes up with the rest."""
        options, made, found = self.options, str(self.target), list[Step]()
        if options.certify:
            plan = CertifyPlan(
                a=CertifySide(model=self.entry.path, stack=self.stack, name=self.entry.name),
                b=CertifySide(model=made, name=self.target.name),
                text=options.text or str(resources() / "certificate_text.txt"),
                store=made,
            )
            found.append(
                Step(
                    task="certify",
                    title=f"Certify {self.name} ({self.kind})",
                    parameters=plan,
                    environment=self.environment,
                )
            )
        if options.push is not None:
            path = made if self.makes_folder else str(self.target.parent)
            push = PushPlan(path=path, repo=check_repo(options.push), private=options.private)
            title = f"Upload {self.name} ({self.kind}) to {options.push}"
            found.append(
                Step(
                    task="push_hub",
                    title=title,
                    parameters=push,
                    environment="",
                    resource="network",
                    always=bool(found),  # what could not be compared was made all the same
                )
            )
        return found

    def result(self, told: object) -> Result:
        """What the task has answered."""
        kinds: dict[str, type[Result]] = {
            "merge": MergeResult,
            "export_gguf": ExportResult,
            "quantize": QuantizeResult,
        }
        return msgspec.convert(told, kinds[self.task])
