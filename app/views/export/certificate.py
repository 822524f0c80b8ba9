"""A certificate as a table: how far two models are apart over the same text."""

from __future__ import annotations

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QDialog, QGridLayout, QLabel, QWidget

from app.core.certify_plan import Certificate, verdict
from app.views.widgets import button, column, label, row, rule, title


class CertificateView(QWidget):
    """The figures of a certificate, with what each of them means on hover."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.head = title("Certificate", 0)
        self.of = label(tone="muted", wrap=True, selectable=True)
        self.verdict = label(wrap=True, selectable=True)
        self.verdict.setAccessibleName("What the certificate says")
        grid = QGridLayout()
        grid.setContentsMargins(0, 4, 0, 4)
        grid.setHorizontalSpacing(24)
        grid.setVerticalSpacing(4)
        grid.setColumnStretch(2, 1)
        self.values: dict[str, QLabel] = {}
        for place, (key, text, tip) in enumerate(_ROWS):
            name = label(text, tone="muted")
            value = label(selectable=True)
            value.setAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
            value.setAccessibleName(text)
            for each in (name, value):
                each.setToolTip(tip)
            grid.addWidget(name, place, 0)
            grid.addWidget(value, place, 1)
            self.values[key] = value
        self.notes = label(tone="muted", wrap=True, selectable=True)
        whole = column(self.head, self.of, self.verdict, spacing=4, parent=self)
        whole.addLayout(grid)
        whole.addWidget(self.notes)

    def show_certificate(self, found: Certificate) -> None:
        """Show one."""
        self.of.setText(f"{found.b} against {found.a}")
        self.verdict.setText(verdict(found))
        texts = {
            "logits": f"{found.largest_logit_difference:.3g}",
            "kl": f"{found.mean_kl:.3g} nats",
            "largest_kl": f"{found.largest_kl:.3g} nats",
            "top1": f"{100 * found.top1_agreement:.2f} %",
            "before": f"{found.perplexity_a:.4f}",
            "after": f"{found.perplexity_b:.4f}",
            "text": f"{found.text}, {found.predictions:,} predictions",
        }
        for key, text in texts.items():
            self.values[key].setText(text)
        self.notes.setText("\n".join(found.notes))
        self.notes.setVisible(bool(found.notes))


class CertificateDialog(QDialog):
    """A certificate that was stored with a model."""

    def __init__(self, found: Certificate, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setWindowTitle("Certificate")
        self.setAccessibleName("Certificate")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.setMinimumWidth(480)
        self.view = CertificateView()
        self.view.show_certificate(found)
        when = label(f"Made {found.made.replace('T', ' ').replace('+00:00', ' UTC')}", tone="muted")
        close = button("Close", self.close)
        close.setDefault(True)
        column(self.view, when, rule(), spacing=12, parent=self, margins=(24, 24, 24, 16)).addLayout(row(1, close))


_ROWS = (
    ("logits", "Largest logit difference", "Over all predictions and the whole vocabulary"),
    ("kl", "Mean KL divergence", "How much information the result's predictions lose; 0 is none"),
    ("largest_kl", "Largest KL divergence", "Of the one prediction that differs most"),
    ("top1", "Same likeliest token", "Share of the predictions in which both models would choose the same token"),
    ("before", "Perplexity before", "Of the base with its adapters, over the text"),
    ("after", "Perplexity after", "Of the result, over the same text"),
    ("text", "Text", "Both models read the same tokens"),
)
