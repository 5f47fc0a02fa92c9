"""One temperature per depth, by which logits are divided so that confidences agree with accuracies."""
import torch

from ..utils.errors import InputError

__all__ = ['MOST_IMAGES', 'fit_temperature']


MOST_IMAGES = 5_000  # to fit one number: more only cost memory
LEAST, GREATEST = 0.05, 20.0


def fit_temperature(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Find the temperature of the least negative log-likelihood.

    'On Calibration of Modern Neural Networks' (arXiv 1706.04599, section 4.2). The likelihood has one optimum over the
    inverse temperature b: the root, found by bisection, of its slope, the mean over images of sum_c p_c z_c - z_y with
    p = softmax(b z).

    Args:
        logits: [N, C], of images that the calibration is not measured on.
        target: Labels, [N].

    Returns:
        The temperature, from 0.05 to 20.

    Raises:
        InputError: If no such temperature is best: every image is right, or the logits say nothing about the labels.
    """
    z = logits.double()
    wanted = z.gather(1, target[:, None]).mean()

    def slope(temperature: float) -> float:
        return float(((z / temperature).softmax(1) * z).sum(1).mean() - wanted)

    low, high = LEAST, GREATEST
    if not slope(low) > 0 > slope(high):
        top1 = 100 * (z.argmax(1) == target).double().mean()
        raise InputError(
            f'images to fit a temperature on must be many, some of them mistaken and more right than by chance, got '
            f'{len(z)} with top-1 {top1:.2f} %')
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return round(high, 4)
