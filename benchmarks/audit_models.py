"""The audit of models as they come: torchvision, timm, transformers, random weights, one mini-batch each.

No finding above a note is what is wanted. ``python -m benchmarks.audit_models`` writes the table to
docs/audit_models.md; ``--only PATTERN`` runs some and prints them.
"""

import argparse
import gc
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import precisebn
from benchmarks.peers import installed
from precisebn.models.families import is_norm_with_statistics

PAGE = Path(__file__).parents[1] / "docs" / "audit_models.md"
SAMPLES = 16  # from which on a mini-batch is not small


class Case(NamedTuple):
    """A model, by the library that it is of, and what goes into it."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]


class Row(NamedTuple):
    """What came of one."""

    case: Case
    norms: int
    report: precisebn.AuditReport | None
    seconds: float
    failure: str


def main() -> None:
    """Audit the models that were asked for; write the page of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="a pattern over library/name; then nothing is written")
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    rows = []
    for case in cases():
        if fnmatchcase(f"{case.library}/{case.name}", arguments.only):
            rows.append(row := audited(case))
            print(f"{case.library}/{case.name}: {row.seconds:.1f} s, {row.failure or codes_of(row)}", flush=True)
            gc.collect()
    if arguments.only == "*":
        arguments.output.write_text(page(rows))
    if any(row.failure or (row.report is not None and row.report.at_least("warning")) for row in rows):
        sys.exit("there are findings above a note, or failures")


def audited(case: Case) -> Row:
    """The audit of one model, in training mode, as it comes."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries' own
            model, batch = case.build().train(), case.batch()
            norms = sum(map(is_norm_with_statistics, model.modules()))
            begin = time.perf_counter()
            report = precisebn.audit(model, batch)
            return Row(case, norms, report, time.perf_counter() - begin, "")
    except Exception as error:  # one model is no reason to go without the others
        return Row(case, 0, None, 0.0, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")


def codes_of(row: Row) -> str:
    """The codes found, gravest first, each with its severity and how often."""
    assert row.report is not None
    counts = Counter((one.code, one.severity) for one in row.report)
    return ", ".join(f"{code} {severity}{f' x{n}' if n > 1 else ''}" for (code, severity), n in counts.items()) or "-"


def page(rows: list[Row]) -> str:
    """The page as Markdown."""
    done = [row for row in rows if row.report is not None]
    graver = sum(bool(row.report and row.report.at_least("warning")) for row in rows)
    found = sorted({one.code: one.title for row in done if row.report for one in row.report}.items())
    lines = [
        "# The audit of models as they come",
        "",
        f"{len(done)} models with random weights, in training mode, one mini-batch of {SAMPLES} samples each; {graver} "
        "with a finding above a note.",
        f"torch {torch.__version__}; `python -m benchmarks.audit_models` writes this page. What the codes mean is on "
        "[audit.md](audit.md):",
        ", ".join(f"{code} {title}" for code, title in found) + ".",
        "",
        "| library | model | normalization layers | findings | seconds |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.case.library} | {row.case.name} | {row.norms} | {row.failure or codes_of(row)} | {row.seconds:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


# ---- The models ------------------------------------------------------------------------------------------------------

TORCHVISION = (
    "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "mnasnet0_5", "mnasnet1_0",
    "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18",
    "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "vgg11_bn", "wide_resnet50_2", "maxvit_t",
)  # fmt: skip
TORCHVISION_SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
TORCHVISION_VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")
TIMM = (
    "cspresnet50", "darknet53", "dla34", "dpn68", "efficientnet_b0", "efficientformer_l1", "fastvit_t8", "fbnetc_100",
    "ghostnet_100", "hardcorenas_a", "hrnet_w18_small", "inception_v4", "levit_128s", "mixnet_s",
    "mobilenetv3_small_100", "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_s", "mobilevitv2_050", "regnetx_002",
    "regnety_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "res2net50_26w_4s", "resnest14d", "resnet18",
    "resnetrs50", "rexnet_100", "selecsls42", "semnasnet_075", "skresnet18", "spnasnet_100",
    "tf_efficientnet_b0", "tf_efficientnetv2_b0", "tf_mobilenetv3_small_075", "tinynet_e", "tiny_vit_5m_224",
    "vovnet39a", "xception41",
)  # fmt: skip
# Model and configuration by name, and what of the configuration is smaller than by default; some are not in every
# version of the library.
TRANSFORMERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ResNetForImageClassification", "ResNetConfig", {"depths": [1, 1, 1, 1]}),
    ("RegNetForImageClassification", "RegNetConfig", {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 256],
                                                      "groups_width": 16}),
    ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.5}),
    ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.5}),
    ("EfficientNetForImageClassification", "EfficientNetConfig", {"width_coefficient": 1.0, "depth_coefficient": 1.0,
                                                                  "hidden_dim": 1280}),
    ("MobileViTForImageClassification", "MobileViTConfig", {}),
    ("MobileViTV2ForImageClassification", "MobileViTV2Config", {"width_multiplier": 0.5}),
    ("LevitForImageClassification", "LevitConfig", {"image_size": 128}),
    ("CvtForImageClassification", "CvtConfig", {}),
    ("SwiftFormerForImageClassification", "SwiftFormerConfig", {}),
    ("SegformerForSemanticSegmentation", "SegformerConfig", {}),
)  # fmt: skip


def cases() -> Iterator[Case]:
    """All of them."""
    torchvision = installed("torchvision")
    assert torchvision is not None, "the table is of three libraries: install the extra bench"
    for name in TORCHVISION:
        arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = {"inception_v3": 299, "maxvit_t": 224}.get(name, 128)
        yield Case("torchvision", name, _calling(getattr(torchvision.models, name), **arguments), _images(size))
    for name in TORCHVISION_SEGMENTATION:
        yield Case(
            "torchvision",
            name,
            _calling(getattr(torchvision.models.segmentation, name), weights_backbone=None),
            _images(64),
        )
    for name in TORCHVISION_VIDEO:
        yield Case("torchvision", name, _calling(getattr(torchvision.models.video, name)), _videos())
    import timm

    for name in TIMM:
        size = 224 if name.startswith(("levit", "tiny_vit", "efficientformer", "repvit", "fastvit")) else 128
        yield Case("timm", name, _calling(timm.create_model, name), _images(size))
    import transformers

    for name, config, smaller in TRANSFORMERS:
        model, configuration = getattr(transformers, name, None), getattr(transformers, config, None)
        if model is not None and configuration is not None:
            yield Case("transformers", name, _built(model, configuration, smaller), _pixels())


def _calling(function: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: function(*args, **kwargs)


def _built(model: Any, configuration: Any, smaller: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        built: nn.Module = model(configuration(**smaller))
        return built

    return build


def _images(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, 3, size, size)


def _videos() -> Callable[[], Tensor]:
    return lambda: torch.randn(SAMPLES, 3, 4, 32, 32)


def _pixels() -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(SAMPLES, 3, 128, 128)}


if __name__ == "__main__":
    main()
