"""Checks at the door: every error of the package has one form.

``ctc_loss: expected `blank` in [0, 29), got 30``. Values of tensors are looked at only where they
lie on the CPU: reading them from another device would wait for it.
"""

import functools
import math
import numbers
import operator
from collections.abc import Sequence

import torch

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
LOGITS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
Lengths = torch.Tensor | Sequence[int] | int


def bad_value(op, name, expected, got):
    return ValueError(f"{op}: expected `{name}` {expected}, got {got}")


def bad_type(op, name, expected, got):
    return TypeError(f"{op}: expected `{name}` {expected}, got {got}")


LOWEST_TEMPERATURE = 1e-30  # its inverse is a float32; what is below is taken for 0


def logits(op, name, x):
    """`x` as the backends take it: its last stride 1."""
    if not isinstance(x, torch.Tensor):
        raise bad_type(op, name, "to be a tensor", type(x).__name__)
    if x.dtype not in LOGITS:
        raise bad_type(op, name, "of dtype float32, float64, bfloat16 or float16", x.dtype)
    _dense(op, name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise bad_value(
            op, name, "with at least one class in the last dim", f"shape {tuple(x.shape)}"
        )
    x = x.resolve_neg()  # kernels read memory as it is
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense(op, name, x):
    if x.layout != torch.strided or x.is_nested:
        raise bad_value(op, name, "to be dense", "a nested tensor" if x.is_nested else x.layout)


def teacher(op, student, x):
    x = logits(op, "teacher_logits", x)
    if x.shape != student.shape:
        raise bad_value(op, "teacher_logits", f"of shape {tuple(student.shape)}", tuple(x.shape))
    if x.device != student.device:
        raise bad_value(op, "teacher_logits", f"on {student.device}", x.device)
    return x


def weight(op, name, x, shape, device):
    if not isinstance(x, torch.Tensor):
        raise bad_type(op, name, "to be a tensor", type(x).__name__)
    if x.dtype != torch.bool and not x.is_floating_point():
        raise bad_type(op, name, "of a bool or floating dtype", x.dtype)
    _dense(op, name, x)
    if x.shape != shape:
        raise bad_value(op, name, f"of shape {tuple(shape)}", tuple(x.shape))
    if x.device != device:
        raise bad_value(op, name, f"on {device}", x.device)
    if x.requires_grad and torch.is_grad_enabled():
        raise bad_value(
            op, name, "without requires_grad (it has no gradient)", "requires_grad=True"
        )
    return x.resolve_neg()


def choice(op, name, value, allowed):
    if value not in allowed:
        raise bad_value(op, name, f"in {list(allowed)}", repr(value))


def number(op, name, value):
    if not isinstance(value, (int, float)) and isinstance(value, numbers.Real):
        value = float(value)  # numpy's numbers
    if isinstance(value, torch.Tensor):
        raise bad_type(op, name, "to be a number", f"a tensor ({name}.item() is one)")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise bad_type(op, name, "to be a number", type(value).__name__)
    if not -math.inf < value < math.inf:  # torch.compile does not trace math.isfinite
        raise bad_value(op, name, "to be finite", value)
    return float(value)


def flag(op, name, value):
    if isinstance(value, (str, torch.Tensor)) or value not in (True, False):
        raise bad_type(op, name, "to be True or False", repr(value))
    return bool(value)


def _index(value):
    """operator.index, for which torch.compile would make an int a constant of its graph."""
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def integer(op, name, value):
    try:
        return _index(value)
    except TypeError:
        raise bad_type(op, name, "to be an integer", type(value).__name__) from None


def term_weights(op, kd_weight, ctc_weight):
    """The weights of the two terms, as floats."""
    kd_weight = number(op, "kd_weight", kd_weight)
    if ctc_weight is not None:
        return kd_weight, number(op, "ctc_weight", ctc_weight)
    if not 0 <= kd_weight <= 1:
        raise bad_value(op, "kd_weight", "in [0, 1] where `ctc_weight` is not given", kd_weight)
    return kd_weight, 1 - kd_weight


def distillation(op, temperature, teacher_temperature, divergence, beta):
    """The two temperatures and beta, as floats."""
    temperature = number(op, "temperature", temperature)
    if temperature < LOWEST_TEMPERATURE:
        raise bad_value(op, "temperature", "> 0", temperature)
    if teacher_temperature is None:
        teacher_temperature = temperature
    else:
        teacher_temperature = number(op, "teacher_temperature", teacher_temperature)
        if teacher_temperature < LOWEST_TEMPERATURE:
            raise bad_value(op, "teacher_temperature", "> 0", teacher_temperature)
    choice(op, "divergence", divergence, DIVERGENCES)
    beta = number(op, "beta", beta)
    if divergence == "jsd" and not 0 < beta < 1:
        raise bad_value(op, "beta", "in (0, 1)", beta)
    return temperature, teacher_temperature, beta


def ctc(op, x, targets, input_lengths, target_lengths, blank, batch_first, name="logits"):
    """Shapes, dtypes and devices of a CTC problem; its values too, where they are at hand.

    Returns (logits [T, N, C], targets, input_lengths, target_lengths, blank), all on the device of
    the logits.
    """
    x = logits(op, name, x)
    batch_first = flag(op, "batch_first", batch_first)
    if x.dim() == 3:
        if batch_first:
            x = x.transpose(0, 1)
        batched = True
    elif x.dim() == 2:
        x = x.unsqueeze(1)
        batched = False
    else:
        raise bad_value(op, name, "of 2 or 3 dims", f"shape {tuple(x.shape)}")
    T, N, C = x.shape

    if not isinstance(targets, torch.Tensor):
        raise bad_type(op, "targets", "to be a tensor", type(targets).__name__)
    targets = _integers(op, "targets", targets)
    if targets.dim() not in (1, 2):
        raise bad_value(op, "targets", "of 1 or 2 dims", f"shape {tuple(targets.shape)}")
    if not batched and targets.dim() == 1:
        targets = targets.unsqueeze(0)
    if targets.dim() == 2 and targets.shape[0] != N:
        hint = "; for logits [N, T, C] give batch_first=True" if targets.shape[0] == T else ""
        raise bad_value(op, "targets", f"of {N} rows", f"shape {tuple(targets.shape)}{hint}")
    input_lengths = _lengths(op, "input_lengths", input_lengths, N, batched)
    target_lengths = _lengths(op, "target_lengths", target_lengths, N, batched)
    blank = integer(op, "blank", blank)
    if not 0 <= blank < C:
        raise bad_value(op, "blank", f"in [0, {C})", blank)
    return x, targets, input_lengths, target_lengths, blank


def _integers(op, name, x):
    _with_values(op, name, x)
    if x.dtype in INTEGERS:
        return x.resolve_neg()
    if x.dtype in UNSIGNED:
        return x.to(torch.int64)
    raise bad_type(op, name, "of an integer dtype", x.dtype)


def _with_values(op, name, x):
    _dense(op, name, x)
    if x.is_meta:
        raise bad_value(op, name, "with values", "a tensor on the meta device")


def labelled(op, x, N, single):
    if not isinstance(x, torch.Tensor):
        try:
            x = torch.tensor(x, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise bad_type(op, "labelled", "to be a bool tensor", repr(x)) from None
    _with_values(op, "labelled", x)
    if x.dtype != torch.bool:
        raise bad_type(op, "labelled", "of dtype bool", x.dtype)
    if single and x.dim() == 0:
        x = x.unsqueeze(0)
    if x.shape != (N,):
        raise bad_value(op, "labelled", f"of shape ({N},)", tuple(x.shape))
    return x


def _lengths(op, name, x, N, batched):
    if isinstance(x, torch.Tensor):
        x = _integers(op, name, x)
    else:
        try:  # a sequence, a NumPy array, or one number
            one = isinstance(x, (numbers.Integral, torch.SymInt))
            values = [_index(value) for value in ([x] if one else x)]
        except TypeError:
            raise bad_type(op, name, "to be integers", repr(x)) from None
        x = torch.tensor(values, dtype=torch.int64, device="cpu")
    if x.dim() == 0 and not batched:
        x = x.unsqueeze(0)
    if x.dim() != 1 or x.shape[0] != N:
        raise bad_value(op, name, f"of shape ({N},)", tuple(x.shape))
    return x


def ctc_values(op, T, C, targets, input_lengths, target_lengths, blank, labelled=None):
    """The values of lengths and labels; those that are not on the CPU are left to the backend."""
    if input_lengths.is_cpu:
        _in_range(op, "input_lengths", input_lengths, T)
    if not target_lengths.is_cpu:
        return
    padded = targets.dim() == 2
    size = targets.shape[1] if padded else targets.shape[0]
    total, shortest, longest = _in_range(op, "target_lengths", target_lengths, size)
    if not padded and total != size:
        raise bad_value(op, "targets", f"to hold sum(target_lengths) = {total} labels", size)
    if not targets.is_cpu or longest == 0 or (labelled is not None and not labelled.is_cpu):
        return

    if padded and longest < size:
        targets = targets[:, :longest]
    inside = None
    if padded and (labelled is not None or shortest < longest):
        inside = _steps(longest) < target_lengths.unsqueeze(1)
        if labelled is not None:
            inside &= labelled.unsqueeze(1)
    elif labelled is not None:
        inside = labelled.repeat_interleave(target_lengths)
    low = 1 if blank == 0 else 0
    labels = targets if inside is None else torch.where(inside, targets, low)
    least, most = (x.item() for x in torch.aminmax(labels))
    if low <= least and most < C and not least <= blank <= most:
        return
    labels = targets.long()
    wrong = (labels < 0) | (labels >= C) | (labels == blank)
    if inside is not None:
        wrong &= inside
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        n = at[0] if padded else int((target_lengths.cumsum(0) <= at[0]).sum())
        expected = f"in [0, {C}) and other than blank ({blank})"
        raise bad_value(op, "targets", expected, f"{labels[at].item()} (utterance {n})")


def arrive(op, logits, targets, input_lengths, target_lengths, blank, labelled=None):
    """Targets and lengths on the device of the logits; their values are checked where they are at
    hand. torch.compile knows no values: there it happens in the operator, as it runs."""
    tensors = targets, input_lengths, target_lengths
    T, _, C = logits.shape
    ctc_values(op, T, C, *tensors, blank, labelled)
    return tensors if logits.is_cpu else to_device(logits.device, *tensors)


def to_device(device, targets, input_lengths, target_lengths):
    """Targets and lengths on the device of the logits, which is not the CPU.

    Concatenated targets whose lengths are at hand are padded: of others a kernel knows no better
    than that one utterance may have all the labels.
    """
    if targets.dim() == 1 and target_lengths.is_cpu:
        ends = target_lengths.cumsum(0)
        longest = int(target_lengths.max()) if len(ends) else 0
        at = (ends - target_lengths).unsqueeze(1) + _steps(longest)
        at = at.clamp_(max=max(targets.shape[0] - 1, 0))  # past a target's length: any label
        targets = targets[at.to(targets.device, non_blocking=True)]
    tensors = targets, input_lengths, target_lengths
    return tuple(x.to(device, non_blocking=True) for x in tensors)


@functools.lru_cache(maxsize=64)
def _steps(n):
    return torch.arange(n, device="cpu")


def _in_range(op, name, lengths, limit):
    values = lengths.tolist()
    if not values:
        return 0, 0, 0
    shortest, longest = min(values), max(values)
    if shortest < 0 or longest > limit:
        n, value = next((n, v) for n, v in enumerate(values) if not 0 <= v <= limit)
        raise bad_value(op, name, f"in [0, {limit}]", f"{value} (utterance {n})")
    return sum(values), shortest, longest
