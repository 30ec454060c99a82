# SPDX-License-Identifier: MIT
"""Stories about llds.py and retriever.py: first the maths, with numbers to check by hand, then the rest.

The oracle of the rollouts is play(): one episode, one token at a time, the whole context read anew.
"""
import argparse
import copy
import gzip
import http.client
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (GenerationConfig, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen2ForCausalLM)
from transformers.cache_utils import Cache
from transformers.utils import logging as transformers_logging

import llds
import retriever
from retriever import BM25, HTTPRetriever, load_corpus, serve, words

torch.set_num_threads(1)
GATES = ("token", "response", "action")
COUNTS = ("preserved_tokens", "penalized_tokens", "units", "open_units")
LOSSES = {"policy": lambda logp, b, **kw: llds.policy_loss(logp, b.other, b.adv, b.mask, **kw),
          "kl": lambda logp, b, **kw: (llds.kl_penalty(logp, b.other, b.mask, **kw), {})}
for _gate in GATES:
    LOSSES[_gate] = lambda logp, b, gate=_gate, weight=0.3, **kw: llds.llds_penalty(
        logp, b.other, b.adv, b.ids, gate=gate, answer_mask=b.answer, answer_weight=weight, **kw)
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The tests' models are made there, also on a machine with a GPU."""
    monkeypatch.setattr(llds, "DEVICE", "cpu")


def solve(loss, b, **kw):
    """Value, gradient on logp and counts of one loss; no gradient at all counts as zeros."""
    leaf = b.logp.clone().requires_grad_()
    value, info = loss(leaf, b, **kw)
    assert value.dim() == 0
    if value.requires_grad:
        value.backward()
    grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return value.detach(), grad, {k: int(info[k]) for k in COUNTS if k in info}


def near(got, want, rtol=1e-5, atol=1e-6):
    got, want = torch.as_tensor(got).double(), torch.as_tensor(want).double()
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)


def batch(ids, logp, other, adv, answer):
    ids = torch.tensor(ids)
    return SimpleNamespace(ids=ids, mask=ids > 0, logp=torch.tensor(logp), other=torch.tensor(other),
                           adv=torch.tensor(adv), answer=torch.tensor(answer))


def story():
    """Four rollouts, exact in binary. 9 stands on prompt, feedback and padding: it must never count.

    row  A     Delta by action    sums        response   answer tokens
    0    +1    (1, -.5)(.5, -2)   .5, -1.5    -1         (.5, -2)
    1     0    (1, 0)(.5, -1)     1, -.5      .5         (.5, -1); no feedback before this action
    2    -1    (2, 1)(1)          3, 1        4          (1); not preserved
    3    +.5   (-1, 1.5)          .5          .5         (1.5)
    """
    ids = [[0, 1, 1, 0, 2, 2, 0], [0, 1, 1, 2, 2, 0, 0], [0, 1, 1, 0, 2, 0, 0], [0, 0, 1, 1, 0, 0, 0]]
    delta = [[9, 1, -.5, 9, .5, -2, 9], [9, 1, 0, .5, -1, 9, 9], [9, 2, 1, 9, 1, 9, 9],
             [9, 9, -1, 1.5, 9, 9, 9]]
    answer = [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]]
    logp = [[-2. - d for d in row] for row in delta]
    return batch(ids, logp, [[-2.] * 7] * 4, [1., 0., -1., .5], answer)


def random_batch(seed, rows=5):
    """Ragged, feedback at times empty, masks of three types; eighths make sums exact and ties frequent."""
    rng, ids = random.Random(seed), []
    for _ in range(rows):
        ids.append([0] * rng.randint(0, 2))
        for k in range(1, rng.randint(1, 3) + 1):
            ids[-1] += [k] * rng.randint(1, 3) + [0] * rng.randint(0, 2)
    width = max(map(len, ids)) + 1
    ids = [row + [0] * (width - len(row)) for row in ids]
    other = [[rng.randint(-24, -8) / 8 for _ in row] for row in ids]
    logp = [[x + rng.randint(-4, 4) / 8 for x in row] for row in other]
    answer = [[int(k in (0, max(row)) and rng.random() < .6) for k in row] for row in ids]
    signs = [-.5, 0., 2.] + [rng.choice([-1.5, -.5, 0., .5, 2.]) for _ in range(rows)]
    b = batch(ids, logp, other, rng.sample(signs[:rows], rows), answer)
    dtype = (torch.bool, torch.int64, torch.float32)[seed % 3]
    b.mask, b.answer = b.mask.to(dtype), b.answer.to(dtype)
    return b


# 1. By hand
BY_HAND = {  # gate: tokens penalised in full, as answer; units, open ones; value for answer weights 1, .3, 0
    # (1 + 1 + (.5 + .5 + 1.5) w) / 10, for 4 + 4 + 2 preserved tokens
    "token": ([(0, 1), (1, 1)], [(0, 4), (1, 3), (3, 3)], 10, 5, {1.: .45, .3: .275, 0.: .2}),
    # rows 1 and 3 are open: (1 + (.5 + 1.5) w) / 10
    "response": ([(1, 1)], [(1, 3), (3, 3)], 3, 2, {1.: .3, .3: .16, 0.: .1}),
    # the first action of rows 0, 1 and 3 is open: (1 + 1 + 1.5 w) / 10
    "action": ([(0, 1), (1, 1)], [(3, 3)], 5, 3, {1.: .35, .3: .245, 0.: .2}),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("weight", [0., .3, 1.])
def test_the_story_by_hand(gate, weight):
    """Gradient -weight / 10 where penalised; 0 in closed units, at ties, rises, feedback and for A < 0."""
    b, (full, as_answer, units, opened, values) = story(), BY_HAND[gate]
    want = torch.zeros(4, 7)
    for place in full + as_answer:
        want[place] = -.1 if place in full else -.1 * weight
    loss, grad, info = solve(LOSSES[gate], b, weight=weight)
    near(loss, values[weight])
    near(grad, want)
    assert torch.equal(grad == 0, want == 0)
    assert info == {"preserved_tokens": 10, "penalized_tokens": len(full) + len(as_answer) * (weight > 0),
                    "units": units, "open_units": opened}
    near(solve(LOSSES[gate], b, weight=weight, denom=40)[0], values[weight] / 4)  # in place of the 10


@pytest.mark.parametrize("gate, value", [("token", .5), ("response", 0.), ("action", 0.)])
def test_a_unit_whose_sum_is_exactly_zero_stays_closed(gate, value):
    """Delta = (1, -1): the gate asks for a sum above 0. Only the token gate counts the 1: 1 / 2."""
    b = batch([[1, 1]], [[-2., 0.]], [[-1., -1.]], [1.], [[0, 0]])
    loss, grad, info = solve(LOSSES[gate], b)
    assert loss == value and grad.tolist() == [[-value, 0.]] and info["open_units"] == (gate == "token")


@pytest.mark.parametrize("wrong", [
    {"gate": "turn"}, {"gate": None}, {"answer_weight": 1.01}, {"answer_weight": -.01},
    {"answer_mask": None, "answer_weight": .5}, {"answer_mask": None, "answer_weight": 0.}], ids=str)
def test_unusable_options_are_refused_and_the_defaults_are_the_response_gate(wrong):
    b = story()
    near(llds.llds_penalty(b.logp, b.other, b.adv, b.ids)[0], .3)
    with pytest.raises(ValueError):
        llds.llds_penalty(b.logp, b.other, b.adv, b.ids, **{"answer_mask": b.answer, **wrong})


def test_policy_loss_by_hand():
    """A = +1: min(1.5, 1.2) = 1.2 clipped, min(.5, .8) = .5. A = -2: min(-1, -1.6) = -1.6 clipped, -2.2.

    -(1.2 + .5 - 1.6 - 2.2) / 4 = .525 and gradient -A ratio / 4 unless clipped: a mean over tokens, not rows.
    """
    ratios = torch.tensor([[7., 1.5, .5, 7.], [7., .5, 1.1, 7.]])
    b = batch([[0, 1, 1, 0], [0, 1, 1, 0]], ratios.log().tolist(), [[0.] * 4] * 2, [1., -2.], [[0] * 4] * 2)
    loss, grad, _ = solve(LOSSES["policy"], b)
    near(loss, .525)
    near(grad, [[0, 0, -.125, 0], [0, 0, .55, 0]])
    b.mask[0, 1] = False                                 # now rows of 1 and 2 tokens: -(.5 - 1.6 - 2.2) / 3
    near(solve(LOSSES["policy"], b)[0], 1.1)
    near(solve(LOSSES["policy"], b, clip=.6)[0], .9)     # nothing is clipped any more: -(.5 - 1 - 2.2) / 3
    near(solve(LOSSES["policy"], b, denom=6)[0], .55)


def test_kl_penalty_by_hand():
    """r = ref - new = ln 2 gives 2 - ln 2 - 1, -ln 2 gives .5 + ln 2 - 1; gradient (1 - e^r) / 2."""
    half = math.log(2)
    b = batch([[0, 1, 1, 0]], [[0., -half, half, 0.]], [[5., 0., 0., 5.]], [1.], [[0] * 4])
    loss, grad, _ = solve(LOSSES["kl"], b)
    near(loss, .25)                                      # (1 - ln 2 - .5 + ln 2) / 2
    near(grad, [[0, -.5, .25, 0]])
    near(solve(LOSSES["kl"], b, denom=5)[0], .1)


# 2. The first update
@pytest.mark.parametrize("name", GATES + ("kl",))
def test_exactly_nothing_while_new_equals_old(name):
    """relu(0) passes no gradient: the penalty cannot act before the second update on the same rollouts."""
    b = random_batch(1)
    b.logp = b.other.clone()
    for options in [{}] if name == "kl" else [{"weight": 0.}, {"weight": .3}, {"weight": 1.}]:
        loss, grad, info = solve(LOSSES[name], b, **options)
        assert loss == 0 and not grad.any()
        assert info.get("open_units", 0) == info.get("penalized_tokens", 0) == 0


# 3. Micro-batches
@every_loss
@pytest.mark.parametrize("sizes", [[1] * 7, [4, 3], [1, 3, 2, 1], [6, 1]], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_micro_batches_add_up_to_the_mini_batch(name, sizes, seed):
    """Pieces cut to their own width, divided by the mini-batch's token count, give its loss and gradient."""
    b = random_batch(seed, rows=7)
    loss, grad, info = solve(LOSSES[name], b)
    tokens = b.mask[b.adv >= 0].sum() if name in GATES else b.mask.sum()
    value, pieces, counts, start = 0., torch.zeros_like(grad), dict.fromkeys(info, 0), 0
    for size in sizes:
        rows = slice(start, start + size)
        width = int(b.mask[rows].any(0).nonzero().max()) + 1
        part = SimpleNamespace(**{k: v[rows] if k == "adv" else v[rows, :width] for k, v in vars(b).items()})
        one, one_grad, one_info = solve(LOSSES[name], part, denom=int(tokens))
        value, start = value + one, start + size
        pieces[rows, :width] += one_grad
        counts = {k: counts[k] + one_info[k] for k in counts}
    near(value, loss)
    near(pieces, grad)
    assert counts == info


# 4. Poison and emptiness
@every_loss
@pytest.mark.parametrize("fields", ["logp", "other", "answer", "logp other answer"])
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 3e38, -3e38], ids=str)
def test_poison_at_masked_positions_goes_nowhere(name, fields, poison):
    """Prompt, feedback and padding may hold anything, whatever the sign of A; inputs stay as they are."""
    b = random_batch(5)
    assert (b.adv < 0).any() and (b.adv > 0).any() and (b.ids == 0).any()
    b.answer = b.answer.float()
    clean_loss, clean_grad, clean_info = solve(LOSSES[name], b)
    for field in fields.split():
        getattr(b, field)[b.ids == 0] = poison
    before = copy.deepcopy(b)
    loss, grad, info = solve(LOSSES[name], b)
    assert loss.isfinite() and torch.equal(loss, clean_loss) and info == clean_info
    assert torch.equal(grad, clean_grad) and not grad[b.ids == 0].any()
    for key, value in vars(b).items():
        near(value, getattr(before, key), 0, 0)


