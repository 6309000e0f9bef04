"""Errors: each says what was received, what is allowed and what to do."""

from __future__ import annotations


class PerSampleError(RuntimeError):
    """Base of the library's own errors.

    >>> issubclass(UnsupportedError, PerSampleError)
    True
    """


class CoupledSamplesError(PerSampleError):
    """Samples of the batch influence each other, so that no sample has a gradient of its own.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> persample.per_sample(model, lambda y, _: y.square().sum(1), torch.randn(5, 3))
    Traceback (most recent call last):
    ...
    persample.errors.CoupledSamplesError: ...in layer '1'...
    """


class UnsupportedError(PerSampleError):
    """The chosen backend does not cover something in the model; the message names it.

    >>> model = nn.LSTM(3, 4, batch_first=True)
    >>> persample.per_sample(model, lambda y, _: y[0].sum((1, 2)), torch.randn(5, 6, 3), backend="hooks")
    Traceback (most recent call last):
    ...
    persample.errors.UnsupportedError: ...LSTM...
    """


class CheckError(PerSampleError):
    """Per-sample gradients do not add up, or chunks have other losses than the batch: the result would have been wrong.

    >>> class Wrong(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x, w):
    ...         ctx.save_for_backward(x)
    ...         return x @ w
    ...     @staticmethod
    ...     def backward(ctx, z):
    ...         return None, ctx.saved_tensors[0].T @ z + 1  # not linear in z
    >>> w = torch.ones(3, 2, requires_grad=True)
    >>> persample.grad(Wrong.apply(torch.randn(5, 3), w).sum(1), w)
    Traceback (most recent call last):
    ...
    persample.errors.CheckError: ...do not add up to the batch gradient...
    """
