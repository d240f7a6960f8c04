"""Statistics of observations: the uncertainty of a mean when they come in groups, and their ranks."""

import torch
from torch import Tensor


def clustered_mean_interval(values: Tensor, clusters: Tensor, z: float = 1.96) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean with a confidence interval that allows for dependence within clusters.

    Pairs that share a prompt are not independent; counting them as such makes intervals too narrow. The
    cluster-robust ("sandwich") standard error of a mean, with the small-sample factor CR1 (Liang and Zeger,
    1986; Cameron and Miller, "A practitioner's guide to cluster-robust inference", 2015), is

    .. math::
        s^2 = \frac{G}{G - 1} \cdot \frac{1}{N^2} \sum_{g=1}^{G} \Bigl(\sum_{i \in g} (x_i - \bar x)\Bigr)^2

    With one observation a cluster it is the usual standard error.

    Args:
        values: Observations, floating point, shape ``(N,)``.
        clusters: Equal numbers for observations of one cluster, int64, shape ``(N,)``.
        z: Half width of the interval in standard errors; 1.96 is 95%.

    Returns:
        Mean, lower end and upper end, each a scalar. The ends are nan where there are fewer than two
        clusters.

    Example:
        >>> values = torch.tensor([0.0, 2.0, 2.0, 4.0])
        >>> clustered_mean_interval(values, clusters=torch.tensor([7, 7, 3, 3]), z=1.0)
        (tensor(2.), tensor(1.), tensor(3.))
    """
    mean = values.mean()
    names, group = torch.unique(clusters, return_inverse=True)
    count = len(names)
    if count < 2:
        return mean, torch.full_like(mean, torch.nan), torch.full_like(mean, torch.nan)
    residual_sums = values.new_zeros(count).index_add(0, group, values - mean)
    variance = count / (count - 1) * residual_sums.square().sum() / len(values) ** 2
    half_width = z * variance.sqrt()
    return mean, mean - half_width, mean + half_width


def fractional_ranks(values: Tensor) -> Tensor:
    """Places in ascending order, as for Spearman's correlation.

    Args:
        values: Shape ``(N,)``, without nan.

    Returns:
        Places from 1; equal values share the mean of their places. Shape ``(N,)``, float64.

    Example:
        >>> fractional_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0]))
        tensor([3.5000, 1.0000, 3.5000, 2.0000], dtype=torch.float64)
    """
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last: Tensor = counts.cumsum(0).double()
    places: Tensor = last - (counts.double() - 1) / 2
    return places[group]