@pytest.mark.parametrize("denom", [None, 0, 5])
@pytest.mark.parametrize("name, empty", [(k, "mask") for k in LOSSES] + [(k, "set") for k in GATES])
def test_an_empty_mask_or_preserving_set_gives_zero_with_a_graph(name, empty, denom):
    """A loss of 0 that can go backward, never 0 / 0, even where all that is there is NaN."""
    b = story()
    b.adv = torch.tensor([-1., -.5, -1e-6, -3.])
    if empty == "mask":
        b.mask[:], b.ids[:], b.adv[:], b.logp[:], b.other[:] = False, 0, 1., math.nan, math.nan
    leaf = b.logp.clone().requires_grad_()
    loss, info = LOSSES[name](leaf, b, denom=denom)
    assert loss.requires_grad and loss == 0
    loss.backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert not any(info[k] for k in COUNTS if name in GATES and k != "units")


# 5. The equations as slow loops
def places(b):
    return [(i, t) for i in range(b.ids.size(0)) for t in range(b.ids.size(1)) if b.ids[i, t] > 0]


def slow_policy(logp, b, clip=.2):
    gains = []
    for i, t in places(b):
        ratio, a = (logp[i, t] - b.other[i, t]).exp(), b.adv[i]
        gains.append(min(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a))
    return -sum(gains) / len(gains), {}


def slow_kl(logp, b):
    terms = [(b.other[i, t] - logp[i, t]).exp() - (b.other[i, t] - logp[i, t]) - 1 for i, t in places(b)]
    return sum(terms) / len(terms), {}


def slow_llds(logp, b, gate, weight):
    """v2 eq. 9 (token), 10 (response), 4 (action), 5 (answer weight), loop by loop."""
    total, n = 0 * logp.sum(), dict.fromkeys(COUNTS, 0)
    unit_of = {"token": lambda i, t: t, "response": lambda i, t: 0, "action": lambda i, t: b.ids[i, t].item()}
    for i in range(len(b.adv)):
        tokens = [t for j, t in places(b) if j == i and b.adv[i] >= 0]
        n["preserved_tokens"] += len(tokens)
        for unit in sorted({unit_of[gate](i, t) for t in tokens}):
            delta = {t: b.other[i, t] - logp[i, t] for t in tokens if unit_of[gate](i, t) == unit}
            n["units"] += 1
            if sum(d.item() for d in delta.values()) <= 0:
                continue
            n["open_units"] += 1
            for t, d in delta.items():
                share = weight if b.answer[i, t] else 1.
                if d > 0:
                    total = total + share * d
                    n["penalized_tokens"] += share > 0
    return total / max(1, n["preserved_tokens"]), n


@every_loss
@pytest.mark.parametrize("seed", range(12))
def test_random_cases_agree_with_the_slow_loops(name, seed):
    """Value, counts and gradient (autograd of the loop in float64) on ragged batches."""
    b = random_batch(100 + seed, rows=1 + seed % 6)
    exact = SimpleNamespace(**{k: v.double() if v.is_floating_point() else v for k, v in vars(b).items()})
    slow, options = {"policy": (slow_policy, [{"clip": .1}, {"clip": .2}]), "kl": (slow_kl, [{}])}.get(
        name, (partial(slow_llds, gate=name), [{"weight": 0.}, {"weight": .3}, {"weight": 1.}]))
    for option in options:
        loss, grad, info = solve(LOSSES[name], b, **option)
        want_loss, want_grad, want_info = solve(slow, exact, **option)
        near(loss, want_loss)
        near(grad, want_grad)
        assert info == want_info


# 6. Advantages and action numbers
def test_group_advantages_by_hand():
    """(0, 0, 1, 3): mean 1, sample std sqrt((1 + 1 + 0 + 4) / 3); (5, 5, 5, 9): mean 6, sample std 2."""
    rewards = torch.tensor([0., 0., 1., 3., 5., 5., 5., 9.])
    root = math.sqrt(2)
    near(llds.group_advantages(rewards, 4), [-1 / root, -1 / root, 0, 2 / root, -.5, -.5, -.5, 1.5])
    # In pairs: no spread, or half the gap by which they differ over gap / sqrt 2.
    near(llds.group_advantages(rewards, 2), [0, 0, -1 / root, 1 / root, 0, 0, -1 / root, 1 / root])
    # 1e-6 joins the std: +-5e-7 / (7.0711e-7 + 1e-6) = +-.29289
    near(llds.group_advantages(torch.tensor([0., 1e-6]), 2), [-.29289, .29289], atol=1e-4)
    assert rewards.tolist() == [0., 0., 1., 3., 5., 5., 5., 9.]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11])
@pytest.mark.parametrize("reward", [0., 1., .1, .3, .7, -.1, 1e-7, 1234.567])
def test_a_group_without_spread_gets_exactly_zero(reward, size):
    """A mean rounded upwards would make A slightly negative and throw the group out of the preserving set."""
    rewards = torch.tensor([reward] * size + list(range(size)))
    assert llds.group_advantages(rewards, size)[:size].tolist() == [0.] * size


def test_action_ids_by_hand():
    """Runs at both borders, of one token, of a whole row, none; the end of a row does not join the next."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 1], [1] * 6, [0] * 6])
    want = [[0, 1, 1, 0, 2, 0], [1, 0, 2, 2, 0, 3], [1, 1, 0, 0, 0, 2], [1] * 6, [0] * 6]
    for dtype in (torch.bool, torch.int64, torch.float32):
        ids = llds.action_ids(mask.to(dtype))
        assert ids.tolist() == want and not ids.is_floating_point()
    assert mask[0].tolist() == [0, 1, 1, 0, 1, 0]


# 7. A gallery of mistakes
def peer(new, b, gate, weight=.3, **wrong):
    """Ours once more, in other words. A mistake swaps exactly one of the named parts."""
    delta = wrong.get("old", b.other) - wrong.get("policy", new)
    keep = wrong.get("keep", b.adv >= 0)[:, None] & b.mask
    weights = wrong.get("weights", torch.where(b.answer > 0, weight, 1.))
    seen = wrong.get("seen", lambda delta, weights: delta * b.mask)(delta, weights)
    sums = (wrong.get("same", same_unit(b, gate)).float() @ seen[:, :, None]).squeeze(2)
    is_open = wrong.get("is_open", lambda sums: (sums > 0).float())(sums)
    penalty = keep * is_open * weights * wrong.get("relu", torch.relu)(delta)
    return (penalty / wrong.get("count", lambda keep, penalty: keep.sum())(keep, penalty)).sum(), {}


def same_unit(b, gate):
    """same[i, t, u]: do tokens t and u of row i pass the gate together?"""
    ids = {"token": torch.arange(b.ids.size(1)).expand_as(b.ids), "response": b.mask, "action": b.ids,
           "runs": llds.action_ids(b.mask)}[gate]
    return (ids[:, :, None] == ids[:, None, :]) & b.mask[:, None, :]


def mistakes(new, b):
    """Told apart from our action gate when the name speaks of it, otherwise from our response gate."""
    return dict(
        wrong_old_policy_frozen_reference=dict(old=b.other + .5),
        wrong_old_policy_inference_engine=dict(old=b.other + .01 * b.ids),
        wrong_old_policy_snapshot_in_the_same_call=dict(old=new.detach()),
        missing_old_log_probs_padded_with_zero=dict(old=b.other * (b.adv > 0)[:, None]),
        never_called_or_coefficient_ignored=dict(count=lambda keep, penalty: math.inf),
        detached_no_gradient=dict(policy=new.detach()),
        mean_over_penalized_tokens_only=dict(count=lambda keep, penalty: (penalty > 0).sum()),
        mean_over_open_responses_only=dict(count=lambda keep, penalty: keep[(penalty > 0).any(1)].sum()),
        divides_by_all_action_tokens=dict(count=lambda keep, penalty: b.mask.sum()),
        answer_left_out_of_the_denominator=dict(count=lambda keep, penalty: keep[b.answer == 0].sum()),
        mean_of_row_means=dict(count=lambda keep, penalty: keep.sum(1, True).clamp(1) * keep.any(1).sum()),
        sum_instead_of_mean=dict(count=lambda keep, penalty: 1),
        missing_action_gate=dict(same=same_unit(b, "token")),
        missing_response_gate=dict(same=same_unit(b, "token")),
        action_gate_is_the_response_gate=dict(same=same_unit(b, "response")),
        action_gate_on_contiguous_runs=dict(same=same_unit(b, "runs")),
        gate_sum_unmasked=dict(same=torch.ones(4, 7, 7), seen=lambda delta, weights: delta),
        gate_weighted_by_the_answer_weight=dict(seen=lambda delta, weights: delta * weights * b.mask),
        gate_passes_gradient=dict(is_open=lambda sums: sums.relu() / sums.detach().abs().clamp(1e-9)),
        missing_advantage_filter=dict(keep=b.adv > -math.inf),
        advantage_filter_reads_the_prompt_column=dict(keep=(b.adv[:, None] * b.mask)[:, 0] >= 0),
        inverted_filter_nonzero_advantage=dict(keep=b.adv != 0),
        strict_filter_drops_zero_advantage=dict(keep=b.adv > 0),
        answer_mask_unwired=dict(weights=torch.ones(4, 7)),
        answer_mask_inverted=dict(weights=torch.where(b.answer > 0, 1., .3)),
        answer_weight_capped_by_the_coefficient=dict(weights=torch.where(b.answer > 0, .1, 1.)),
        maximum_shares_the_tie=dict(relu=lambda delta: torch.maximum(delta, torch.tensor(0.))),
        clamp_passes_the_tie=dict(relu=lambda delta: delta.clamp(min=0)),
        rises_pay_for_falls=dict(relu=lambda delta: delta))


@pytest.mark.parametrize("mistake", mistakes(story().logp, story()))
def test_every_mistake_shows(mistake):
    """The peer agrees with us on the story; with one wrong part it leaves our loss or our gradient."""
    b, gate = story(), "action" if "action_gate" in mistake else "response"
    ours, right = solve(LOSSES[gate], b), solve(peer, b, gate=gate)
    wrong = solve(lambda new, b: peer(new, b, gate, **mistakes(new, b)[mistake]), b)
    near(right[0], ours[0])
    near(right[1], ours[1])
    assert wrong[0].isfinite() and wrong[1].isfinite().all()
    assert abs(wrong[0] - ours[0]) > 1e-3 or (wrong[1] - ours[1]).abs().max() > 1e-3


def test_the_losses_run_alone():
    """The copy-paste zone, pasted into an empty file that imports torch."""
    source = Path(llds.__file__).read_text(encoding="utf-8")
    zone, pasted = source.partition("copy from here ...")[2].partition("# ---")[0], {"torch": torch}
    exec(zone, pasted)
    b = story()
    for gate in GATES:
        assert pasted["llds_penalty"](b.logp, b.other, b.adv, b.ids, gate)[0] == llds.llds_penalty(
            b.logp, b.other, b.adv, b.ids, gate)[0] > 0
    assert {"group_advantages", "action_ids", "policy_loss", "kl_penalty"} < set(pasted)


PASSAGES = load_corpus(Path(llds.__file__).with_name("tiny_corpus.jsonl"))
QUESTIONS = [question for passage in PASSAGES for question in passage["questions"]]
END, START = "<|im_end|>", "<|im_start|>"


def texts(*contents):
    return [{"contents": content} for content in contents]


# --------------------------------------------------------------------------------- search engine and corpus

def test_bm25_by_hand():
    """Lengths 1, 2, 2, 3, mean 2: 1.2 * (.25 + .75 * length / 2) = .75, 1.2, 1.2, 1.65; k1 + 1 = 2.2.
    idf: red stands in 3 of 4 passages, ln(1 + 1.5 / 3.5) = ln(10/7); fox in 2, ln(1 + 2.5 / 2.5) = ln 2."""
    engine = BM25(texts("Red!", "red fox", "blue fox", "red, red hen"))
    red, fox = math.log(10 / 7), math.log(2)
    short, twice = red * 2.2 / (1 + .75), red * 2 * 2.2 / (2 + 1.65)      # .448, .430; red in passage 1: .357
    stories = {"fox": [(1, fox), (2, fox)],                                # a tie: in corpus order
               "RED": [(0, short), (3, twice), (1, red)],
               "red fox": [(1, red + fox), (2, fox), (0, short), (3, twice)],
               "fox fox": [(1, 2 * fox), (2, 2 * fox)],                    # a repeated term counts each time
               "foxes owl": [], "?!": []}                                  # no hit without a shared term
    for k in (9, 1):                                                       # 9: more than there are
        for (query, want), hits in zip(stories.items(), engine.search(stories, k), strict=True):
            assert [hit["contents"] for hit in hits] == [engine.passages[i]["contents"] for i, _ in want[:k]]
            assert [hit["score"] for hit in hits] == pytest.approx([score for _, score in want[:k]]), query
    assert BM25(texts("a", "a b")).search(["a"], 2)[0][1]["score"] > 0     # idf of a word that is everywhere
    assert engine.passages[0] == {"contents": "Red!"}                      # scores stay out of the corpus


def test_bm25_equals_its_formula_spelled_out():
    docs, queries = [words(p["contents"]) for p in PASSAGES], [q["question"] for q in QUESTIONS[::29]]
    mean = sum(map(len, docs)) / len(docs)
    for query, hits in zip(queries, BM25(PASSAGES).search(queries, k=7), strict=True):
        scores = [0.0] * len(docs)
        for t in words(query):
            df = sum(t in doc for doc in docs)
            for d, doc in enumerate(docs):
                tf, norm = doc.count(t), 1.2 * (1 - .75 + .75 * len(doc) / mean)
                scores[d] += math.log(1 + (len(docs) - df + .5) / (df + .5)) * tf * 2.2 / (tf + norm)
        best = sorted(range(len(docs)), key=lambda d: (-round(scores[d], 9), d))[:7]
        assert [hit["id"] for hit in hits] == [PASSAGES[d]["id"] for d in best]
        assert [hit["score"] for hit in hits] == pytest.approx([scores[d] for d in best])


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'{"a": 1}', b'{"contents": 3}', b"", b'{"contents": "\xff"}'])
def test_load_corpus_reads_plain_and_gz_and_names_a_bad_line(tmp_path, bad):
    path = tmp_path / "c.jsonl"
    good = '{"contents": "\\"É\\"\\ntext"}\n{"contents": "é", "id": 0}\n'.encode()
    path.write_bytes(good)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(good))
    for name in (path, f"{path}.gz"):
        assert load_corpus(name) == [{"contents": '"É"\ntext'}, {"contents": "é", "id": 0}]
    path.write_bytes(good + bad + b"\n" + good)
    with pytest.raises(ValueError, match=r"c\.jsonl, line 3: "):
        load_corpus(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.jsonl: .*empty"):
        load_corpus(path)
    path.write_bytes(good + b'{"contents": "x", "id": 1}\n{"contents": "y", "id": [1]}\n{"contents": "z"}\n')
    assert len(load_corpus(path)) == 5                                     # line 1 has no id, and so no id 1
    path.write_bytes(good + b'{"contents": "x", "id": 0}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl, line 3: .* 0 .*twice"):
        load_corpus(path)


def test_http_and_in_process_search_give_the_identical_feedback():
    """retriever.py's server and client, and Search-R1's JSON between them."""
    engine = BM25(PASSAGES)
    server = serve(engine, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = HTTPRetriever(f"http://127.0.0.1:{server.server_port}/retrieve", timeout=10)
    queries = [q["question"] for q in QUESTIONS[::83]] + ["Zürich é日", "?!"]
    found = there.search(queries, 3)
    assert found == engine.search(queries, 3) and found[-1] == [] and there.search([], 3) == []
    assert list(map(llds.information, found)) == list(map(llds.information, engine.search(queries, 3)))
    paris = engine.search(["Paris"], 3)[0]
    bare = [{name: value for name, value in hit.items() if name != "score"} for hit in paris]
    hits = [{"document": document, "score": hit["score"]} for document, hit in zip(bare, paris)]
    for asked, want in (({"queries": ["Paris"], "topk": 1, "return_scores": True}, [hits[:1]]),
                        ({"queries": ["Paris", "?"]}, [paris, []])):       # three documents by default
        request = urllib.request.Request(there.url, json.dumps(asked).encode())
        assert json.load(urllib.request.urlopen(request, timeout=10)) == {"result": want}
    server.shutdown()
    server.server_close()


def test_a_dead_server_is_retried_and_then_named(monkeypatch):
    """Down, cut off, not JSON, no list, a list too short, a document without contents: then at last an answer."""
    waits, answers = [], [OSError("down"), http.client.IncompleteRead(b"{"), b"<html>", b'{"result": 3}',
                          b'{"result": []}', b'{"result": [[{"document": {}, "score": 1}]]}', b'{"result": [[]]}']

    def urlopen(request, timeout):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(retriever.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(retriever.time, "sleep", waits.append)
    assert HTTPRetriever("http://x:1/retrieve", tries=7).search(["q"], 3) == [[]]
    assert waits == [1, 2, 4, 8, 16, 32] and not answers
    answers[:] = [OSError("down")] * 2
    with pytest.raises(OSError, match="http://x:1/retrieve.*down.*2 times"):
        HTTPRetriever("http://x:1/retrieve", tries=2).search(["q"], 3)
    assert waits[6:] == [1]


def test_what_the_corpus_promises():
    """Sizes, ids, answers that stand in it, and a split by fact: two neighbours on a question's path."""
    assert len(PASSAGES) >= 150 and len({passage["id"] for passage in PASSAGES}) == len(PASSAGES)
    assert len({q["question"] for q in QUESTIONS}) == len(QUESTIONS)       # no question has two answers
    for hops, least in ((1, 300), (2, 150)):
        splits = [q["split"] for q in QUESTIONS if q["hops"] == hops]
        assert len(splits) >= least and splits.count("test") >= .2 * len(splits)
    facts = {"train": set(), "test": set()}
    for q in QUESTIONS:
        path, asked = q["path"], re.findall(r"\w+", q["question"])
        facts[q["split"]] |= {frozenset(pair) for pair in zip(path, path[1:])}
        assert len(path) == q["hops"] + 1 and path[-1] in q["golden_answers"]
        assert path[0] in asked and not set(path[1:]) & set(asked)         # neither link nor answer
    assert not facts["train"] & facts["test"]
    passages = [set(re.findall(r"\w+", passage["contents"])) for passage in PASSAGES]
    assert all(any(fact <= passage for passage in passages) for fact in chain(*facts.values()))


