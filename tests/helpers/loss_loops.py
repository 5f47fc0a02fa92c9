"""The formulas of the loss in plain loops over Python floats, and outputs to compute them of."""
import math

import torch

from timm_ddnn import SubNetOutput

FORMS = ('energy', 'standardized')
DEPTHS = (20, 14, 8)
SHAPES = ((2, 4, 3), (3, 3, 2), (4, 2, 2))  # C, H, W of the stages; not square, for flattening to matter
BATCH, CLASSES = 3, 5
TARGET = torch.tensor([1, 4, 0])


def make_outputs(depths=DEPTHS, dtype=torch.float64, requires_grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        values = torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator)
        return values.to(dtype).requires_grad_(requires_grad)

    return {d: SubNetOutput(2 * draw(CLASSES), [draw(*shape) for shape in SHAPES]) for d in depths}


def convert(outputs, dtype):
    return {d: SubNetOutput(o.logits.to(dtype), [f.to(dtype) for f in o.features]) for d, o in outputs.items()}


def as_leaves(outputs):
    return {
        d: SubNetOutput(o.logits.detach().requires_grad_(), [f.detach().requires_grad_() for f in o.features])
        for d, o in outputs.items()
    }


# The formulas of the documentation in plain loops. They take nested lists, tensors only to convert them.

def log_softmax_loop(row, temperature=1.0):
    scaled = [z / temperature for z in row]
    log_sum = max(scaled) + math.log(sum(math.exp(z - max(scaled)) for z in scaled))
    return [z - log_sum for z in scaled]


def kl_loop(logits, teacher_logits, temperature):
    total = 0.0
    for row, teacher_row in zip(logits.tolist(), teacher_logits.tolist(), strict=True):
        student, teacher = log_softmax_loop(row, temperature), log_softmax_loop(teacher_row, temperature)
        for s, t in zip(student, teacher, strict=True):
            total += math.exp(t) * (t - s)
    return temperature ** 2 * total / len(logits)


def attention_loop(sample, form):
    channels, height, width = len(sample), len(sample[0]), len(sample[0][0])
    pixels = []
    for h in range(height):
        for w in range(width):
            values = [sample[c][h][w] for c in range(channels)]
            pixels.append(sum(v * v for v in values) / channels if form == 'energy' else sum(values))
    if form == 'energy':
        norm = math.sqrt(sum(p * p for p in pixels))
        return [p / norm for p in pixels]
    mean = sum(pixels) / len(pixels)
    variance = sum((p - mean) ** 2 for p in pixels) / len(pixels)
    return [(p - mean) / math.sqrt(variance + 1e-6) for p in pixels]


def transfer_loop(feature, teacher_feature, form):
    total = 0.0
    for sample, teacher_sample in zip(feature.tolist(), teacher_feature.tolist(), strict=True):
        student, teacher = attention_loop(sample, form), attention_loop(teacher_sample, form)
        squares = sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True))
        total += squares if form == 'energy' else squares / len(student)
    return total / len(feature)


def cross_entropy_loop(logits, target):
    """For class indices or soft targets."""
    total = 0.0
    for row, y in zip(logits.tolist(), target.tolist(), strict=True):
        log_probs = log_softmax_loop(row)
        soft = y if isinstance(y, list) else [float(c == y) for c in range(len(row))]
        total -= sum(p * q for p, q in zip(soft, log_probs, strict=True))
    return total / len(logits)


def smoothed_loop(logits, target, smoothing=0.1):
    total = 0.0
    for row, y in zip(logits.tolist(), target.tolist(), strict=True):
        log_probs = log_softmax_loop(row)
        total -= (1 - smoothing) * log_probs[y] + smoothing * sum(log_probs) / len(row)
    return total / len(logits)


def binary_loop(logits, target):
    total = 0.0
    for row, soft in zip(logits.tolist(), target.tolist(), strict=True):
        for z, p in zip(row, soft, strict=True):
            total += p * math.log1p(math.exp(-z)) + (1 - p) * math.log1p(math.exp(z))
    return total / (len(logits) * len(logits[0]))


def loss_loop(
        outputs,
        target,
        temperature=1.0,
        alpha=0.3,
        beta=0.1,
        attention='energy',
        stages=(-1,),
        weights=None,
        cross_entropy=cross_entropy_loop,
):
    full = 20
    loss = cross_entropy(outputs[full].logits, target)
    for d, output in outputs.items():
        if d == full:
            continue
        part = cross_entropy(output.logits, target)
        part += alpha * kl_loop(output.logits, outputs[full].logits, temperature)
        for s in stages:
            part += beta * transfer_loop(output.features[s], outputs[full].features[s], attention)
        loss += (weights or {}).get(d, 1.0) * part
    return loss
