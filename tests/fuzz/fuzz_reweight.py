"""`persample.reweight` on the models of `fuzz_models`: the loop's gradients, or a refusal that is documented."""

from __future__ import annotations

import random
import re
import warnings

import torch
from fuzz_models import draw
from fuzz_optimizers import LAYERS
from fuzz_per_sample import Truth, differs, foreign, largest
from torch import nn

import persample

SHOWN = (*LAYERS, nn.Conv3d, nn.ConvTranspose3d)
# Rows that data place, or one sample at a time: documented as refused (or left to `batch_axis`).
REFUSED = ("experts", "sorted_by_data", "masked_positions", "one_by_one", "packed", "token_experts", "index_selected")


def judge(seed):
    """Returns what is wrong for a seed, a list of sentences; "" stands for nothing."""
    drawn = draw(seed)
    if drawn.unusual in ("nan", "nan entry", "inf entry", "huge") or drawn.batch > 8:
        return []
    truth = Truth(drawn)
    r = random.Random(seed + 7)
    functions = r.random() < 0.4
    kind = f"{'time first ' * drawn.axis}B={drawn.batch} {drawn.unusual} functions={functions}"
    where = f"seed {seed} {kind} {drawn.families}"
    asked = {}

    def policy(layer, grads):
        norms = grads.norms()
        asked[layer] = len(norms)
        return 1 / (1 + norms)

    model = drawn.model
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = persample.reweight(model, policy, functions=functions)
        try:
            drawn.losses(drawn.inputs, drawn.targets).sum().backward()
            said = handle.explain()
            parameters = {path: handle.parameters(path) for path in asked}
        except Exception as error:
            if foreign(error):
                return [f"{where}: foreign {type(error).__name__}: {str(error)[:300]}"]
            # Time first, one axis of the batch's size, or duplicates among few samples: a reading has to be given.
            if drawn.axis or drawn.unusual == "duplicate" or any(name in drawn.families for name in REFUSED):
                return []
            return [f"{where}: refused {type(error).__name__}: {str(error)[:300]}"]
        finally:
            handle.remove()
    return compare(drawn, truth, where, asked, parameters, said, functions)


def compare(drawn, truth, where, asked, parameters, said, functions):
    """Every parameter: Σ_b c_b g_b if its layer was asked about, else Σ_b g_b."""
    faults, model = [], drawn.model
    names = {id(p): n for n, p in model.named_parameters()}
    want = {n: rows.sum(0) for n, rows in truth.rows.items()}
    modules = {n: m for n, m in model.named_modules() if isinstance(m, SHOWN)}
    room = {n: truth.tolerance[n].sum() + 1e-10 * largest(rows).sum() for n, rows in truth.rows.items()}
    taken = {}
    for path in asked:
        if path in modules:
            own = [(f"{path}.{n}", slice(None)) for n, p in modules[path].named_parameters()]
        else:
            part = re.search(r"\[(\d+):(\d+)\]$", path)
            cut = slice(int(part[1]), int(part[2])) if part else slice(None)
            own = [
                (names[id(p)], cut if p.ndim else slice(None))
                for p in parameters[path]
                if p is not None and id(p) in names
            ]
        own = [(n, cut) for n, cut in own if n in truth.rows]
        if not own:
            continue
        flat = torch.cat([truth.rows[n][:, cut].flatten(1) for n, cut in own], 1)
        c = 1 / (1 + flat.norm(dim=1))
        for n, cut in own:
            taken.setdefault(n, []).append(cut)
            want[n][cut] = torch.einsum("b,b...->...", c, truth.rows[n][:, cut])
    several = {path.split(" (")[0] for path in asked if " (" in path}  # c of each use; the loop knows their sum alone
    for n, theirs in want.items():
        if n in several:
            continue
        ours = model.get_parameter(n).grad
        ours = torch.zeros_like(theirs) if ours is None else ours
        found = differs(ours, theirs, room[n])
        if found:
            faults.append(f"{where}: {n} (asked {sorted(asked)}): {found}; explain: {said}"[:900])
    return faults