def test_two_hop_questions_need_two_searches():
    """No passage holds both ends of the path. Searched as it is, the question finds its first fact, and its
    second only by the luck of a tie, which goes in corpus order (3 of 222)."""
    asked, names = [q for q in QUESTIONS if q["hops"] == 2], lambda p: set(re.findall(r"\w+", p["contents"]))
    found = BM25(PASSAGES).search([q["question"] for q in asked], llds.Config().top_k)
    holds = lambda q, i, j, passages: any({q["path"][i], q["path"][j]} <= names(p) for p in passages)
    assert not any(holds(q, 0, 2, PASSAGES) for q in asked)
    assert all(holds(q, 0, 1, passages) for q, passages in zip(asked, found))
    assert sum(holds(q, 1, 2, passages) for q, passages in zip(asked, found)) < .02 * len(asked)


# ---------------------------------------------------------------------------------------------- the episode

def test_answers_by_example():
    assert llds.normalize_answer(" The  Cat, a DOG & an owl's\tnest! ") == "cat dog owls nest"
    assert llds.exact_match("the PARIS.", ["Rome", "Paris"]) == llds.exact_match("Theatre", ["theatre"]) == 1
    assert llds.exact_match("Paris, France", ["Paris"]) == llds.exact_match("Paris", []) == 0
    for text, answer in {"<answer> Paris </answer>": "Paris", "<answer></answer>": "", "<answer> Paris": None,
                         "Paris </answer>": None, "</answer><answer> Paris </answer>": None, "": None,
                         "<answer> a <answer> b </answer> c </answer>": "b", "<answer>a\nb</answer>": "a\nb",
                         "<answer>a</answer><answer>b</answer>": "a", "<Answer>a</Answer>": None}.items():
        assert llds.extract_answer(text) == answer, text
    assert llds.between("search", "<think> <search> a </think> <search> b </search>") == "b"


