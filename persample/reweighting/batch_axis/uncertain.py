"""What `reweight` says where it is not certain which rows of a layer belong to which sample."""

from __future__ import annotations

from collections.abc import Sequence

from persample.reweighting.batch_axis.folded import Folded, Reading

LEAVE_OUT = "a policy that returns None for it, in fngd a parameter group with precondition=False"


def uncertain(
    path: str, shape: Sequence[int], batch: int | None, candidates: Sequence[Reading], *, linear: bool, note: str
) -> ValueError:
    """Returns the error for a layer's output of that shape, with what was found and what to do.

    Arguments:
        path: the layer's.
        shape: of its output.
        batch: how many samples the model was called with, None where that is unknown.
        candidates: the readings that the shape allows.
        linear: whether it is a linear layer, and no convolution.
        note: what a trial showed, or why there was none.
    """
    remedy = f"give the optimiser (or persample.reweight) batch_axis={{'{path}': axis}}"
    if batch is None:
        return ValueError(
            f"the batch size is unknown at layer '{path}' (output of shape {list(shape)}): the model's own "
            "forward was not called with a tensor. Call the model itself, or say where the samples are: give the "
            "optimiser (or persample.reweight) batch_axis=0 if they are on axis 0 of every layer's output, or "
            f"batch_axis={{'{path}': axis, ...}} by layer. Or leave the layer out: {LEAVE_OUT}."
        )
    ordinary = [each.axis for each in candidates if each.ordinary]
    folded = sorted({each.axis for each in candidates if not each.ordinary})
    found = []
    if ordinary:
        found.append(
            f"ax{'es' if len(ordinary) > 1 else 'is'} {ordinary} {'all have' if ordinary[1:] else 'has'} that size"
        )
    if folded:
        found.append(
            f"ax{'es' if folded[1:] else 'is'} {folded} {'have multiples' if folded[1:] else 'has a multiple'} of it"
        )
    rows = (
        f" Where every sample has several rows of an axis, give batch_axis={{'{path}': persample.Folded()}}, with "
        "before= and after= as they lie."
    )
    if not linear:
        return ValueError(
            f"layer '{path}' has an output of shape {list(shape)}, but the model's input {batch} samples, and axis 0 "
            f"must count samples{f', or as many rows of each, but {note}' if found else ''}. If each of its "
            f"{shape[0]} rows is to be a sample of its own, {remedy.replace('axis}', '0}')}.{rows if found else ''} "
            f"Or leave the layer out: {LEAVE_OUT}."
        )
    what = f"{' and '.join(found)}, and {note}" if found else "no axis before the last has that size or a multiple"
    return ValueError(
        f"cannot tell which axis of layer '{path}' counts samples: its output has shape {list(shape)}, the model's "
        f"input has {batch} samples, and {what}. Please {remedy}, or batch_axis=axis for all linear "
        f"layers.{rows if folded else ''} Or leave the layer out: {LEAVE_OUT}."
    )


def called_apart(path: str) -> ValueError:
    """Returns the error for a layer that is called by hand where layers are asked about together."""
    return ValueError(
        f"layer '{path}' was called apart from the model's own forward, but with joint=True (gram='network') the "
        "layers of one forward pass are asked about together. Call the model itself, or ask layer by layer "
        f"(gram='layer'). Or leave the layer out: {LEAVE_OUT}."
    )


def disagreeing(path: str, shape: Sequence[int], batch: int | None, given: Folded) -> ValueError:
    """Returns the error for an output that is not as the user says."""
    return ValueError(
        f"layer '{path}' has an output of shape {list(shape)} in a batch of {'unknown' if batch is None else batch} "
        f"samples, which does not agree with batch_axis={{'{path}': {given}}}: axis {given.axis} must hold before · "
        "batch · after rows. Give the numbers that it holds, with None for one that follows from the others."
    )


def told_by_losses(shape: Sequence[int], axis: int) -> str:
    """Returns the warning that a model may take time first.

    Arguments:
        shape: of its first input, of which the losses are one for each entry of axis 1.
        axis: which axis of the output those are; 0 are taken for the samples.
    """
    taken = (
        "These are taken for the samples from now on: the model puts them in front"
        if axis == 0
        else "Yet its axis 0 is taken to count samples, over which the losses are a mean or sum: if the model takes "
        "time first, that is wrong"
    )
    return (
        f"The losses of this batch are [{shape[1]}], one for each entry of axis {axis} of the model's output, and of "
        f"axis 1 of its input, {list(shape)}. {taken} (persample.reweight). Say which axis of the layers' outputs "
        "counts samples by batch_axis=1, or batch_axis=0, and this warning goes"
    )
