"""The public function and its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from simmim_fast._arguments import check_choice
from simmim_fast._backends import BACKENDS
from simmim_fast.interop.acceleration import hugging_face, official, openmmlab, timm
from simmim_fast.interop.acceleration.compare import difference
from simmim_fast.interop.acceleration.form import Form, is_attention
from simmim_fast.interop.acceleration.fused import fused_class, is_fused

_FORMS = (*official.FORMS, *hugging_face.FORMS, *timm.FORMS, *openmmlab.FORMS)


@dataclass
class Report:
    """What `accelerate` did, by the names of the modules (`model.named_modules()`).

    Attributes:
        accelerated: Modules that run fused ops now.
        restored: Modules that were put back.
        left: Modules that look like attention or like a form that is known, or are of simmim_fast, and why they stay.
        notes: For accelerated modules, when they run their own forward all the same, or may come to differ from it.
    """

    accelerated: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"accelerated: {len(self.accelerated)}", f"left as they are: {len(self.left)}"]
        if self.restored:
            lines = [f"restored: {len(self.restored)}", *lines[1:]]
        return "\n".join([*lines, *_grouped("left", self.left), *_grouped("note", self.notes)])


def accelerate(model: nn.Module, *, undo: bool = False, backend: str = "auto") -> Report:
    """Put the fused ops into a live model, in place; parameters, state dict and outputs stay what they are.

    Takes Swin, Swin V2 and ViT of the official code (microsoft/SimMIM, microsoft/Swin-Transformer) and of forks that
    compute the same, Swin and Swin V2 of timm, their shifted windows of mmpretrain and mmdetection, and those layers of
    Hugging Face in any model that holds them. A module is known by its attributes, and each kind is compared with its
    own forward before it is changed; what differs, or is not known, is left as it is and listed with the reason.

    Accelerated modules run their own forward while attention dropout draws, and for calls that ask for attention
    weights or leave heads out. They can be copied, pickled (where simmim_fast can be imported), compiled and
    checkpointed, and loaded with the same state dicts.

    Args:
        model: A model on any device, with its weights, before it is sharded.
        undo: Puts everything back instead.
        backend: "auto", "reference", "native" or "triton", of the ops.

    Returns:
        What was done and what was not; `print` it.

    Raises:
        TypeError: `model` is no module. ValueError: no such backend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("backend", backend, ("auto", *BACKENDS))
    report = Report()
    if undo:
        _restore(model, report)
    else:
        _Walk(backend, report).visit("", model)
    return report


def _restore(model: nn.Module, report: Report) -> None:
    for name, module in model.named_modules():
        if is_fused(module):
            module.__class__ = module._fusion.original
            report.restored.append(name)
        elif hasattr(type(module), "_fusion"):
            report.left[name] = f"its class was changed again, to {type(module).__name__}: undo that first"


class _Walk:
    """One pass over a model.

    Args:
        backend: Of the ops.
        report: Is filled.
    """

    def __init__(self, backend: str, report: Report) -> None:
        self.forms = [form(backend) for form in _FORMS]
        self.report = report
        self.compared: dict[object, str | None] = {}
        self.seen: set[nn.Module] = set()

    def visit(self, name: str, module: nn.Module, within_ours: bool = False) -> None:
        """Treats a module, or what it holds; `within_ours` if a module of this library holds it, which is listed."""
        if module in self.seen:
            return
        self.seen.add(module)
        is_ours = _is_ours(module)
        form = None if is_ours else self.form(module)
        if form is not None:
            self.treat(name, module, form)
        elif is_ours:
            if not within_ours:
                self.report.left[name] = _what_ours_does(module)
        elif self.looks_like_attention(module):
            self.report.left[name] = f"{type(module).__name__} has none of the forms that are known"
            if is_attention(module):
                return
        if form is None or form.contains_others:
            for child_name, child in module.named_children():
                self.visit(f"{name}.{child_name}".removeprefix("."), child, is_ours or within_ours)

    def form(self, module: nn.Module) -> Form | None:
        """The form that the module has."""
        return next((form for form in self.forms if form.fits(module)), None)

    def looks_like_attention(self, module: nn.Module) -> bool:
        """By its structure; or by its name, if it holds nothing of which that is known."""
        if is_attention(module):
            return True
        is_named = "attention" in type(module).__name__.lower()
        return is_named and not any(is_attention(part) or self.form(part) for part in module.modules())

    def treat(self, name: str, module: nn.Module, form: Form) -> None:
        """Accelerates a module that fits a form, or says why not."""
        reason = self.reason(module, form)
        if reason is not None:
            self.report.left[name] = reason
            return
        original = module._fusion.original if is_fused(module) else type(module)
        module.__class__ = fused_class(original, form)
        self.report.accelerated.append(name)
        note = form.note(module)
        if note is not None:
            self.report.notes[name] = note

    def reason(self, module: nn.Module, form: Form) -> str | None:
        """Why a module that fits a form cannot be accelerated; None where it can."""
        if is_fused(module):
            return None
        if hasattr(type(module), "_fusion"):
            return f"it is accelerated already, and its class was changed again, to {type(module).__name__}"
        if form.method in vars(module):
            return f"its {form.method} was replaced on the object itself"
        return form.obstacle(module) or form.values(module) or self.comparison(module, form)

    def comparison(self, module: nn.Module, form: Form) -> str | None:
        """The outcome of `difference`, run once for all modules of the same class, shapes and geometry."""
        tensors = (*module.named_parameters(), *module.named_buffers())
        shapes = tuple((name, tuple(tensor.shape), tensor.is_meta) for name, tensor in tensors)
        geometry = [repr(getattr(module, key, None)) for key in ("window_size", "shift_size", "input_resolution")]
        key = (type(module), form, shapes, *geometry)
        if key not in self.compared:
            self.compared[key] = difference(module, form)
        return self.compared[key]


def _is_ours(module: nn.Module) -> bool:
    """Whether it is a model of this library or part of one, or of a class derived from those."""
    return any(kind.__module__.startswith("simmim_fast.models.") for kind in type(module).__mro__)


def _what_ours_does(module: nn.Module) -> str:
    if any(getattr(part, "backend", None) == "reference" for part in module.modules()):
        return 'it is of simmim_fast, built with backend="reference": built without, it loads the same state dict'
    return "it is of simmim_fast, and calls the fused ops already"


def _grouped(title: str, reasons: Mapping[str, str]) -> Iterator[str]:
    """One line for each reason, with the names that it holds for."""
    for reason, count in Counter(reasons.values()).items():
        names = [name or "the model itself" for name, its in reasons.items() if its == reason]
        few = ", ".join(names[:3]) + (f" and {count - 3} more" if count > 3 else "")
        yield f"  {title}: {few}: {reason}"