@cache
def bpe():
    """Qwen's habits: </search>\\n\\n is </, search, >\\n\\n; the > of a tag merges with the next tag's </."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\p{L}+|[^\s\p{L}]+\n*|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    some = "<search> capital of France </search>\n\n<information></information>\n\n<answer></answer></answer>"
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=[END, START], show_progress=False)
    model.train_from_iterator([some] * 3 + [llds.CORRECTION], trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END)
    assert tok.tokenize("</search>\n\n" + END) == ["</", "search", ">ĊĊ", END]
    assert tok.tokenize("></") == ["></"]
    return tok


def built_in():
    return llds.load_model(llds.Config(), PASSAGES[:6], QUESTIONS[:18])


FRANCE = texts('"France"\nThe capital of France is Paris.', '"Oslo"\nA city in Norway.')
FOUND = 'Doc 1(Title: "France") The capital of France is Paris.'


def world(tok=None, passages=FRANCE, max_length=math.inf, **flags):
    flags = dict(max_turns=2, top_k=1, max_new_tokens=50, max_feedback_tokens=60) | flags
    return llds.Environment(tok or bpe(), BM25(passages), llds.Config(**flags), max_length)


def play(env, question, choose):
    """One episode, one token at a time: choose(episode) says the next."""
    e = env.reset(question)
    while not e.done:
        e.ids.append(choose(e))
        e.action_id.append(e.turn)
        if env.complete(e):
            env.respond([e])
    return e


def encode(tok, action):
    """A text, or a list of texts that are encoded one by one, as a model may well write them -> token ids."""
    return list(chain(*map(tok.encode, [action] if isinstance(action, str) else action)))


def act(env, name, actions):
    """Plays a story: its name is the question, its actions come one a turn, and Paris is right."""
    ids = [encode(env.tok, action) for action in actions]
    question = {"question": name, "golden_answers": ["Rio", "paris"]}
    return play(env, question, lambda e: ids[e.turn - 1][len(e.ids) - e.start])


class Scripted:
    """A model that replays episodes: after the same context it says the same token. Its keys are token ids:
    it knows of a context exactly what cache and mask let it see."""
    device, config = torch.device("cpu"), SimpleNamespace(num_hidden_layers=1)

    def __init__(self, episodes):
        self.says = {tuple(e.ids[:t]): e.ids[t] for e in episodes for t, k in enumerate(e.action_id) if k}

    def base_model(self, input_ids, attention_mask, position_ids, cache, use_cache):
        keys = input_ids[:, None, :, None].double()
        seen, _ = cache.update(keys, keys, 0)                              # (rows, 1, cells, 1)
        return [torch.where(attention_mask[:, 0], seen[..., 0], -1.0)]     # (rows, width, cells)

    def get_output_embeddings(self):
        return lambda seen: torch.nn.functional.one_hot(torch.tensor(
            [self.says.get(tuple(i for i in row if i >= 0), 0) for row in seen.long().tolist()]), 999)


def replay(env, episodes, group=1, rows=99):
    """rollout() with the scripted model does what play() did; returns its episodes."""
    env.cfg.rollout_batch = rows
    played = llds.rollout(Scripted(episodes), env, [e.question for e in episodes], group, 0.0)
    assert [replace(e, fed=0) for e in played] == [e for e in episodes for _ in range(group)]
    return played


def spoken(env, e):
    return llds.extract_answer(env.decode(e.ids[e.start:]))


SEARCH, RIGHT = "<search> capital of France </search>", "<answer> Paris </answer>"
NO_HIT, FORGETS = "<search> zebra </search>", "<think> hm" + END
STORIES = {  # actions; what follows each: i = information, 0 = no passage matches, c = correction; answer
    "searches, then answers": ([SEARCH, RIGHT], "i", "Paris"),
    "answers at once": (["<think> I know </think>\n" + RIGHT], "", "Paris"),
    "answers wrongly": ([SEARCH, "<answer> Rome </answer>"], "i", "Rome"),
    "finds nothing": ([NO_HIT, RIGHT], "0", "Paris"),
    "asks nothing": (["<search></search>", RIGHT], "0", "Paris"),
    "opens a search twice": (["<search> zebra " + SEARCH, RIGHT], "i", "Paris"),
    "forgets the tag": ([FORGETS, END, RIGHT], "cc", "Paris"),
    "runs into the token limit": (["hm " * 99, "x" * 99, "<answer> Paris" + "x" * 99], "cc", None),
    "closes a search it never opened": (["capital </search>", RIGHT], "c", "Paris"),
    "closes an answer it never opened": (["Paris </answer>", RIGHT], "c", "Paris"),
    "opens an answer, closes it a turn later": (["<answer> Paris" + END, "</answer>", RIGHT], "cc", "Paris"),
    "opens an answer twice": (["<answer> or <answer> Paris </answer>"], "", "Paris"),
    "answers inside a search": (["<search> <answer> Paris </answer>"], "", "Paris"),
    "searches in the last turn": ([SEARCH, NO_HIT, SEARCH], "i0", None),
    "forgets the tag in the last turn": ([SEARCH, SEARCH, FORGETS], "ii", None),
    "spends its turns on mistakes": ([FORGETS, "</search>", SEARCH], "cc", None),
    "merges the last > with newlines": ([SEARCH + "\n\n", RIGHT + "\n\n"], "i", "Paris"),
    "merges the last > with the next tag": ([SEARCH + "</", RIGHT + "</"], "i", "Paris"),
    "spells by letters": ([[*SEARCH], [*RIGHT]], "i", "Paris"),
    "splits oddly": ([["<sear", "ch> capital </se", "arch>\n\n"], ["<ans", "wer> Paris</", "answ", "er></"]],
                     "i", "Paris")}


@pytest.mark.parametrize("group, rows", [(1, 5), (1, 99), (3, 7)])
def test_every_branch_of_the_episode(group, rows):
    """All stories in one rollout, also with fewer cache rows than episodes. A mistake costs its turn, nothing
    follows the last turn, and the tokens of prompt, actions and feedback stay as they were."""
    env, feedback = world(), {"i": llds.OPEN + FOUND + llds.CLOSE, "c": llds.CORRECTION,
                              "0": llds.OPEN + "No passage matches this query." + llds.CLOSE}
    played = [act(env, name, actions) for name, (actions, _, _) in STORIES.items()]
    for e in replay(env, played, group, rows):
        name = e.question["question"]
        actions, follows, answer = STORIES[name]
        assert (spoken(env, e), e.reward, e.done) == (answer, float(answer == "Paris"), True), name
        assert e.searches == [[FRANCE[0]["contents"]] * (f == "i") for f in follows.replace("c", "")], name
        assert e.turn == len(actions) and (e.answer_start is None) == (answer is None), name
        said = [encode(env.tok, action)[:50] for action in actions]
        heard = [env.encode(feedback[f]) for f in follows] + [[]]
        assert [i for i, k in zip(e.ids, e.action_id) if k] == list(chain(*said)), name
        assert e.action_id[len(env.reset(e.question).ids):] == [
            j for k in range(len(said)) for j in [k + 1] * len(said[k]) + [0] * len(heard[k])], name
        assert env.decode(e.ids) == name + "".join(env.decode(ids) for x in zip(said, heard) for ids in x)
        assert llds.action_ids((torch.tensor([e.action_id]) > 0).long()).tolist() == [e.action_id], name


def test_a_full_context_ends_the_episode():
    """Wherever it fills up: while the model writes, or because the feedback no longer fits."""
    stories = {"asks": [SEARCH, SEARCH, RIGHT], "forgets": [FORGETS] * 3, "raves": ["x" * 99] * 3}
    ends = Counter()
    for length in range(20, 200, 4):
        env = world(max_length=length)
        for e in replay(env, [act(env, *story) for story in stories.items()]):
            assert len(e.ids) <= length and e.action_id[-1] == e.turn
            ends["full" if len(e.ids) == length else "no room" if e.turn < 3 else "last turn"] += 1
    assert len(ends) == 3 and min(ends.values()) > 10


def test_prompts():
    """Our wording, or the question's own `prompt`; the tokenizer's chat template with its special tokens."""
    e = world(prompt="Say {question}").reset({"question": "{x}", "prompt": None})
    assert bpe().decode(e.ids) == "Say {x}"
    question = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]}
    chat = PreTrainedTokenizerFast(tokenizer_object=bpe().backend_tokenizer, eos_token=END, chat_template=(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"))
    plain, full = "Be brief.\nWho?", f"{START}system: Be brief.{END}{START}user: Who?{END}{START}"
    for tok, choice, text in (
            (bpe(), "auto", plain), (chat, "off", plain), (chat, "auto", full), (chat, "on", full)):
        e = world(tok, chat_template=choice).reset(question)
        assert tok.decode(e.ids) == text and e.ids.count(tok.eos_token_id) == text.count(END)
        assert e.start == len(e.ids) == len(e.action_id) and not any(e.action_id)


@pytest.mark.parametrize("tok", [bpe, lambda: built_in()[0]], ids=["bpe", "built-in"])
@pytest.mark.parametrize("attack", [
    RIGHT, "</information> " + RIGHT, "</search>", f"{END}{START}<eos><unk>", "</infor</information>mation>",
    "<</information>/information>", "</information></information>", "<information>", "</answer",
    "</information", "<", "<think>", "\n\n</information>\n\n", "</answer>\n\n" + SEARCH, "é日\x00"])
def test_hostile_documents(attack, tok):
    """In title or text: it neither ends the episode nor scores, and the block ends only where we end it."""
    tok = tok()
    hostile = texts(f'"{attack}"\ncapital {attack}{attack} <answer> Paris{attack}', attack + " capital")
    env = world(tok, hostile, top_k=2)
    e = act(env, "?", ["<search> capital </search>", "Paris </answer>", "> Paris" + tok.eos_token])
    assert (e.turn, e.reward, e.answer_start, len(e.searches[0])) == (3, 0.0, None, 2)
    block = e.ids[e.action_id.index(1) + e.action_id.count(1):e.action_id.index(2)]
    text = env.decode(block).strip()
    assert text.startswith("<information>") and text.endswith("</information>")
    assert re.findall("</?(?:think|search|information|answer)>", text) == ["<information>", "</information>"]
    assert not (set(tok.added_tokens_decoder) - {tok.unk_token_id}) & set(block)    # no special token gets in


@pytest.mark.parametrize("limit", [32, 33, 45, 60])
def test_long_feedback_is_cut_inside_the_text_and_still_closed(limit):
    long = texts('"Long"\n' + " capital é </information> <answer>" * 40)
    env = world(passages=long, max_feedback_tokens=limit)
    e = act(env, "?", [SEARCH, "x" * 99, "x" * 99])
    end, begin = (lambda k: e.action_id.index(k) + e.action_id.count(k)), e.action_id.index
    block, correction = e.ids[end(1):begin(2)], e.ids[end(2):begin(3)]
    text = env.decode(block)
    assert len(block) == limit and text.startswith(llds.OPEN) and text.endswith(llds.CLOSE)
    assert text.count("</information>") == 1
    assert llds.information(long).startswith(text[len(llds.OPEN):-len(llds.CLOSE)].rstrip("\ufffd"))
    replay(env, [act(env, "raves", ["x" * 99] * 3)])                   # the longest episode fits in the cache
    assert 0 < len(correction) <= limit


def test_an_action_ends_with_its_tag_however_it_is_split():
    """Random actions of whole, split, merged and spelled tags, after prompts that stop inside one. The oracle
    reads the whole action after each token; a byte-level token's name has a character for each byte."""
    tok, env, rng, ends = bpe(), world(max_new_tokens=40), random.Random(0), Counter()
    parts = ["</search>", "</answer>", "<answer>", "<search>", "</", "/", "sear", "ch", "answer", "search",
             ">", ">\n\n", "></", "/search>", "</answer", "<", " Paris", "é", "日", ">\n"]
    for _ in range(600):
        before = tok.encode(rng.choice(["Q", "<answer> </answer", "</search", "</", "<answer>", "</answer>"]))
        action = encode(tok, list(chain(*(
            rng.choice([[part], [*part], [part[:2], part[2:]]]) for part in rng.choices(parts, k=40)))))
        action.insert(rng.randrange(120), tok.eos_token_id)
        e = llds.Episode({"golden_answers": []}, before[:], [0] * len(before), len(before))
        for n, token in enumerate(action[:40], 1):
            e.ids.append(token)
            e.action_id.append(1)
            names = tok.convert_ids_to_tokens(action[:n])
            tag = re.search("</(search|answer)>", "".join(names))
            assert env.complete(e) == bool(tag or token == tok.eos_token_id or n == 40), names
            if env.complete(e):
                break
        env.respond([e])
        opens = "".join(names)[:tag.start()].rfind("<answer>") if tag and tag[1] == "answer" else -1
        ends[tag and tag[0], opens >= 0] += 1
        assert (spoken(env, e) is None) == (e.answer_start is None) == (opens < 0)
        if opens >= 0:                                                     # it begins with the token of its <
            first = sum(end <= opens for end in accumulate(map(len, names)))
            assert e.answer_start == len(before) + first and len(e.ids) == len(before) + n
    assert len(ends) == 4 and min(ends.values()) > 9, ends


# ---------------------------------------------------------------------------------------------- the rollout

LIKES = {"<search>": 7, "</search>": 7, "<answer>": 6, "</answer>": 6, "<eos>": 3, "capital": 3, "Kabul": 3}


def agent(seed, **flags):
    """The built-in model, untrained, in float64, fond of tags; questions of ragged length; a search engine
    that finds something for every query, so that also an untrained agent gets to read."""
    torch.manual_seed(seed)
    tok, model = built_in()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(tok))    # untied, with a bias
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, .25)
        for token, fondness in LIKES.items():
            model.lm_head.bias[tok.convert_tokens_to_ids(token)] = fondness
    questions = [{"question": q["question"] + " Oslo" * (5 * i % 7), "golden_answers": [*tok.get_vocab()]}
                 for i, q in enumerate(QUESTIONS[:7])]
    env = world(tok, **dict(max_turns=3, top_k=2, max_new_tokens=9, max_feedback_tokens=40) | flags)
    env.retriever.search = lambda queries, k: [PASSAGES[len(query) % 6:][:k] for query in queries]
    return model.double(), env, questions


@torch.no_grad()
def same(model, env, questions, group=1, rows=99):
    """Greedy rollout() does what the plain model does, one row at a time; returns its episodes."""
    choose = lambda e: int(model(torch.tensor([e.ids])).logits[0, -1].float().argmax())
    env.cfg.rollout_batch = rows
    episodes = llds.rollout(model, env, questions, group, 0.0)
    played = [play(env, question, choose) for question in questions]
    assert [replace(e, fed=0) for e in episodes] == [e for e in played for _ in range(group)]
    return episodes


def test_rollout_equals_one_row_at_a_time():
    seen = Counter()
    for seed, (how, flags) in enumerate([
            ((), {}), ((3, 7), {}), ((1, 1), dict(max_new_tokens=4)), ((1, 3), dict(max_new_tokens=17)),
            ((1, 5), dict(max_turns=1, max_feedback_tokens=32)), ((2, 2), {}), ((), dict(max_new_tokens=1)),
            ((4, 11), {}), ((1, 4), dict(top_k=1, max_new_tokens=30))]):
        for e in same(*agent(seed, **flags), *how):
            seen.update(searches=len(e.searches), corrections=e.turn - 1 - len(e.searches), late=e.turn > 2,
                        answers=e.answer_start is not None, silent=e.answer_start is None)
    assert len(seen) == 5 and min(seen.values()) > 5, seen


def test_a_rollout_after_an_update_is_the_new_policys():
    model, env, questions = agent(20)
    before = same(model, env, questions)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=.2)
    assert [e.ids for e in same(model, env, questions)] != [e.ids for e in before]


