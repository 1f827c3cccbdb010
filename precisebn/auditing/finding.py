"""Finding: one mistake, or what may be one, with its remedy."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["SEVERITIES", "Finding", "Severity"]

Severity = Literal["note", "warning", "error"]

SEVERITIES: tuple[Severity, ...] = ("note", "warning", "error")
"""From mild to grave: worth knowing; likely to cost accuracy; wrong."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found.

    Attributes:
        code: stable name of the check, ``"PBN101"``.
        severity: ``"note"``, ``"warning"`` or ``"error"``.
        title: what the check looks for, in a few words.
        layers: qualified names of the layers (or parameters, or buffers) that it is about; may be empty.
        what: one sentence of what happens.
        remedy: one sentence with the call to make.
        source: where that is known from: a paper, an issue, a page.

    Example:
        >>> import precisebn
        >>> from torch import nn
        >>> [finding] = precisebn.audit(nn.Sequential(nn.BatchNorm2d(8, momentum=0.99)), only="PBN206")
        >>> finding.severity, finding.layers, finding.source
        ('note', ('0',), 'https://github.com/pytorch/vision/issues/8250')
        >>> finding.remedy.partition(";")[0]
        'layer.momentum = 0.01, if it is meant as TensorFlow means it'
    """

    code: str
    severity: Severity
    title: str
    layers: tuple[str, ...]
    what: str
    remedy: str
    source: str

    def to_dict(self) -> dict[str, Any]:
        """All of it, in what JSON knows."""
        return {**asdict(self), "layers": list(self.layers)}