@pytest.mark.parametrize("group, rows", [(1, 99), (3, 7)])
def test_every_token_enters_the_model_once(group, rows):
    """Each group's prompt once; then, for each row, all that follows but the last token, which nothing reads.
    In a chunk of the built-in vocabulary only padding and a leading <eos> are 0."""
    (model, env, questions), fed = agent(21), []
    model.base_model.register_forward_pre_hook(lambda module, args: fed.extend(
        1 + max((t for t, i in enumerate(row) if i), default=0) for row in args[0].tolist()))
    env.cfg.rollout_batch = rows
    episodes = llds.rollout(model, env, questions, group, 1.0)
    starts = [env.reset(e.question).start for e in episodes]
    assert sum(len(e.searches) for e in episodes) > 0 and env.tok.eos_token_id == 0
    assert sum(fed) == sum(starts[::group]) + sum(len(e.ids) - 1 - n for n, e in zip(starts, episodes))


def test_sampled_log_probabilities_are_those_of_the_training_forward(monkeypatch):
    """With one row in the cache every call of the sampler is a token of an action, in order."""
    (model, env, questions), said, multinomial = agent(22), [], torch.Tensor.multinomial

    def sampler(p, n):
        token = multinomial(p, n)
        said.append(p.gather(1, token).log().item())
        return token

    monkeypatch.setattr(torch.Tensor, "multinomial", sampler)
    env.cfg.rollout_batch = 1
    episodes = llds.rollout(model, env, questions, 1, 1.3)
    ids, action_id, answer_mask = llds.pad(episodes)
    logp, _ = llds.token_logps(model, ids, action_id, 1.3)
    torch.testing.assert_close(logp[action_id > 0], torch.tensor(said), rtol=1e-4, atol=1e-5)
    assert sum(len(e.searches) for e in episodes) > 0
    assert [row[mask > 0].tolist() for row, mask in zip(ids, answer_mask)] == [
        [] if e.answer_start is None else e.ids[e.answer_start:] for e in episodes]


# ----------------------------------------------------------------------------------------------- the update

@pytest.mark.parametrize("temperature, chunk", [(1.0, 1024), (1.7, 3)])
def test_token_logps_equal_those_of_full_logits(temperature, chunk):
    """Values, exact entropy, each parameter's gradient; 0 outside actions. 3: less than the actions have."""
    model, env, questions = agent(23)
    model.float()
    ids, action_id, _ = llds.pad(llds.rollout(model, env, questions, 1, temperature))
    weight = torch.randn(ids.shape)                                        # (N, T)

    def solve(logp, entropy):
        model.zero_grad()
        (logp * weight).sum().backward()
        return [logp.detach(), entropy.detach(), *(p.grad for p in model.parameters())]

    full = (model(ids).logits[:, :-1] / temperature).log_softmax(-1)       # column t predicts t + 1
    full = full.gather(2, ids[:, 1:, None])[..., 0], -(full.exp() * full).sum(-1)
    want = solve(*(torch.nn.functional.pad(x, (1, 0)) * (action_id > 0) for x in full))
    got = solve(*llds.token_logps(model, ids, action_id, temperature, chunk))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not any(x[action_id == 0].any() for x in got[:2]) and all(x.any() for x in got)
    logp, entropy = solve(*llds.token_logps(model, ids, torch.zeros_like(ids), temperature, chunk))[:2]
    assert logp.shape == entropy.shape == ids.shape and not (logp.any() or entropy.any())   # no action at all


def updated(micro_batch_tokens, monkeypatch=None, rate=.3, **flags):
    """One training step on fixed rollouts, right or wrong by decree -> metrics, new weights, and for each
    update what its micro-batches found in new - old log-probabilities."""
    model, env, questions = agent(30)
    model.float()
    episodes = llds.rollout(model, env, questions, 4)
    for i, e in enumerate(episodes):
        e.reward = float(i % 3 == 0 or e.answer_start is not None)
    flags = dict(group_size=4, mini_batches=2, passes=2, beta=.1, answer_weight=".5") | flags
    optimizer = torch.optim.SGD(model.parameters(), rate)
    moved, loss, step = [[]], llds.policy_loss, optimizer.step
    if monkeypatch:
        monkeypatch.setattr(llds, "policy_loss", lambda logp, old, adv, mask, *rest: (
            moved[-1].append((logp - old).detach()[mask]), loss(logp, old, adv, mask, *rest))[1])
        monkeypatch.setattr(optimizer, "step", lambda: (moved.append([]), step()))
    reference = llds.snapshot(agent(31)[0].float())
    torch.manual_seed(0)                                                   # the same plan for everyone
    cfg = llds.Config(micro_batch_tokens=micro_batch_tokens, **flags)
    scheduler = SimpleNamespace(step=lambda: None)
    metrics, _ = llds.train_step(model, reference, optimizer, scheduler, episodes, 1.0, cfg)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    return metrics, [p.detach() for p in model.parameters()], moved[:-1]


@pytest.mark.parametrize("gate", ["token", "response", "action"])
def test_llds_acts_from_the_second_update_on(gate, monkeypatch):
    """At the first, new = old to the last bit: rounding alone would open the gates at full strength."""
    metrics, _, moved = updated(800, monkeypatch, llds_gate=gate)
    assert len(moved) == 4 and len(moved[0]) > 1                           # updates; micro-batches
    assert not torch.cat(moved[0]).any() and all(torch.cat(update).any() for update in moved[1:])
    assert metrics["llds"] > 0 and metrics["ratio_max"] > 1 and metrics["kl"] > 0
    first = updated(800, mini_batches=1, passes=1, llds_gate=gate)[0]      # nothing but a first update
    assert first["llds"] == first["llds_gate_frac"] == 0.0 and first["ratio_max"] == 1.0
    still = updated(800, rate=0.0, llds_gate=gate)[0]                      # weights that stand still
    assert (still["llds"], still["llds_gate_frac"], still["ratio_max"]) == (0.0, 0.0, 1.0)


def test_micro_batches_do_not_change_the_update():
    (want, weights, _), *others = [updated(tokens) for tokens in (10 ** 6, 800, 1)]
    known = {name: value for name, value in want.items() if value is not None}
    for metrics, other, _ in others:
        assert metrics.keys() == want.keys()
        assert {name: metrics[name] for name in known} == pytest.approx(known, rel=1e-3, abs=1e-5)
        torch.testing.assert_close(other, weights, rtol=1e-4, atol=1e-5)
    assert want["clip_frac"] > 0 and want["llds_gate_frac"] > 0
    for knob in (dict(beta=0.0), dict(clip=9.0), dict(answer_weight="1"), dict(llds_gate="token"),
                 dict(temperature=2.0)):
        assert any(not torch.equal(*pair) for pair in zip(updated(10 ** 6, **knob)[1], weights)), knob


# ------------------------------------------------------------------------------------------------ diagnosis

def test_first_action_match_by_hand():
    """One: the right response found a; the wrong ones a, then b; b, then a; nothing; nothing: 1 of 4. Two:
    two right ones did not search, one found a; the wrong ones a, nothing: 1 of 2. Three: none is right."""
    def of(*pairs):
        return [SimpleNamespace(searches=[[name] for name in found], reward=float(r)) for found, r in pairs]

    one = of(("a", 1), ("ab", 0), ("ba", 0), ("", 0), ("", 0))
    two, three = of(("", 1), ("a", 0), ("a", 1), ("", 0), ("", 1)), of(*[("a", 0)] * 5)
    assert llds.first_action_match(one, 5) == 1 / 4
    assert llds.first_action_match(two, 5) == 1 / 2
    assert llds.first_action_match(one + two + three, 5) == 2 / 6
    assert llds.first_action_match(three, 5) is None


def test_phases_by_hand():
    """Steps 1 to 10 are healthy; then correct responses cost 3 nats where they cost 1: the mean of five is
    (3 + 4) / 5 = 1.4 at step 11, 1.8 at step 12. Entropy never moves; the gradient is 11 times as large from
    step 20 on: (11 + 4) / 5 = 3 > 2; reward .8 turns to .2 at step 23: .68 at 23, .56 < .6 at 24."""
    rows = [dict(step=t, logp_correct=-1. if t <= 10 else -3., entropy=.5, grad_norm=1. if t < 20 else 11.,
                 reward=.8 if t < 23 else .2) for t in range(1, 31)]
    assert str(llds.crossings(rows)) == str({"logp_correct": 12, "grad_norm": 20, "reward": 24})
    assert llds.crossings(rows[:11]) == llds.crossings(rows[:3]) == llds.crossings([]) == {}
    rows[11]["logp_correct"] = None                                        # no correct response at step 12
    assert llds.crossings(rows)["logp_correct"] == 13


def test_the_report_names_the_phases(capsys):
    rows = [dict(step=t, logp_correct=-1. if t <= 10 else -3., entropy=.5, grad_norm=1.,
                 reward=.8 if t < 23 else .2, eval_em=.5, displaced=0.) for t in range(1, 31)]
    llds.report({0.0: rows, 0.5: rows[:9]}, {"eval_em": .25}, None)
    plain, ours = capsys.readouterr().out.split("lambda 0.5", 1)
    assert "I stagnation: steps 1 to 11, II decay: steps 12 to 23, III acceleration: steps 24 to 30" in plain
    llds.report({0.0: [row | {"logp_correct": None} for row in rows]}, {"eval_em": .25}, None)  # never right
    assert "logp_correct" not in capsys.readouterr().out
    assert "I stagnation: steps 1 to 9 " in ours and "decay" not in ours and "0.250" in ours


@pytest.mark.skipif(not find_spec("matplotlib"), reason="--plot is for those who have matplotlib")
def test_the_curves_of_two_runs_lie_over_each_other_in_two_colours(tmp_path, monkeypatch):
    from matplotlib import pyplot
    pyplot.switch_backend("agg")
    rows = [dict(step=t, logp_correct=None if t == 2 else -t, entropy=t, grad_norm=1, reward=t, displaced=0,
                 eval_em=t if t % 2 else None) for t in range(1, 6)]
    llds.report({0.0: rows, 0.5: rows[:4]}, {"eval_em": .25}, tmp_path / "curves.png")
    axes = pyplot.gcf().axes
    assert [axis.get_title() for axis in axes] == [*llds.CURVES] and (tmp_path / "curves.png").stat().st_size
    for axis in axes:
        assert len(axis.lines) == len({line.get_color() for line in axis.lines}) == 2, axis.get_title()
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["lambda 0", "lambda 0.5"]
    assert axes[0].lines[0].get_xydata().tolist() == [[1, 1], [3, 3], [5, 5]]     # where it was evaluated


def test_metrics_tell_actions_and_searches_apart():
    """logp_action1 and 2 of correct responses, logp by number of searches: from a step that moves nothing."""
    model, env, questions = agent(33)
    episodes = llds.rollout(model.float(), env, questions, 4)
    for i, e in enumerate(episodes):
        e.reward = float(i % 3 == 0)
    cfg, still = llds.Config(group_size=4), SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    metrics, (_, old, new) = llds.train_step(model, None, still, still, episodes, 1.0, cfg)
    assert torch.equal(old, new) and metrics["displaced"] == 0

    def mean(keep):
        values = [old[i, t].item() for i, e in enumerate(episodes)
                  for t, k in enumerate(e.action_id) if keep(e, k)]
        return sum(values) / len(values) if values else None

    want = {"logp_correct": mean(lambda e, k: k and e.reward),
            "logp_wrong": mean(lambda e, k: k and not e.reward),
            **{f"logp_action{n}": mean(lambda e, k: k == n and e.reward) for n in (1, 2)},
            **{f"logp_{n}searches": mean(lambda e, k: k and len(e.searches) == n) for n in range(4)}}
    known = {name: value for name, value in want.items() if value is not None}
    near([metrics[name] for name in known], list(known.values()))
    assert all(metrics[name] is None for name in want.keys() - known.keys())
    assert len(set(want.values())) > 6


def test_the_probe_restores_the_weights_and_counts_what_fell(capsys, monkeypatch):
    """Each group starts from the same weights and a fresh optimiser; what is printed counts what it lists."""
    model, env, questions = agent(34)
    for q in questions:
        q["golden_answers"] = [*env.tok.get_vocab()][::2]
    before, seen, real = copy.deepcopy(model.state_dict()), [], llds.train_step

    def step(model, reference, optimizer, scheduler, group, llds_lambda, cfg):
        seen.append((cfg.mini_batches, cfg.passes, llds_lambda, len(group)))
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert not optimizer.state                                         # a fresh one
        result = real(model, reference, optimizer, scheduler, group, llds_lambda, cfg)
        assert any(not torch.equal(x, before[name]) for name, x in model.state_dict().items())
        return result

    monkeypatch.setattr(llds, "train_step", step)
    cfg = llds.Config(probe=5, group_size=8, passes=3, llds_lambda=[2.0], learning_rate=1e-2)
    llds.probe(model.float(), env, questions, cfg)
    assert all(torch.equal(x, before[name].float()) for name, x in model.state_dict().items())
    n, runs = len(seen) // 3, [(1, 1, 0.0, 8), (1, 3, 0.0, 8), (1, 3, 2.0, 8)]
    assert n > 1 and seen == [run for run in runs for _ in range(n)]
    lines = capsys.readouterr().out.splitlines()
    blocks = [i for i, line in enumerate(lines) if line.startswith("updates ")]
    for i in blocks:
        changes = [float(line.split()[0]) for line in lines[i + 1:i + 1 + n]]
        assert f"{sum(x < 0 for x in changes)} of {n} questions" in lines[i] and changes == sorted(changes)


def snippet(word):
    """The one block of Python in the README that contains `word`, run."""
    text = Path(llds.__file__).with_name("README.md").read_text()
    found, = [code for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if word in code]
    names = {}
    exec(found, names)
    return names


def test_the_readme_loop_runs_and_is_silent_at_first():
    """One distribution over three words. Right responses are 0 0 1, wrong ones 0 0 0: word 0 is pushed down
    and right ones lose 2 for each 1 that they gain by word 1."""
    weights = torch.zeros(3).requires_grad_()
    words = torch.tensor([[2, 0, 0, 2, i % 3 == 0] for i in range(4)]).long()
    mask = torch.tensor([[0, 1, 1, 0, 1]] * 4)
    run = snippet("def updates(")["updates"](lambda: weights.log_softmax(dim=0)[words],
                                             torch.optim.SGD([weights], 0.5), mask,
                                             torch.tensor([1., 0, 0, 1]), 2, 4)
    first, *later = run
    assert first == 0 and len(later) == 3 and max(later) > 0


@pytest.mark.skipif(not find_spec("trl"), reason="needs trl")
@pytest.mark.parametrize("updates", [1, 2])
def test_the_readme_trainer_for_trl(updates, tmp_path):
    """A reward with spread, one or two updates a rollout: the penalty is 0, then not, if a second comes."""
    from trl import GRPOConfig
    tok, model = built_in()
    seen, trainer = [], snippet("GRPOTrainer")["LLDSTrainer"]
    loss = trainer._compute_loss
    trainer._compute_loss = lambda *args: (loss(*args), seen.append(args[0].llds.item()))[0]
    args = GRPOConfig(
        output_dir=tmp_path, max_steps=4, num_iterations=updates, num_generations=4, learning_rate=1e-2,
        per_device_train_batch_size=8, max_completion_length=9, report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, warmup_steps=0)
    data = Dataset.from_list([{"prompt": q["question"]} for q in QUESTIONS[:8]])
    reward = lambda completions, **_: [float(i % 2) for i in range(len(completions))]
    trainer(model, reward, args, data, processing_class=tok).train()
    assert len(seen) == 4
    assert max(seen[::updates]) < 1e-6
    assert updates == 1 or max(seen[1::2]) > 1e-4


def test_the_memory_table_is_what_its_formula_says(capsys):
    snippet("def gigabytes")
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    text = Path(llds.__file__).with_name("README.md").read_text()
    assert said == [[*row] for row in re.findall(r"^\| (\S+B) \| ([\d.]+) \| ([\d.]+) \| \d+ GB", text, re.M)] != []


# ----------------------------------------------------------------------------------------- the command line

SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
PROMISED = """reward logp_correct logp_wrong entropy grad_norm ratio_max clip_frac kl llds llds_gate_frac
    llds_token_frac searches valid_actions action_tokens zero_std_groups tokens_per_s seconds""".split()


def test_three_steps_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Two lambdas, one training each, from one start and one seed; then the saved model answers. Every other
    name is right, so that an agent fresh from a short warm start meets both rewards."""
    right = sorted({name for q in QUESTIONS for name in q["path"]})[::2]
    for split, most in (("train", 999), ("test", 6)):
        rows = [q | {"golden_answers": right} for q in QUESTIONS if q["split"] == split]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:most]))
    command = f"""{sys.executable} {Path(llds.__file__).resolve()} --steps 3 --warm_steps 40 --group_size 4
        --questions_per_step 4 --mini_batches 2 --max_new_tokens 20 --eval_steps 2 --sample_every 2
        --llds_lambda .5 0 --train_data train.jsonl --eval_data test.jsonl --output_dir out""".split()
    environment = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONUTF8="1")
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert all(word in run.stdout for word in ("held-out", "lambda 0.5")) and "\033" not in run.stdout
    logs = [(tmp_path / "out" / name / "metrics.jsonl").read_text() for name in ("lambda_0.5", "lambda_0")]
    runs = [[json.loads(line, parse_constant=pytest.fail) for line in log.splitlines()] for log in logs]
    for rows in runs:
        assert [(row["step"], "eval_em" in row) for row in rows] == [(1, False), (2, True), (3, True)]
        assert all(set(PROMISED) <= set(row) for row in rows)
    for name in ("reward", "logp_correct", "entropy", "searches", "action_tokens"):
        assert runs[0][0][name] == runs[1][0][name], name                  # one start, one seed
    assert 0 < runs[0][0]["reward"] < 1 and runs[0][2]["entropy"] != runs[1][2]["entropy"]
    out = tmp_path / "out" / "lambda_0.5"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["llds"]["llds_lambda"] == [.5]
    assert llds.parse_config(["--model", str(out)]).max_new_tokens == 20   # a saved run's own preset
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    Path("wiki.jsonl").write_text("".join(json.dumps({"contents": p["contents"]}) + "\n" for p in PASSAGES))
    trained = ["--model", str(out), "--corpus", "wiki.jsonl"]               # which has no questions
    llds.main([*trained, "--ask", "What is the capital of France?"])
    assert "What is the capital of France?" in capsys.readouterr().out
    lines = Path("train.jsonl").read_text().splitlines(keepends=True)
    for i, name in enumerate(SETS):
        Path(f"{name}.jsonl").write_text("".join(lines[i::40]))
    llds.main([*trained, "--eval", "--eval_data", ",".join(f"{name}.jsonl::train[:{i + 1}]" for i, name in
                                                           enumerate(SETS)), "--output_dir", "scores"])
    said, scores = capsys.readouterr().out, json.loads(Path("scores/eval.json").read_text())
    assert scores["questions"] == {name: i + 1 for i, name in enumerate(SETS)}
    assert all(f"eval_em_{name}" in scores for name in (*SETS, "general", "multi_hop", "average"))
    assert (scores["corpus"], scores["top_k"], scores["max_turns"]) == ("wiki.jsonl", 3, 3)
    assert all(name in said for name in scores) and os.listdir("scores") == ["eval.json"]
    assert not llds.load_model(llds.Config(model=str(out)), [], [])[1].training         # dropout stays off


def test_questions_from_files_and_from_the_hub(tmp_path, monkeypatch):
    """Plain rows, and rows as Search-R1 keeps them; one set or several; slices; what the hub is asked for."""
    monkeypatch.chdir(tmp_path)
    plain = [{"id": f"test_{i}", "question": f"{i}?", "golden_answers": [str(i)]} for i in range(5)]
    Path("plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    theirs = [{"prompt": [{"role": "user", "content": f"Say {i}"}],
               "reward_model": {"style": "rule", "ground_truth": {"target": [str(i)]}}} for i in range(3)]
    other = {"reward_model": {"ground_truth": {"target": ["7"]}}}
    Path("both.jsonl").write_text(json.dumps(plain[0] | other))
    assert llds.load_questions("both.jsonl", "train")[0]["golden_answers"] == ["0"]
    Dataset.from_list(theirs).to_parquet("theirs.parquet")
    Path("plain.jsonl.gz").write_bytes(gzip.compress(Path("plain.jsonl").read_bytes()))
    for name in ("plain.jsonl", "plain.jsonl.gz"):
        assert llds.load_questions(name, "train") == plain
    assert llds.load_questions("plain.jsonl::train[1:3]", "test") == plain[1:3]
    both = llds.load_questions("plain.jsonl::train[:2],theirs.parquet", "train")
    assert [q["set"] for q in both] == ["plain"] * 2 + ["theirs"] * 3
    assert [(q["question"], q["golden_answers"]) for q in both[3:]] == [("Say 1", ["1"]), ("Say 2", ["2"])]
    assert both[4]["prompt"] == theirs[2]["prompt"]
    for row, name in zip(theirs, ("nq", "nq", "popqa")):                    # one file of several benchmarks
        row["data_source"] = name
    Dataset.from_list(theirs).to_parquet("theirs.parquet")
    assert [q["set"] for q in llds.load_questions("theirs.parquet", "test")] == ["nq", "nq", "popqa"]
    asked = []
    hub = Dataset.from_list(plain)
    monkeypatch.setattr(llds, "load_dataset", lambda *args, split: asked.append((*args, split)) or hub)
    sets = llds.load_questions("me/bench:nq:test[:9],me/bench:hotpotqa,me/one", "dev")
    assert asked == [("me/bench", "nq", "test[:9]"), ("me/bench", "hotpotqa", "dev"), ("me/one", None, "dev")]
    assert [q["set"] for q in sets[::5]] == ["nq", "hotpotqa", "one"]
    with pytest.raises(SystemExit):
        llds.load_questions("me/bench:nq:dev,me/bench:nq:test", "dev")      # two sets of one name


def test_evaluation_tells_sets_and_hops_apart():
    """Exact match and searches: of all, by hops, by set; and, where a group of the paper's sets is complete,
    the mean over its sets, however many questions each has."""
    model, env, questions = agent(36)
    questions = [dict(q) for q in questions * 2]
    for i, q in enumerate(questions):
        q |= {"set": SETS[i % 7 * (i < 10)], "hops": 1 + (i > 3), "golden_answers": q["golden_answers"][i % 3::2]}
    scores = llds.evaluate(model.float(), env, questions)
    episodes = llds.rollout(model, env, questions, temperature=0.0)

    def mean(value, keep):
        values = [value(e) for e in episodes if keep(e.question)]
        return sum(values) / len(values)

    parts = {"": lambda q: True, "_1hop": lambda q: q["hops"] == 1, "_2hop": lambda q: q["hops"] == 2,
             **{f"_{name}": lambda q, name=name: q["set"] == name for name in SETS}}
    want = {f"eval_{name}{part}": mean(value, keep) for part, keep in parts.items()
            for name, value in {"em": lambda e: e.reward, "searches": lambda e: len(e.searches)}.items()}
    em = [want[f"eval_em_{name}"] for name in SETS]
    averages = dict(general=sum(em[:3]) / 3, multi_hop=sum(em[3:]) / 4, average=sum(em) / 7)
    assert scores == pytest.approx(want | {f"eval_em_{name}": value for name, value in averages.items()})
    assert len({*em, *averages.values()}) > 3
    some = llds.evaluate(model, env, [q for q in questions if q["set"] != "bamboogle"])
    assert "eval_em_general" in some and not {"eval_em_multi_hop", "eval_em_average"} & set(some)


def test_bfloat16_products_with_float32_weights():
    """Rollout and log-probabilities under autocast: a bfloat16 cache, values near the float32 ones."""
    model, env, questions = agent(37)
    model, caches = model.float(), []
    episodes = llds.rollout(model, env, questions, 2)
    ids, action_id, _ = llds.pad(episodes)
    exact, _ = llds.token_logps(model, ids, action_id)
    real = llds.SlotCache
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        patch.setattr(llds, "SlotCache", lambda *shape: caches.append(real(*shape)) or caches[-1])
        assert all(e.done for e in llds.rollout(model, env, questions, 2))
        logp, entropy = llds.token_logps(model, ids, action_id)
        logp.sum().backward()
    assert {x.dtype for buffers in caches[0].store.values() for x in buffers} == {torch.bfloat16}
    assert logp.dtype == entropy.dtype == torch.float32 and not torch.equal(logp, exact)
    assert (logp - exact).abs().mean() < .05
    assert {(p.dtype, p.grad.dtype) for p in model.parameters()} == {(torch.float32, torch.float32)}


def test_gradient_checkpointing_computes_again_and_changes_nothing():
    model, env, questions = agent(38)
    plain, ours = model, llds.load_model(llds.Config(gradient_checkpointing=True), PASSAGES[:6], QUESTIONS[:18])[1]
    ours.lm_head = torch.nn.Linear(ours.config.hidden_size, len(env.tok))
    ours.double().load_state_dict(plain.state_dict())
    calls, layer = [], ours.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    episodes = llds.rollout(plain, env, questions, temperature=0.0)
    assert llds.rollout(ours, env, questions, temperature=0.0) == episodes and not any(calls)
    ids, action_id, _ = llds.pad(episodes)
    for model in (plain, ours):
        calls.clear()
        llds.token_logps(model, ids, action_id)[0].sum().backward()
    assert len(calls) == 2                                                 # forward, and again in backward
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in plain.parameters()])


def test_a_full_gpu_is_told_which_flags_help(monkeypatch, capsys):
    def full(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(llds, "run", full)
    with pytest.raises(SystemExit) as stop:
        llds.main([])
    assert stop.value.code == 2 and "--micro_batch_tokens" in capsys.readouterr().err


def test_an_update_without_a_finite_gradient_is_skipped():
    model = torch.nn.Linear(2, 1)
    optimizer, seen = torch.optim.SGD(model.parameters(), 1.0), SimpleNamespace(step=lambda: None)
    start = copy.deepcopy(model.state_dict())
    for x, skipped in ((float("inf"), True), (1.0, False)):
        (model(torch.ones(1, 2)) * x).sum().backward()
        norm = llds.update(model, optimizer, seen)
        assert math.isfinite(norm) != skipped and all(p.grad is None for p in model.parameters())
        assert all(torch.equal(x, start[name]) for name, x in model.state_dict().items()) == skipped
    near(norm, 3 ** .5)                                                    # of (1, 1) and 1, before clipping
    near(sum((start[name] - x).square().sum() for name, x in model.state_dict().items()), 1)   # clipped to 1


RUN = """--steps 5 --save_steps 2 --warm_steps 20 --group_size 4 --questions_per_step 4 --mini_batches 2
    --eval_steps 3 --max_new_tokens 20 --beta 0.01 --reward_noise 0.2 --train_data q.jsonl --eval_data q.jsonl
    --save_total_limit 2 --output_dir out""".split()
KILL = """import llds, os, pathlib, sys
name, calls = sys.argv[1], []
where, what, last, number = dict(step=(llds, "update", 9, 9), save=(pathlib.Path, "rename", 2, 9),
                                 term=(llds, "update", 5, 15), server=(llds, "rollout", 6, 0),
                                 scoring=(llds, "evaluate", 2, 0))[name]
real, warm_start = getattr(where, what), llds.warm_start
def deadly(*args, **flags):
    calls.append(name)
    if len(calls) == last and number == 0:
        raise OSError("the server is gone")
    if len(calls) == last:
        os.kill(os.getpid(), number)
    return real(*args, **flags)
llds.warm_start = lambda *args: (warm_start(*args), setattr(where, what, deadly))
llds.main(sys.argv[2:])"""


def test_a_run_that_was_killed_goes_on_bit_by_bit(tmp_path, monkeypatch):
    """kill -9 in the middle of step 5 (goes on from checkpoint-4) or of the second save (from checkpoint-2,
    though step 4 is in the log), SIGTERM in step 3 (which ends first), a retrieval server that dies in step 4
    (saved as of step 3) or while step 3 is evaluated (saved without that): the same metrics and weights."""
    right = sorted({name for q in QUESTIONS for name in q["path"]})[::2]
    questions = "".join(json.dumps(q | {"golden_answers": right}) + "\n" for q in QUESTIONS[:30])

    def outcome(folder, flags=()):
        monkeypatch.chdir(folder)
        llds.main(RUN + [*flags])
        rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
        for row in rows:
            del row["seconds"], row["tokens_per_s"]
        assert sorted(path.name for path in Path("out").glob("*-*"))[1:] == ["checkpoint-5"]    # of two
        return rows, Qwen2ForCausalLM.from_pretrained("out").state_dict()

    for name in ("whole", "step", "save", "term", "server", "scoring"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "q.jsonl").write_text(questions)
    home = str(Path(llds.__file__).parent)
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONUTF8="1", PYTHONPATH=home)
    died = {name: subprocess.Popen([sys.executable, "-c", KILL, name, *RUN], cwd=tmp_path / name, text=True,
                                   env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            for name in ("step", "save", "term", "server", "scoring")}      # side by side
    rows, weights = outcome(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and len({row["reward"] for row in rows}) > 1
    ends = (("step", -9, 4, 4), ("save", -9, 2, 4), ("term", 2, 3, 3), ("server", 2, 3, 3),
            ("scoring", 2, 3, 2))
    for name, status, last, logged in ends:
        _, said = died[name].communicate()
        assert died[name].returncode == status, said
        assert {-9: "", 2: "step 3" if name == "term" else "error: the server is gone"}[status] in said
        assert (tmp_path / name / "out" / f"checkpoint-{last}").is_dir()
        assert len((tmp_path / name / "out" / "metrics.jsonl").read_text().splitlines()) == logged
        if name == "step":
            with pytest.raises(SystemExit):                                # other flags: not this run
                outcome(tmp_path / name, ["--resume", "--clip", ".3"])
        again, now = outcome(tmp_path / name, ["--resume", "--sample_every", "3"])
        if name == "scoring":
            again[2] |= {key: value for key, value in rows[2].items() if key.startswith("eval")}
        assert again == rows and all(torch.equal(now[key], weights[key]) for key in weights)


def test_frozen_embeddings_stand_still_and_nothing_else_does(tmp_path):
    model, env, questions = agent(35)
    for q in questions:
        q["golden_answers"] = [*env.tok.get_vocab()][::2]
    cfg = llds.Config(steps=1, questions_per_step=4, mini_batches=2, max_new_tokens=9, warmup_ratio=0.0)
    start = copy.deepcopy(model.float().state_dict())
    for frozen in (False, True):
        llds.train(model, start, env, questions, questions, 0.1, [], tmp_path / str(frozen),
                   replace(cfg, freeze_embeddings=frozen))
        still = {name for name, x in model.state_dict().items() if torch.equal(x, start[name])}
        assert still == ({"model.embed_tokens.weight"} if frozen else set())


BAD = {"--lernrate 1": "--lernrate", "--steps x": "--steps", "--group_size 1": "--group_size",
       "--llds_lambda .1 -1": "--llds_lambda", "--llds_gate x": "--llds_gate", "--temperature 0": "--temper",
       "--answer_weight 1.5": "--answer_weight", "--hops 3": "--hops", "--probe -1": "--probe",
       "--mini_batches 9 --questions_per_step 8": "--mini_batches",
       "--chat_template on": "--chat_template", "--eval_data no.jsonl": "no.jsonl",
       "--corpus no.jsonl": "no.jsonl", "--corpus bad.jsonl": "bad.jsonl, line 2",
       "--corpus empty.jsonl": "empty.jsonl", "--model odd": "odd", "--model bare": "bare",
       "--model window": "sliding_window", "--llds_lambda .1 .1": "--llds_lambda", "--train_data ,": "cannot be read",
       "--max_turns 0": "--max_turns", "--resume": "--output_dir", "--output_dir odd": "--output_dir odd",
       "--output_dir empty.jsonl/x": "empty.jsonl", "--ask Who?": "--model",
       **{f"--train_data {name}.jsonl": f"{name}.jsonl" for name in ("bad", "plain", "number", "empty", "held")}}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_ends_in_one_sentence(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"contents": "a", "questions": []}\n{"contents": \n')
    Path("plain.jsonl").write_text('{"question": "Who?"}\n')
    Path("number.jsonl").write_text('{"question": "When?", "golden_answers": [1945]}\n')
    Path("empty.jsonl").touch()
    Path("odd").mkdir()
    Path("odd", "config.json").write_text('{}')                         # no model_type
    MistralForCausalLM(MistralConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=1, num_key_value_heads=1, sliding_window=4)
                       ).save_pretrained("window")                      # the rollout would not know of it
    Path("bare").mkdir()
    Qwen2Config().save_pretrained("bare")                               # no weights
    Path("held.jsonl").write_text('{"contents": "a", "questions": [{"question": "Who?", "golden_answers": ["a"], '
                                  '"split": "test"}]}\n')               # nothing to train on
    monkeypatch.setattr(llds, "warm_start", lambda *_: pytest.fail("it began to train"))
    with pytest.raises(SystemExit) as stop:
        llds.main(flags.split())
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "error: " in said and BAD[flags] in said, said


def test_one_update_per_rollout_with_llds_says_so_loudly(capsys):
    llds.parse_config(["--mini_batches", "1"])
    assert "warning" in capsys.readouterr().err.lower()
    llds.parse_config(["--mini_batches", "1", "--llds_lambda", "0"])
    assert not capsys.readouterr().err


# ------------------------------------------------------------- python test_llds.py bench [--model PATH]

CUDA = torch.cuda.is_available()


def clock():
    """Seconds: of the wall with a GPU, else those this process worked, whatever else the machine runs."""
    return (torch.cuda.synchronize() or time.perf_counter()) if CUDA else time.process_time()


def race(repeats, works):
    """{name: median seconds} of works that take turns: a slow minute of the machine meets them all."""
    seconds = {name: [] for name in works}
    for name, work in [*works.items()] * repeats:
        begin = clock()
        work()
        seconds[name].append(clock() - begin)
    return {name: median(values) for name, values in seconds.items()}


def say(what, unit, values):
    """A line: each value and, in brackets, how many times the first it is."""
    first = next(iter(values.values()))
    print(f"  {what:21}" + "   ".join(f"{name} {round(x, 3 if x < 100 else None)}{unit} ({x / first:.3g})"
                                      for name, x in values.items()), flush=True)


class Paced(llds.Environment):
    """Untrained weights write no tags: each action has a length drawn beforehand, feedback 150 tokens."""

    def reset(self, question):
        e = super().reset(question)
        e.lengths = random.choices(range(16, 49), k=self.cfg.max_turns + 1)
        return e

    def complete(self, e):
        return len(e.ids) - e.start == e.lengths[e.turn - 1]

    def respond(self, episodes):
        for e in episodes:
            e.done = e.turn == len(e.lengths)
            if not e.done:
                e.ids, e.action_id, e.turn = e.ids + [*range(50)] * 3, e.action_id + [0] * 150, e.turn + 1
                e.start = len(e.ids)


@torch.no_grad()
def naive(model, env, questions, group_size, temperature):
    """The usual loop: generate() until the action of every row is complete, then read each context anew."""
    episodes = [env.reset(question) for question in questions for _ in range(group_size)]
    while live := [e for e in episodes if not e.done]:
        width, ended = max(len(e.ids) for e in live), [False] * len(live)
        pads = [width - len(e.ids) for e in live]
        ids = torch.tensor([[0] * pad + e.ids for pad, e in zip(pads, live)], device=model.device)
        mask = torch.arange(width, device=model.device) >= torch.tensor(pads, device=model.device)[:, None]

        def stop(ids, _):
            for r, token in enumerate(ids[:, -1].tolist()):
                if not ended[r]:
                    live[r].ids.append(token)
                    live[r].action_id.append(live[r].turn)
                    ended[r] = env.complete(live[r])
            return torch.tensor(ended, device=ids.device)

        model.generate(ids, attention_mask=mask.long(), stopping_criteria=[stop], do_sample=temperature > 0,
                       top_k=0, max_new_tokens=env.cfg.max_new_tokens, pad_token_id=0, eos_token_id=-1)
        env.respond(live)
    return episodes


class Cells(Cache):
    """The least that a cache can do: write the new, show all."""

    def __init__(self, rows, cells):
        super().__init__(layers=[])
        self.shape, self.store = (rows, cells), {}

    def update(self, keys, values, layer, *args, **kwargs):
        rows, heads, width, size = keys.shape
        if layer not in self.store:
            self.store[layer] = keys.new_zeros(2, self.shape[0], heads, self.shape[1], size)
        for buffer, new in zip(self.store[layer], (keys, values)):
            buffer[:rows, :, self.used - width:self.used] = new
        return [buffer[:rows, :, :self.used] for buffer in self.store[layer]]


@torch.no_grad()
def bare(model, calls):
    """The limit: the forwards of a rollout, the same tokens in the same shapes, and nothing around them."""
    used = [call["attention_mask"].shape[-1] for call in calls]
    cache = Cells(max(len(call["input_ids"]) for call in calls), max(used))
    for call, cache.used in zip(calls, used):
        hidden = model.base_model(*call.values(), cache, use_cache=True)[0]
        model.get_output_embeddings()(hidden[:, -1]).argmax(dim=-1).tolist()


def bench_rollout(model, env, questions):
    """Ours, the naive loop, the limit; greedy, and first in float64: they play the same episodes."""
    def play(loop, model=model, asked=questions):
        random.seed(0)                                                     # of the lengths
        return loop(model, env, asked, 8, temperature=0.0)

    def calls(loop):
        made, inputs = [], ("input_ids", "attention_mask", "position_ids")
        keep = lambda module, args, kwargs: made.append(
            {name: (kwargs | dict(zip(inputs, args)))[name] for name in inputs})
        hook = model.base_model.register_forward_pre_hook(keep, with_kwargs=True)
        play(loop)
        hook.remove()
        return made

    exact = copy.deepcopy(model).double()
    ours, theirs = ([e.ids for e in play(loop, exact, questions[:1])] for loop in (llds.rollout, naive))
    assert ours == theirs
    made, reread = calls(llds.rollout), calls(naive)
    say("rollout", " s", race(3, {"ours": lambda: play(llds.rollout), "naive": lambda: play(naive),
                                  "forwards alone": lambda: bare(model, made)}))
    tokens = lambda calls: sum(call["input_ids"].numel() for call in calls)
    say("tokens with padding", "", {"ours": tokens(made), "naive": tokens(reread)})
    say("forwards", "", {"ours": len(made), "naive": len(reread)})


def update(model, episodes, llds_lambda=0.1, penalty=llds.llds_penalty, mini_batches=4):
    """A train_step on rollouts that are right or wrong by decree."""
    for i, e in enumerate(episodes):
        e.reward = float(i % 3 == 0)
    optimizer, real = torch.optim.AdamW(model.parameters(), 1e-5), llds.llds_penalty
    llds.llds_penalty = penalty
    llds.train_step(model, None, optimizer, SimpleNamespace(step=lambda: None), episodes, llds_lambda,
                    llds.Config(mini_batches=mini_batches))
    llds.llds_penalty = real


def bench_update(model, episodes):
    """llds_penalty is computed at lambda 0 too, for the metrics; `without` never. Its own seconds: forward
    and backward, in all four mini-batches."""
    spent = []

    def watched(logp, *args):
        begin = clock()
        loss, info = llds_penalty(logp, *args)
        torch.autograd.grad(loss, logp, retain_graph=True)
        spent.append(clock() - begin)
        return loss, info

    llds_penalty, nothing = llds.llds_penalty, (torch.zeros(()), dict.fromkeys(COUNTS, torch.zeros(())))
    seconds = race(3, {"without LLDS": lambda: update(model, episodes, 0.0, lambda *_: nothing),
                       "lambda 0": lambda: update(model, episodes, 0.0),
                       "lambda 0.1": lambda: update(model, episodes)})
    update(model, episodes, penalty=watched)
    say("update", " s", seconds | {"llds_penalty itself": sum(spent)})


def bench_trl(model, env, questions, rounds=2):
    """TRL's trainer with the naive loop, as its own tool loop is: seconds of a rollout and four updates."""
    from trl import GRPOConfig, GRPOTrainer
    begins = []

    def play(prompts, trainer):                                            # each question comes eight times
        begins.append(clock())
        episodes = naive(trainer.model, env, [{"question": prompt} for prompt in prompts], 1, 1.0)
        starts = [e.action_id.index(1) for e in episodes]
        return {"prompt_ids": [e.ids[:n] for e, n in zip(episodes, starts)], "logprobs": None,
                "completion_ids": [e.ids[n:] for e, n in zip(episodes, starts)],
                "env_mask": [[int(k > 0) for k in e.action_id[n:]] for e, n in zip(episodes, starts)]}

    with TemporaryDirectory() as out, redirect_stdout(None):
        args = GRPOConfig(
            output_dir=out, max_steps=4 * rounds, steps_per_generation=4, num_generations=8,
            per_device_train_batch_size=2 * len(questions), learning_rate=1e-5, use_cpu=not CUDA, bf16=False,
            gradient_checkpointing=False, report_to="none", logging_strategy="no", save_strategy="no",
            disable_tqdm=True)
        right = lambda prompts, **_: [float(i % 3 == 0) for i in range(len(prompts))]
        data = Dataset.from_list([{"prompt": q["question"]} for q in questions])
        GRPOTrainer(copy.deepcopy(model), right, args, data, processing_class=env.tok,
                    rollout_func=play).train()
    begins.append(clock())
    return median(after - before for before, after in zip(begins, begins[1:]))


def bench_model(model, env):
    questions, play = QUESTIONS[:4], partial(llds.rollout, model, env, group_size=8)
    bench_rollout(model, env, questions)
    bench_update(model, play(questions))
    ours = race(2, {"ours": lambda: update(model, play(questions))})
    if CUDA:
        seconds, written = race(3, {"rollout": lambda: play(questions)})["rollout"], play(questions)
        print(f"  sampled tokens a second {sum(k > 0 for e in written for k in e.action_id) / seconds:.0f}, "
              f"peak {peak(lambda: update(model, play(questions))):.0f} MiB")
    if find_spec("trl"):
        ours["TRL"] = bench_trl(model, env, questions)
    say("rollout and update", " s" if "TRL" in ours else " s; trl: not installed", ours)
    episodes, works = play(questions), {}
    for n in (1, 2, 4):
        works[f"rollout {n}x"] = partial(play, questions[:n])
        works[f"update {n}x"] = partial(update, model, episodes[:8 * n], mini_batches=1)
    grown = race(2, works)
    for what in ("rollout", "update"):
        say("tokens", " s", {name: seconds for name, seconds in grown.items() if what in name})


def peak(work):
    """MiB in use at most while it works: on the GPU, else in a forked child."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2 ** 20
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, "the child failed"
    return usage.ru_maxrss / 2 ** 10                                       # KiB on Linux


def bench_logps():
    """token_logps beside (2048, 151936) logits, forward and backward; half of the tokens are feedback."""
    model = qwen2(vocab_size=151936, hidden_size=64, num_hidden_layers=1)
    ids = torch.randint(151936, (2, 1024), device=model.device)
    action_id = (torch.arange(1024, device=model.device) // 64 % 2).repeat(2, 1)

    def full():
        logp = model(ids[:, :-1]).logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
        (logp * action_id[:, 1:]).sum().backward()

    works = {"token_logps": lambda: llds.token_logps(model, ids, action_id)[0].sum().backward(),
             "full logits": full}
    least = peak(lambda: None)
    say("extra peak memory", " MiB", {name: peak(work) - least for name, work in works.items()})
    say("time", " s", race(2, works))


def bench_search():
    """Our BM25, bm25s and rank_bm25: the same words, k1, b and idf -> the same three best passages."""
    rows = (50_000 ** torch.rand(100_000, 60)).long().tolist()             # Zipf
    passages = [{"id": d, "contents": " ".join(f"w{i}" for i in row)} for d, row in enumerate(rows)]
    queries = [" ".join(f"w{i}" for i in random.sample(row, 8)) for row in random.sample(rows, 100)]
    docs = lambda: [words(passage["contents"]) for passage in passages]

    def ours():
        engine = BM25(passages)
        return lambda query: [(hit["id"], hit["score"]) for hit in engine.search([query], 3)[0]]

    def bm25s():
        engine = import_module("bm25s").BM25(method="lucene", k1=1.2, b=0.75)
        engine.index(docs(), show_progress=False)

        def search(query):
            ids, scores = engine.retrieve([words(query)], k=3, show_progress=False)
            return [*zip(ids[0].tolist(), 2.2 * scores[0])]                # lucene leaves out k1 + 1
        return search

    def rank_bm25():
        class Okapi(import_module("rank_bm25").BM25Okapi):
            def _calc_idf(self, dfs):                                      # its own can be negative
                n = self.corpus_size
                self.idf = {word: math.log(1 + (n - df + 0.5) / (df + 0.5)) for word, df in dfs.items()}

        engine = Okapi(docs(), k1=1.2, b=0.75)

        def search(query):
            scores = engine.get_scores(words(query))
            return [(d, scores[d]) for d in (-scores).argsort(kind="stable")[:3].tolist()]
        return search

    built, found, hits = {}, {}, {}
    for library in (ours, bm25s, rank_bm25):
        name, engine = library.__name__, []
        if library != ours and not find_spec(name):
            print(f"  {name}: not installed")
            continue
        some = queries[:5] if library == rank_bm25 else queries
        built |= race(1, {name: lambda: engine.append(library())})
        found |= race(3, {name: lambda: hits.update({name: [*map(engine[0], some)]})})
        found[name] *= 1000 / len(some)
        for got, want in zip(hits[name], hits["ours"]):
            near([score for _, score in got], [score for _, score in want])
        same = sum([d for d, _ in got] == [d for d, _ in want] for got, want in zip(hits[name], hits["ours"]))
        print(f"  {name}: the same 3 scores as ours, in {same} of {len(some)} queries the same 3 passages")
    say("build", " s", built)
    say("search", " ms a query", found)


def qwen2(**sizes):
    """Random weights."""
    config = Qwen2Config(**dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=768) | sizes)
    return Qwen2ForCausalLM(config).to("cuda" if CUDA else "cpu").eval()


def bench(path):
    torch.manual_seed(0)
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")                                        # TRL's
    print("Medians,", f"on {torch.cuda.get_device_name()}" if CUDA else "seconds of CPU work of one thread",
          "(in brackets: how many times the first of the line)\nRollouts: 4 groups of 8, 3 searches and an "
          "answer of 16 to 48 tokens, feedback of 150 tokens; an update is 4 mini-batches")
    tok, agent = llds.load_model(llds.Config(), PASSAGES, QUESTIONS)
    models = {"built-in agent": (tok, agent), "Qwen2, 4 layers, hidden 256, random weights": (
        tok, qwen2(vocab_size=len(tok), hidden_size=256, num_hidden_layers=4))}
    if path:
        models[path] = llds.load_model(llds.Config(model=path), [], [])
    for name, (tok, model) in models.items():
        print(f"\n{name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters")
        model.generation_config = GenerationConfig()                       # no penalty, no EOS
        bench_model(model, Paced(tok, None, llds.Config(prompt=llds.PROMPT, max_new_tokens=48,
                                                        max_feedback_tokens=150)))
    print("\nlog-probabilities of 2048 tokens, half of them feedback, vocabulary 151936")
    bench_logps()
    print("\nBM25, 100,000 passages of 60 words, queries of 8 words")
    bench_search()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="bench: times and ratios. (The tests: python -m pytest.)")
    parser.add_argument("command", choices=["bench"])
    parser.add_argument("--model", help="measure this one too; as llds.py takes it")
    bench(parser.parse_args().model)
